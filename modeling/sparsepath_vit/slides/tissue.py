# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Where the tissue is: found on a low-resolution overview, or read from a file, and asked for as a token grid."""

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..runtime.extras import require
from ..runtime.short_repr import ShortRepr
from .annotated_area import fill_annotated
from .annotations import ANNOTATION_SUFFIXES, Annotations, Polygon, read_annotations
from .errors import SlideError
from .reader import Slide

logger = logging.getLogger(__name__)

_OVERVIEW_MPP = 8.0
_OVERVIEW_MAX_SIDE = 4096
# Otsu splits any histogram, also that of a blank slide or one full of tissue: it decides between these.
_SATURATION_THRESHOLDS = (0.06, 0.15)
_DARKEST_TISSUE = 0.2  # value (HSV); below are black pen, the slide's label edge and what the scanner did not see
_GREEN_PEN = (0.22, 0.47)  # hues no histological stain of ours has
_BLUE_PEN = (0.50, 0.66)  # haematoxylin lies above; a pen is also more saturated than any stain at low resolution
_BLUE_PEN_SATURATION = 0.6
_ASPECT_TOLERANCE = 0.03
_PLACED_MAX_SIDE = 8192
_BEYOND = 0.05  # of the slide's side: annotations drawn along its edge reach over it by less
_ROUNDING = 1e-9  # of shares of a token's area


