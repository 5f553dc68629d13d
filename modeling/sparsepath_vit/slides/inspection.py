# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Everything that decides how a slide is read, on one screen: the first thing to look at when something is odd."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ..runtime.atomic_files import make_folder
from ..runtime.extras import require
from ..runtime.figures import INK, color_overlay, save_image
from .backends import open_backend
from .description import SlideDescription, describe
from .embedder import DEFAULT_MPP, EmbedSettings
from .errors import SlideError
from .opening import slide_to_see_at
from .reader import Slide
from .regions import Region, tissue_regions
from .samples import Samples
from .tissue import TissueMask, find_tissue

_TISSUE_COLOR, _REGION_COLOR, _FRAME_COLOR = (44, 160, 80), (44, 111, 176), (214, 69, 65)
_TISSUE_OPACITY = 0.25
_TITLE_HEIGHT = 24
_MOST_LISTED = 8


@dataclass
class Inspection:
    """What was found out about one slide.

    Attributes:
        path: the slide file.
        facts: (name, value) as people read them, in the order to read them.
        problems: why the slide, its resolution, its tissue or its regions cannot be had; empty for a sound slide.
        picture: the overview with tissue and regions, where the slide can be read.
    """

    path: Path
    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    picture: Image.Image | None = None

    def save_picture(self, folder: str | os.PathLike[str]) -> Path | None:
        """Writes the picture as `<slide>_inspection.png` into `folder`, made if missing; None without a picture."""
        if self.picture is None:
            return None
        file = make_folder(folder) / f"{Slide.name_of(self.path)}_inspection.png"
        save_image(self.picture, file)
        return file


def inspect_slide(
    path: str | os.PathLike[str],
    settings: EmbedSettings | None = None,
    *,
    patch_size: int = 14,
    slide_mpp: float | None = None,
    tissue_mask: str | os.PathLike[str] | None = None,
    max_size: int = 1024,
) -> Inspection:
    """Describes a slide, finds its tissue, and says what `embed` would do with it. No model is needed.

    What goes wrong with the slide does not raise: it is among the `problems`, beside all that could be found out.

    Args:
        path: the slide file.
        settings: what `embed` would be asked for.
        patch_size: pixels per patch token side of the model.
        slide_mpp: as in `embed_slides`.
        tissue_mask: as in `find_tissue`.
        max_size: pixels of the picture's longer side.

    Raises:
        ImportError: a library of the `slides` extra is missing.
    """
    found, settings = Inspection(Path(path)), settings or EmbedSettings()
    try:
        description = describe(found.path)
    except SlideError as error:
        found.problems.append(str(error))
        return found
    found.facts += _file_facts(description)
    try:
        slide = slide_to_see_at(found.path, slide_mpp, settings.mpp, settings.origin)
    except SlideError as error:
        found.problems.append(str(error))
        return found
    with slide:
        _inspect_open_slide(found, slide, description, settings, patch_size, tissue_mask, max_size)
    return found


def _inspect_open_slide(
    found: Inspection,
    slide: Slide,
    description: SlideDescription,
    settings: EmbedSettings,
    patch_size: int,
    tissue_mask: str | os.PathLike[str] | None,
    max_size: int,
) -> None:
    """Adds what the pixels tell, as far as they can be had."""
    tissue, regions = None, []
    mpp = DEFAULT_MPP if settings.mpp is None else settings.mpp
    found.facts += _slide_facts(slide, description)
    try:
        overview = slide.thumbnail(max_size)
    except SlideError as error:
        found.problems.append(str(error))
        return
    try:
        found.facts.append(("resolution", _resolution(slide, description)))
        tissue = find_tissue(slide, tissue_mask, classes=settings.annotation_classes)
        found.facts.append(("tissue", _tissue_share(slide, tissue)))
        regions = _regions(slide, tissue, settings, patch_size, mpp)
        found.facts.append(("embed", _what_embed_does(slide, tissue, regions, settings, patch_size, mpp)))
    except SlideError as error:
        found.problems.append(str(error))
    found.picture = _picture(overview, slide, tissue, regions, mpp)


def _file_facts(description: SlideDescription) -> Iterator[tuple[str, str]]:
    path, samples = description.path, description.samples
    yield "file", f"{path} ({path.stat().st_size:,} bytes)"
    yield "format", f"{description.format}, scanner {description.vendor or 'unknown to OpenSlide'}"
    if description.series_names:
        others = [name for number, name in enumerate(description.series_names) if number != description.series]
        listed = "; ".join(others[:_MOST_LISTED]) + f"; and {len(others) - _MOST_LISTED} more" * (
            len(others) > _MOST_LISTED
        )
        yield "image", f"{description.series_names[description.series]}; others: {listed or 'none'}"
    if description.parts:
        yield "parts", f"planes lie in {', '.join(description.parts)}"
    if samples is not None:
        yield "colour", _colour(samples, description)
    storage = {None: "", True: ", in tiles", False: ", in strips or one piece"}[description.tiled]
    planes = ", a plane for each sample" if description.planar else ""
    yield "codec", f"{description.codec or 'not known'}{storage}{planes}"
    if description.orientation != 1:
        yield "orientation", f"{description.orientation} (turned to be upright)"


def _colour(samples: Samples, description: SlideDescription) -> str:
    axes = f", axes {description.axes}" if description.axes else ""
    white = f", white is {samples.white:g}" if samples.white is not None else ", the value of white is not stated"
    alpha = f", {samples.alpha} transparency" if samples.alpha else ""
    return f"{samples.photometric}, {samples.count} samples of {samples.bits} bits ({samples.kind}){alpha}{white}{axes}"


