# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Numbers per token over the slide: a picture, and polygons that QuPath opens."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..runtime.atomic_files import make_folder, write_atomically
from ..runtime.figures import INK, color_overlay, heat_colors, save_image
from .errors import SlideError
from .outlines import annotation, feature_collection, outlines
from .reader import Slide
from .token_values import TokenValues

KEPT_COLOR, REMOVED_COLOR = (44, 111, 176), (226, 229, 234)
_TITLE_HEIGHT = 24


def write_heatmap(
    slide: Slide,
    tokens: TokenValues,
    out: str | os.PathLike[str],
    max_size: int = 2048,
    opacity: float = 0.5,
    classes: int = 5,
) -> list[Path]:
    """Writes `<slide>_<value>.png` and, of numbers, `<slide>_<value>.geojson` into the folder `out`.

    Args:
        slide: the slide the tokens belong to; the polygons count from the corner of its `frame`.
        tokens: what to show.
        out: made if missing.
        max_size: pixels of the picture's longer side.
        opacity: of the colours over the slide, in [0, 1].
        classes: into how many classes of equally many tokens the polygons divide the values.

    Raises:
        SlideError: the tokens are of a slide of another size.
    """
    if tokens.dimensions != slide.dimensions:
        raise SlideError(
            f"the tokens are of a slide of {tokens.dimensions[0]} x {tokens.dimensions[1]} pixels; {slide.path} has "
            f"{slide.dimensions[0]} x {slide.dimensions[1]}: pass the slide they were embedded from."
        )
    folder = make_folder(out)
    picture, polygons = (folder / f"{slide.name}_{tokens.name}{suffix}" for suffix in (".png", ".geojson"))
    save_image(overlay(slide, tokens, max_size, opacity), picture)
    if tokens.is_colored:
        polygons.unlink(missing_ok=True)  # of an earlier file that gave numbers this name
        return [picture]
    write_atomically(polygons, json.dumps(to_geojson(tokens, classes, slide.frame[:2])))
    return [picture, polygons]


def overlay(slide: Slide, tokens: TokenValues, max_size: int = 2048, opacity: float = 0.5) -> Image.Image:
    """The slide's overview with the tokens coloured, and under a line that says what the colours mean."""
    overview = Image.fromarray(slide.thumbnail(max_size))
    grid, present, colors, (left, top) = tokens.colors()
    scale = overview.width / slide.dimensions[0]
    rows, columns = present.shape
    size = [max(1, round(count * side * scale)) for count, side in zip((columns, rows), tokens.token_size, strict=True)]
    blended = color_overlay(overview, colors, opacity * present, (round(left * scale), round(top * scale), *size))
    figure = Image.new("RGB", (blended.width, blended.height + _TITLE_HEIGHT), "white")
    figure.paste(blended, (0, _TITLE_HEIGHT))
    title = f"{tokens.name}, {present.sum():,} tokens"
    if not tokens.is_colored:
        low, high = tokens.limits or (grid[present].min(), grid[present].max())
        title = f"{tokens.name}: {low:.3g} (dark) .. {high:.3g} (bright), {present.sum():,} tokens"
    ImageDraw.Draw(figure).text((3, 4), title, fill=INK, font_size=14)
    return figure


def to_geojson(tokens: TokenValues, classes: int = 5, zero: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """Polygons in level-0 pixels, one annotation per class of values (or kept and removed), as QuPath imports them.

    Args:
        tokens: what to show.
        classes: into how many classes of equally many tokens the values are divided.
        zero: the level-0 pixel (x, y) that the polygons count from: the corner of `Slide.frame`.
    """
    grid, corner = tokens.grid()
    origin = corner - np.asarray(zero)
    present = ~np.isnan(grid)
    if tokens.name == "kept":
        groups = [("kept", KEPT_COLOR, grid > 0), ("removed", REMOVED_COLOR, grid == 0)]
    else:
        bounds = np.quantile(grid[present], np.linspace(0, 1, classes + 1))
        number = np.searchsorted(bounds[1:-1], grid, side="right")  # equal values fall into one class
        shares = np.linspace(0, 100, classes + 1)
        groups = [
            (f"{tokens.name} {shares[index]:.0f}-{shares[index + 1]:.0f} %", color, present & (number == index))
            for index, color in enumerate(heat_colors((np.arange(classes) + 0.5) / classes).tolist())
        ]
    features = []
    for name, color, members in groups:
        if not members.any():
            continue
        values = grid[members]
        measurements = {"tokens": values.size, "lowest": float(values.min()), "highest": float(values.max())}
        features.append(annotation(outlines(members), name, color, measurements, origin, tokens.token_size))
    return feature_collection(features)