@dataclass(frozen=True, repr=False)
class TissueMask(ShortRepr):
    """Where a slide has tissue.

    Attributes:
        mask: (rows, columns) bool over the whole slide, True for tissue.
        scale: level-0 pixels per mask pixel along x and y.
    """

    mask: np.ndarray
    scale: tuple[float, float]

    @classmethod
    def of_mask(cls, mask: np.ndarray, slide: Slide) -> "TissueMask":
        """`mask` stretched over the whole of `slide`."""
        return cls(mask, (slide.dimensions[0] / mask.shape[1], slide.dimensions[1] / mask.shape[0]))

    @classmethod
    def everywhere(cls, slide: Slide) -> "TissueMask":
        """All of the slide counts as tissue."""
        return cls.of_mask(np.ones((1, 1), dtype=bool), slide)

    @property
    def share(self) -> float:
        """Share of the slide's area that is tissue."""
        return float(self.mask.mean())

    def token_grid(
        self,
        slide: Slide,
        patch_size: int,
        mpp: float | None = None,
        x: float = 0,
        y: float = 0,
        width: int | None = None,
        height: int | None = None,
        minimum_share: float = 0.5,
    ) -> np.ndarray:
        """Which patch tokens of a region are tissue: the model's `patch_mask`.

        Args:
            slide: the slide of this mask.
            patch_size: pixels per patch token side, at `mpp`.
            mpp: resolution of the region; None for level 0.
            x: left edge of the region, level-0 pixels.
            y: top edge of the region, level-0 pixels.
            width: output pixels at `mpp`; None for all that is right of `x`.
            height: output pixels at `mpp`; None for all that is below `y`.
            minimum_share: a token is tissue when at least this share of its area is (and some of it, where 0).

        Returns:
            `np.ndarray` of shape (ceil(height / patch_size), ceil(width / patch_size)), bool. Tokens that reach over
            the region's edge are counted whole, as the image processor pads them.
        """
        scale = slide.scale(mpp)
        sides = []
        for start, size, slide_side, step in zip((x, y), (width, height), slide.dimensions, scale, strict=True):
            pixels = (slide_side - start) / step - 1e-6 if size is None else size
            sides.append(-(-pixels // patch_size))
        columns, rows = (int(side) for side in sides)
        token = tuple(patch_size * step for step in scale)  # (width, height) in level-0 pixels
        edges_x = (x + token[0] * np.arange(columns + 1)) / self.scale[0]
        edges_y = (y + token[1] * np.arange(rows + 1)) / self.scale[1]
        token_area = token[0] / self.scale[0] * token[1] / self.scale[1]
        share = self._areas(edges_x, edges_y) / token_area
        # A token that is tissue by exactly the share stays so, however its edges were rounded: regions agree with the
        # slide that they are cut from.
        return share >= max(minimum_share, 2 * _ROUNDING) - _ROUNDING

    def _areas(self, edges_x: np.ndarray, edges_y: np.ndarray) -> np.ndarray:
        """Tissue area, in mask pixels, between neighbouring edges: (len(edges_y) - 1, len(edges_x) - 1)."""
        mask, inside = self.mask, []
        for axis, edges in ((0, edges_y), (1, edges_x)):  # a region of a large slide needs a small part of its mask
            side = self.mask.shape[axis]
            first = min(max(0, math.floor(edges[0])), side - 1)
            last = min(max(first + 1, math.ceil(edges[-1])), side)
            mask = mask.take(range(first, last), axis)
            inside.append((edges - first).clip(0, last - first))
        cumulative = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
        cumulative[1:, 1:] = mask.cumsum(0, dtype=np.int64).cumsum(1)
        for axis, position in enumerate(inside):
            below = np.minimum(position.astype(np.int64), mask.shape[axis] - 1)
            part = np.expand_dims(position - below, 1 - axis)
            cumulative = cumulative.take(below, axis) * (1 - part) + cumulative.take(below + 1, axis) * part
        return np.diff(np.diff(cumulative, axis=0), axis=1)


def find_tissue(
    slide: Slide,
    mask_file: str | os.PathLike[str] | None = None,
    margin: float = 24.0,
    smallest_piece: float = 10_000.0,
    largest_hole: float = 50_000.0,
    remove_pen: bool = True,
    classes: Sequence[str] = (),
) -> TissueMask:
    """Finds the slide's tissue, or takes it from `mask_file`.

    On an overview of 8 micrometres per pixel (at most 4096 pixels long) a pixel is tissue where its saturation exceeds
    Otsu's threshold, kept between 0.06 and 0.15 so that a blank slide has no tissue and one without background is all
    tissue. White is never tissue, so neither are the stitching borders of a scanner. Pixels darker than value 0.2
    (black pen, unscanned glass) and, with `remove_pen`, green and strongly blue ones are not tissue; red and brown pen
    resemble stains and are kept: mask such slides by hand. Pieces and holes are then cleaned up and a margin is added.

    Args:
        slide: its mpp must be known.
        mask_file: instead of all this, an image of the aspect ratio of `slide.frame` (zero is background; a JPEG
            counts from 128), or GeoJSON polygons in level-0 pixels from that frame's corner, as QuPath exports them.
            Polygons of all classes are tissue, but for those that end in a star, which QuPath ignores, and
            "Background"; "Ignore*" and "Background" are cut out of the others. It is taken as it is. "all" takes the
            whole slide (for images that were cut out of tissue).
        margin: micrometres added around the tissue.
        smallest_piece: square micrometres; smaller specks are dropped. On small images 0.5 % of the area, if less.
        largest_hole: square micrometres; holes up to this size are filled, unless they reach the image's edge.
        remove_pen: set False for green or bright blue stains.
        classes: of polygons in `mask_file`, only these are tissue; what is cut out stays cut out.

    Raises:
        SlideError: no tissue at all, an unusable mask file, a class that it does not hold, or an unknown mpp.
        ImportError: scikit-image is missing; the message gives the install command.
    """
    if classes and Path(mask_file or "").suffix.lower() not in ANNOTATION_SUFFIXES:
        raise SlideError(
            f"{slide.path}: the annotation class {', '.join(map(repr, classes))} is one of GeoJSON, and the tissue "
            f"mask is {mask_file or 'not given'}: pass --tissue-mask FILE.geojson."
        )
    if mask_file == "all":
        return TissueMask.everywhere(slide)
    if mask_file is not None:
        tissue = _read_mask(Path(mask_file), slide, classes)
        if not tissue.mask.any():
            raise SlideError(f"the tissue mask {mask_file} marks nothing of {slide.path}: check that it belongs to it.")
        return tissue
    overview = _overview(slide)
    mask = _stained(overview, remove_pen)
    scale = slide.dimensions[0] / overview.shape[1]
    pixel_side = slide.mpp * scale  # micrometres
    pixel_area = pixel_side**2
    mask = ~_without_small(~mask, largest_hole / pixel_area, keep_at_edge=True)
    mask = _without_small(mask, min(smallest_piece / pixel_area, 0.005 * mask.size))
    if not mask.any():
        raise SlideError(f"{slide.path}: no tissue was found{_why_no_tissue(overview)}")
    mask = require("skimage.morphology").isotropic_dilation(mask, margin / pixel_side)
    return TissueMask.of_mask(mask, slide)


def _why_no_tissue(overview: np.ndarray) -> str:
    """The end of the message. Nobody is sent to --tissue-mask all who has no stained slide."""
    by_hand = "mark it by hand and pass --tissue-mask FILE (an image or GeoJSON polygons)"
    if (overview == overview[..., :1]).all():
        return (
            ": it is gray, without any colour. Models of stained slides do not know fluorescence and single channels. "
            f"If it is a stained slide that was scanned in gray, {by_hand}."
        )
    if np.median(overview.max(-1)) < 255 * _DARKEST_TISSUE:
        return (
            ": it is almost black. Fluorescence, or samples of more than 8 bits that a program cut, look like this, "
            f"and models of stained slides do not know them. If there is tissue, {by_hand}."
        )
    return (
        f". If there is some (very pale, or in the colour of a pen), {by_hand}, or take everything: --tissue-mask all."
    )


def _overview(slide: Slide) -> np.ndarray:
    longest = max(slide.dimensions)
    return slide.thumbnail(min(_OVERVIEW_MAX_SIDE, max(1, round(longest * slide.mpp / _OVERVIEW_MPP))))


def _stained(overview: np.ndarray, remove_pen: bool) -> np.ndarray:
    filters = require("skimage.filters")
    brightest = overview.max(-1).astype(np.float32)
    saturation = (brightest - overview.min(-1)) / np.maximum(brightest, 1)
    lowest, highest = _SATURATION_THRESHOLDS
    # A single saturation has no threshold between two classes.
    threshold = filters.threshold_otsu(saturation) if np.ptp(saturation) > 0 else highest
    mask = (saturation > np.clip(threshold, lowest, highest)) & (brightest >= 255 * _DARKEST_TISSUE)
    return mask & ~_pen(overview, saturation) if remove_pen else mask


def _pen(overview: np.ndarray, saturation: np.ndarray) -> np.ndarray:
    color = require("skimage.color")
    coloured = saturation > _SATURATION_THRESHOLDS[0]
    hue = np.full(saturation.shape, -1.0, dtype=np.float32)
    hue[coloured] = color.rgb2hsv(overview[coloured])[..., 0]
    green = (hue > _GREEN_PEN[0]) & (hue < _GREEN_PEN[1])
    blue = (hue > _BLUE_PEN[0]) & (hue < _BLUE_PEN[1]) & (saturation > _BLUE_PEN_SATURATION)
    # The pale rim of a stroke is no longer saturated enough to be told from a stain.
    return require("skimage.morphology").isotropic_dilation(green | blue, 2)


def _without_small(mask: np.ndarray, smallest: float, keep_at_edge: bool = False) -> np.ndarray:
    """`mask` without its connected pieces of fewer than `smallest` pixels."""
    pieces = require("skimage.measure").label(mask, connectivity=1)
    kept = np.bincount(pieces.ravel()) >= smallest
    if keep_at_edge:
        kept[np.concatenate([pieces[0], pieces[-1], pieces[:, 0], pieces[:, -1]])] = True
    kept[0] = False  # the label of what is not in the mask
    return kept[pieces]


def _read_mask(path: Path, slide: Slide, classes: Sequence[str]) -> TissueMask:
    if path.suffix.lower() in ANNOTATION_SUFFIXES:
        return _read_polygons(path, slide, classes)
    try:
        with Image.open(path) as image:
            lossy = image.format == "JPEG"
            pixels = np.asarray(image.convert("RGB") if image.mode in ("P", "RGBA", "CMYK", "YCbCr") else image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SlideError(
            f"the tissue mask {path} cannot be read ({error}): it is an image or GeoJSON. Any size with the slide's "
            "aspect ratio works; a side of 4096 pixels is plenty."
        ) from error
    pixels = pixels.max(-1) if pixels.ndim == 3 else pixels
    *_, width, height = slide.frame
    if not _has_shape(pixels, (width, height)):
        shape = f"the tissue mask {path} is {pixels.shape[1]} x {pixels.shape[0]}"
        if _has_shape(pixels, slide.dimensions):
            raise SlideError(
                f"{shape}, the shape of all of level 0 of {slide.path}, and not of its scanned area ({width} x "
                f"{height}), which QuPath shows: pass --origin slide (in Python Slide(path, origin='slide'))."
            )
        raise SlideError(
            f"{shape}, which is not the shape of {slide.path} ({width} x {height}): it must cover the whole slide, at "
            "any resolution."
        )
    return _placed(pixels >= 128 if lossy else pixels > 0, slide)


def _has_shape(pixels: np.ndarray, size: tuple[int, int]) -> bool:
    """Whether an image has the aspect ratio of `size` (width, height)."""
    return abs((pixels.shape[1] / pixels.shape[0]) / (size[0] / size[1]) - 1) <= _ASPECT_TOLERANCE


def _placed(mask: np.ndarray, slide: Slide) -> TissueMask:
    """A mask of the slide's frame as one of all of its level 0."""
    if slide.frame == (0, 0, *slide.dimensions):
        return TissueMask.of_mask(mask, slide)
    sides, sources = [], []
    for start, length, dimension, pixels in zip(
        slide.frame[:2], slide.frame[2:], slide.dimensions, mask.shape[::-1], strict=True
    ):
        # Fine enough that the shift by whole pixels is less than half of the mask's own.
        side = min(dimension, _PLACED_MAX_SIDE, max(_OVERVIEW_MAX_SIDE, math.ceil(2 * pixels * dimension / length)))
        source = np.floor(((np.arange(side) + 0.5) * dimension / side - start) * pixels / length).astype(int)
        sides.append(side)
        sources.append((np.flatnonzero((source >= 0) & (source < pixels)), source))
    (columns, column_of), (rows, row_of) = sources
    whole = np.zeros((sides[1], sides[0]), dtype=bool)
    whole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = mask[np.ix_(row_of[rows], column_of[columns])]
    return TissueMask.of_mask(whole, slide)


def _read_polygons(path: Path, slide: Slide, classes: Sequence[str]) -> TissueMask:
    try:
        annotations = read_annotations(path)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise SlideError(f"the tissue mask {path} is no GeoJSON of polygons ({error!r}).") from error
    longest = max(slide.dimensions)
    scale = longest / min(_OVERVIEW_MAX_SIDE, max(1, round(longest * slide.mpp / _OVERVIEW_MPP)))
    width, height = (max(1, round(side / scale)) for side in slide.dimensions)
    tissue = TissueMask.of_mask(np.zeros((height, width), dtype=bool), slide)
    try:
        marked = annotations.taken(classes)
    except ValueError as error:
        raise SlideError(f"the tissue mask {path}: {error}.") from error
    _say_what_is_taken(annotations, marked, annotations.cut_out(classes), path)
    _warn_of_places_beyond(annotations, path, slide)
    if annotations.polygons and not marked:
        raise SlideError(
            f"the tissue mask {path} marks nothing: all of its polygons are of classes that mean no tissue "
            f"({', '.join(annotations.counts())}; QuPath ignores those that end in a star). Give the tissue another "
            "class, or none."
        )
    corner = (-slide.frame[0], -slide.frame[1])  # of level 0, from that of the frame
    fill_annotated(tissue.mask, annotations, classes, corner, tissue.scale, path.name)
    return tissue


def _say_what_is_taken(
    annotations: Annotations, marked: Sequence[Polygon], cut_out: Sequence[Polygon], path: Path
) -> None:
    """One line where not everything in the file is tissue, or where classes differ."""
    if len(annotations.counts()) < 2 and not annotations.others:
        return
    taken, removed = ({polygon.shown_class for polygon in polygons} for polygons in (marked, cut_out))
    starred = {polygon.shown_class for polygon in annotations.polygons if polygon.is_ignored} - taken - removed
    counted = {name: f"{name} ({count:,})" for name, count in annotations.counts().items()}
    parts = [
        ("taken as tissue", [text for name, text in counted.items() if name in taken]),
        ("cut out of it", [text for name, text in counted.items() if name in removed]),
        ("ignored, as in QuPath", [text for name, text in counted.items() if name in starred]),
        ("not asked for", [text for name, text in counted.items() if name not in taken | removed | starred]),
        ("not used", [f"{annotations.others:,} geometries that are no polygons"] * bool(annotations.others)),
    ]
    listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names)
    logger.warning("the tissue mask %s, polygons by class: %s.", path, listed)


def _warn_of_places_beyond(annotations: Annotations, path: Path, slide: Slide) -> None:
    """Annotations that reach far over the slide's edge are of another slide, level or unit, or of another origin."""
    rings = [polygon.rings[0] for polygon in annotations.polygons]
    if not rings:
        return
    lowest = np.min([ring.min(axis=0) for ring in rings], axis=0)
    highest = np.max([ring.max(axis=0) for ring in rings], axis=0)
    size = np.array(slide.frame[2:])
    slack = _BEYOND * size
    if (lowest >= -slack).all() and (highest <= size + slack).all():
        return
    other_origin = ""
    if slide.frame != (0, 0, *slide.dimensions):
        other_origin = ", or count from the corner of level 0 (then pass --origin slide)"
    logger.warning(
        "the tissue mask %s reaches from x=%.6g, y=%.6g to x=%.6g, y=%.6g; %s has %d x %d pixels. What lies beyond is "
        "cut off. Such annotations are of another slide, or not in level-0 pixels%s.",
        path, *lowest, *highest, slide.path, *size, other_origin,
    )  # fmt: skip