def _slide_facts(slide: Slide, description: SlideDescription) -> Iterator[tuple[str, str]]:
    backend = open_backend(slide.path, 0)
    backend.close()
    yield "read by", backend.name
    width = slide.dimensions[0]
    sizes = [f"{level[0]:,} x {level[1]:,} (1/{width / level[0]:.4g})" for level in slide.levels]
    yield "levels", f"{len(sizes)}: " + ", ".join(sizes)
    if description.objective_power:
        yield "objective", f"{description.objective_power}x, as stated"
    if description.bounds is None:
        yield "bounds", "none stated: coordinates count from the corner of level 0"
    else:
        area = "x={}, y={}, width={}, height={}".format(*description.bounds)
        yield "bounds", f"{area} (level-0 pixels); coordinates count from x={slide.frame[0]}, y={slide.frame[1]}"


def _resolution(slide: Slide, description: SlideDescription) -> str:
    stated = description.resolution
    source = f"{stated.mpp[0]:.5g} x {stated.mpp[1]:.5g} stated in {stated.source}" if stated else "none stated"
    used = " x ".join(f"{mpp:.5g}" for mpp in dict.fromkeys(slide.mpp_xy))
    return f"{used} micrometres per pixel are used ({source})"


def _tissue_share(slide: Slide, tissue: TissueMask) -> str:
    area = tissue.share * slide.dimensions[0] * slide.dimensions[1] * slide.mpp_xy[0] * slide.mpp_xy[1] / 1e6
    shares = f"{tissue.share:.1%} of the slide"
    if slide.frame[2:] != slide.dimensions:
        frame_share = tissue.share * slide.dimensions[0] * slide.dimensions[1] / (slide.frame[2] * slide.frame[3])
        shares += f", {frame_share:.1%} of its scanned area"
    return f"{shares}, {area:.4g} square millimetres"


def _regions(
    slide: Slide, tissue: TissueMask, settings: EmbedSettings, patch_size: int, mpp: float
) -> Sequence[Region]:
    if settings.whole_slide:
        return [Region(0, 0, *slide.size_at(mpp))]
    return tissue_regions(
        slide, tissue, patch_size, settings.region_size, mpp, settings.overlap, settings.minimum_tissue
    )


def _what_embed_does(
    slide: Slide, tissue: TissueMask, regions: Sequence[Region], settings: EmbedSettings, patch_size: int, mpp: float
) -> str:
    tokens = [
        int(tissue.token_grid(slide, patch_size, mpp, region.x, region.y, region.width, region.height).sum())
        for region in regions
    ]
    width, height = slide.size_at(mpp)
    where = (
        "all tissue at once" if settings.whole_slide else f"{len(regions)} regions of up to {settings.region_size} px"
    )
    enlarged = slide.enlargement(mpp)
    note = f"; enlarged {enlarged:.3g} times, which adds no detail" if enlarged > 1.01 else ""
    return (
        f"{where} at {mpp:g} micrometres per pixel ({width:,} x {height:,} px in all), {sum(tokens):,} tissue tokens "
        f"of patch size {patch_size}, at most {max(tokens):,} a forward{note}"
    )


def _picture(
    overview: np.ndarray, slide: Slide, tissue: TissueMask | None, regions: Sequence[Region], mpp: float
) -> Image.Image:
    """The overview with the tissue tinted, the regions outlined, and the scanned area where it is stated."""
    image = Image.fromarray(overview)
    scale = np.array(image.size) / slide.dimensions  # picture pixels per level-0 pixel
    if tissue is not None:
        mask = Image.fromarray(tissue.mask).resize(image.size, Image.Resampling.NEAREST)
        edge = _edge(np.asarray(mask))
        opacity = np.where(edge, 1.0, 0.0)
        colors = np.broadcast_to(np.uint8(_TISSUE_COLOR), (*edge.shape, 3))
        image = color_overlay(image, colors, np.maximum(opacity, _TISSUE_OPACITY * np.asarray(mask)))
    draw = ImageDraw.Draw(image)
    for region in regions:
        size = np.array([region.width, region.height]) * slide.scale(mpp)
        _outline(draw, (region.x, region.y), size, scale, _REGION_COLOR)
    if slide.frame != (0, 0, *slide.dimensions):
        _outline(draw, slide.frame[:2], slide.frame[2:], scale, _FRAME_COLOR)
    figure = Image.new("RGB", (max(image.width, 420), image.height + _TITLE_HEIGHT), "white")
    figure.paste(image, (0, _TITLE_HEIGHT))
    words = [("green: tissue", _TISSUE_COLOR), (f"blue: {len(regions)} regions", _REGION_COLOR)]
    words += [("red: scanned area", _FRAME_COLOR)] * (slide.frame != (0, 0, *slide.dimensions))
    left = 3
    title = ImageDraw.Draw(figure)
    for text, color in [*words, (f"{slide.dimensions[0]} x {slide.dimensions[1]} px", INK)]:
        title.text((left, 4), text, fill=color, font_size=14)
        left += round(title.textlength(text, font_size=14)) + 14
    return figure


def _edge(mask: np.ndarray) -> np.ndarray:
    """The outermost pixels of a mask, (rows, columns) bool."""
    return mask & ~require("scipy.ndimage").binary_erosion(mask, border_value=1)


def _outline(
    draw: ImageDraw.ImageDraw,
    corner: Sequence[float],
    size: Sequence[float],
    scale: np.ndarray,
    color: tuple[int, int, int],
) -> None:
    """Draws the rectangle at `corner` of `size`, both in level-0 pixels."""
    start, end = np.asarray(corner) * scale, (np.asarray(corner) + size) * scale - 1
    draw.rectangle([*np.rint(start).tolist(), *np.rint(np.maximum(start, end)).tolist()], outline=color, width=2)
