# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Which slides and which of their regions to embed: tissue-covering regions, folders and CSV manifests."""

import csv
import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import SlideError
from .reader import Slide
from .resolution import is_credible
from .tissue import TissueMask

logger = logging.getLogger(__name__)

SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi"),
    *(".png", ".jpg", ".jpeg", ".bmp", ".webp"),
)
MANIFEST_COLUMNS = ("slide", "mpp", "x", "y", "width", "height", "label")


@dataclass(frozen=True)
class Region:
    """A rectangle of a slide: its top left corner in level-0 pixels, its size in output pixels."""

    x: float
    y: float
    width: int
    height: int
    label: str | None = None


@dataclass(frozen=True)
class Box:
    """A rectangle of a slide, all in level-0 pixels from the corner of `Slide.frame`, as manifests give it."""

    x: int
    y: int
    width: int
    height: int
    label: str | None = None

    def at(self, slide: Slide, mpp: float | None) -> Region:
        """This box as a region at `mpp`, rounded down to whole output pixels.

        Raises:
            SlideError: the box is not inside the slide.
        """
        slide_width, slide_height = slide.dimensions
        x, y = self.x + slide.frame[0], self.y + slide.frame[1]
        right, bottom = x + self.width, y + self.height
        if x < 0 or y < 0 or right > slide_width or bottom > slide_height:
            raise SlideError(
                f"the region x={x}..{right}, y={y}..{bottom} (level-0 pixels) is not inside {slide.path}, "
                f"which is {slide_width} x {slide_height}: move or shrink it."
            )
        scale_x, scale_y = slide.scale(mpp)
        width, height = math.floor(self.width / scale_x + 1e-6), math.floor(self.height / scale_y + 1e-6)
        return Region(x, y, width, height, self.label)


@dataclass(frozen=True)
class SlideInput:
    """One slide to embed.

    Attributes:
        path: the slide file.
        mpp: of level 0, where the manifest gives it; it goes before what the file states.
        boxes: the regions to embed; none for all tissue.
        label: of the whole slide.
    """

    path: Path
    mpp: float | None = None
    boxes: tuple[Box, ...] = ()
    label: str | None = None


def tissue_regions(
    slide: Slide,
    tissue: TissueMask,
    patch_size: int,
    region_size: int = 3430,
    mpp: float | None = 0.5,
    overlap: int = 0,
    minimum_tissue: float = 0.0,
) -> list[Region]:
    """Regions on a regular grid from the slide's top left corner that cover its tissue, in raster order.

    Sizes are whole patch tokens: `region_size` and `overlap` are rounded up to multiples of `patch_size`, and so are
    the smaller regions at the right and bottom edge (which may reach up to one token over it: read them with
    `pad=True`). With `minimum_tissue=0` every tissue token lies in a region.

    Args:
        slide: the slide.
        tissue: its tissue.
        patch_size: pixels per patch token side.
        region_size: output pixels per region side.
        mpp: resolution of the regions; None for level 0.
        overlap: output pixels that neighbouring regions share.
        minimum_tissue: share of a region's tokens that must be tissue; 0 asks for one token.

    Raises:
        SlideError: an impossible argument, or no region has `minimum_tissue`.
    """
    if region_size < 1 or not 0 <= overlap < region_size or not 0 <= minimum_tissue <= 1:
        raise SlideError(
            f"region_size={region_size}, overlap={overlap}, minimum_tissue={minimum_tissue} are not possible: a region "
            "has at least one pixel, its overlap is smaller than itself, and the share of tissue lies in [0, 1]."
        )
    side = -(-region_size // patch_size)  # in tokens
    shared = min(-(-overlap // patch_size), side - 1)
    scale_x, scale_y = slide.scale(mpp)
    present = tissue.token_grid(slide, patch_size, mpp)
    rows, columns = present.shape
    regions = []
    for row in range(0, max(1, rows - shared), side - shared):
        for column in range(0, max(1, columns - shared), side - shared):
            inside = present[row : row + side, column : column + side]
            if not inside.any() or inside.mean() < minimum_tissue:
                continue
            height, width = (tokens * patch_size for tokens in inside.shape)
            regions.append(Region(column * patch_size * scale_x, row * patch_size * scale_y, width, height))
    if not regions:
        raise SlideError(
            f"{slide.path}: no region of {region_size} pixels has tissue in at least {minimum_tissue:.0%} "
            "of its tokens. Lower minimum_tissue or region_size, or widen the tissue mask."
        )
    return regions


def read_inputs(paths: Sequence[str | os.PathLike[str]]) -> list[SlideInput]:
    """The slides behind files, folders (searched with their subfolders) and CSV manifests, in order, each once.

    A manifest has the columns `slide,mpp,x,y,width,height,label`, of which only `slide` must be there. `slide` is
    relative to the manifest's folder; `mpp` is that of the slide's level 0; x, y, width and height are level-0
    pixels, empty for all tissue; a slide may have many rows. Files are not opened here.

    Raises:
        ValueError: nothing to read, a folder without slides, or a manifest row that cannot be understood.
    """
    found: dict[Path, SlideInput] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inputs = [SlideInput(file) for file in _slides_in(path)]
        elif path.suffix.lower() == ".csv":
            inputs = read_manifest(path)
        else:
            inputs = [SlideInput(path)]
        for item in inputs:
            known = found.setdefault(item.path.resolve(), item)
            if (known.mpp, known.boxes) != (item.mpp, item.boxes):
                raise ValueError(f"{item.path} is given twice, with different mpp or regions: give it once.")
    if not found:
        raise ValueError("no slides were given: pass files, folders or a CSV with a column 'slide'.")
    return list(found.values())


def _slides_in(folder: Path) -> list[Path]:
    slides = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SLIDE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )
    if not slides:
        raise ValueError(f"{folder} holds no slides: expected files ending in {', '.join(SLIDE_SUFFIXES)}.")
    return slides


def read_manifest(path: Path) -> list[SlideInput]:
    """The slides of a CSV manifest; see `read_inputs`."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = reader.fieldnames or []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"the manifest {path} cannot be read: {error}.") from error
    if "slide" not in columns:
        raise ValueError(
            f"the manifest {path} has the columns {columns}, and no column 'slide'. Expected a comma-separated header "
            f"of {','.join(MANIFEST_COLUMNS)}, of which only 'slide' must be there."
        )
    ignored = [column for column in columns if column not in MANIFEST_COLUMNS]
    if ignored:
        logger.warning("%s: the columns %s are not used.", path, ignored)
    slides: dict[str, SlideInput] = {}
    for line, row in enumerate(rows, start=2):
        name = (row["slide"] or "").strip()
        if not name:
            raise ValueError(f"{path}, line {line}: the column 'slide' is empty.")
        item = _manifest_row(path.parent / name, row, f"{path}, line {line}")
        known = slides.get(name)
        if known is not None and (known.mpp != item.mpp or not known.boxes or not item.boxes):
            raise ValueError(
                f"{path}, line {line}: {name} stands in several rows; these must agree in mpp and each give a region."
            )
        slides[name] = item if known is None else SlideInput(known.path, known.mpp, known.boxes + item.boxes)
    return list(slides.values())


def _manifest_row(slide: Path, row: dict[str, str | None], place: str) -> SlideInput:
    def number(column: str, kind: Callable[[str], float]) -> float | None:
        text = (row.get(column) or "").strip()
        try:
            return kind(text) if text else None
        except ValueError as error:
            kind_name = "number" if kind is float else "whole number"
            raise ValueError(f"{place}: {column}={text!r} is not a {kind_name}.") from error

    mpp = number("mpp", float)
    if mpp is not None and not is_credible(mpp):
        raise ValueError(f"{place}: mpp={mpp} is not the micrometres per pixel of a slide (0.25 at 40x, 0.5 at 20x).")
    label = (row.get("label") or "").strip() or None
    box = [number(column, _whole_number) for column in ("x", "y", "width", "height")]
    if all(value is None for value in box):
        return SlideInput(slide, mpp, label=label)
    if any(value is None for value in box):
        raise ValueError(f"{place}: a region needs x, y, width and height; leave all four empty for all tissue.")
    if box[2] < 1 or box[3] < 1:
        raise ValueError(f"{place}: the region is {box[2]} x {box[3]} pixels; both are at least 1.")
    return SlideInput(slide, mpp, (Box(*box, label=label),))


def _whole_number(text: str) -> int:
    """Also of "100.0", which pandas writes where a column has empty cells."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)
