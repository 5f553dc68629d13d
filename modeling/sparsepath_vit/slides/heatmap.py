# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Numbers per token over the slide: a picture, and polygons that QuPath opens."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..runtime.atomic_files import write_atomically
from ..runtime.extras import require
from ..runtime.figures import INK, color_overlay, heat_colors, save_image
from .errors import SlideError, decoding
from .outlines import annotation, feature_collection, outlines
from .reader import Slide

KEPT_COLOR, REMOVED_COLOR = (44, 111, 176), (226, 229, 234)
_TITLE_HEIGHT = 24


@dataclass(frozen=True)
class TokenValues:
    """One number for each of many tokens of a slide.

    Attributes:
        name: what the numbers are.
        corners: (N, 2) x and y of the tokens' top left corners in level-0 pixels.
        values: (N,) float.
        token_size: (width, height) of a token in level-0 pixels.
        dimensions: (width, height) of the slide in level-0 pixels.
    """

    name: str
    corners: np.ndarray
    values: np.ndarray
    token_size: tuple[float, float]
    dimensions: tuple[int, int]

    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows, columns) of the values, NaN where there is no token, and the (x, y) of its top left corner.

        Where regions overlap, a token's value is the mean of its values.
        """
        origin = self.corners.min(axis=0)
        columns, rows = np.rint((self.corners - origin) / self.token_size).astype(int).T
        shape = (rows.max() + 1, columns.max() + 1)
        cells = np.ravel_multi_index((rows, columns), shape)
        counts = np.bincount(cells, minlength=shape[0] * shape[1])
        sums = np.bincount(cells, weights=self.values, minlength=shape[0] * shape[1])
        with np.errstate(invalid="ignore"):
            return (sums / counts).reshape(shape), origin


def read_token_values(file: str | os.PathLike[str], value: str = "prune_scores") -> TokenValues:
    """Numbers per token from a file that `embed` wrote with its dense features.

    Args:
        file: the HDF5 file.
        value: "prune_scores", relative to equal scores of all tokens of a region; "kept" (1 for kept, 0 for removed
            tokens); "norm" of the kept tokens' features; or a .npy file with one number per kept token (in the order
            of `patch_features`) or per tissue token (`token_coords`).

    Raises:
        SlideError: the file holds no tokens, or not these numbers; the message says how to get them.
    """
    h5py = require("h5py")
    with decoding(f"{file} cannot be read as an HDF5 file of `sparsepath embed`"), h5py.File(file, "r") as stored:
        if "token_coords" not in stored:
            raise SlideError(f"{file} holds no tokens: run `sparsepath embed` again with --dense, into a new folder.")
        tissue, kept = _rows(stored, "token_coords"), _rows(stored, "patch_coords")
        corners, values = _values(stored, value, tissue, kept)
        coords = stored["coords"].attrs
        dimensions = (int(coords["level0_width"]), int(coords["level0_height"]))
        corners = corners + np.asarray(coords.get("origin_level0", (0, 0)))  # absent where they are level-0 pixels
        token_size = tuple(stored["token_coords"].attrs["token_size_level0"].tolist())
    return TokenValues(Path(value).stem, corners, values.astype(float), token_size, dimensions)


def _rows(stored: Any, name: str) -> np.ndarray:
    rows = stored[name]
    if not isinstance(rows, require("h5py").Dataset):
        raise SlideError(f"{name} is no dataset in it")
    return rows[:]


def _values(stored: Any, value: str, tissue: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corners and values of the tokens that have one."""
    if value == "kept":
        corners = np.unique(tissue, axis=0)
        known = {tuple(corner) for corner in kept.tolist()}
        return corners, np.array([tuple(corner) in known for corner in corners.tolist()])
    if value == "norm":
        return kept, np.linalg.norm(_rows(stored, "patch_features").astype(np.float32), axis=1)
    if value == "prune_scores":
        if "prune_scores" not in stored:
            raise SlideError("there are no prune scores in the file: the model does not prune (prune_ratio=0).")
        # The scores of a region's tokens share one sum: times their number, regions of all sizes compare.
        counts = _rows(stored, "token_counts")
        return tissue, _rows(stored, "prune_scores") * np.repeat(counts, counts)
    if not value.endswith(".npy"):
        raise SlideError(
            f"value={value!r} is unknown: prune_scores, kept, norm, or a .npy file of one number per token."
        )
    try:
        values = np.load(value, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise SlideError(f"{value} cannot be read as a .npy file: {error}.") from error
    for corners in (kept, tissue):
        if values.shape == (len(corners),):
            return corners, values
    raise SlideError(
        f"{value} holds an array of shape {values.shape}: it takes one number for each of the {len(kept)} kept or the "
        f"{len(tissue)} tissue tokens."
    )


def write_heatmap(
    slide: Slide,
    tokens: TokenValues,
    out: str | os.PathLike[str],
    max_size: int = 2048,
    opacity: float = 0.5,
    classes: int = 5,
) -> list[Path]:
    """Writes `<slide>_<value>.png` and `<slide>_<value>.geojson` into the folder `out`.

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
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    picture, polygons = (folder / f"{slide.name}_{tokens.name}{suffix}" for suffix in (".png", ".geojson"))
    save_image(overlay(slide, tokens, max_size, opacity), picture)
    write_atomically(polygons, json.dumps(to_geojson(tokens, classes, slide.frame[:2])))
    return [picture, polygons]


def overlay(slide: Slide, tokens: TokenValues, max_size: int = 2048, opacity: float = 0.5) -> Image.Image:
    """The slide's overview with the tokens coloured by rank: a few tokens hold most of any attention."""
    overview = Image.fromarray(slide.thumbnail(max_size))
    grid, (left, top) = tokens.grid()
    present = ~np.isnan(grid)
    colors = np.zeros((*grid.shape, 3), dtype=np.uint8)
    colors[present] = _colors(grid[present])
    scale = overview.width / slide.dimensions[0]
    rows, columns = grid.shape
    size = [max(1, round(count * side * scale)) for count, side in zip((columns, rows), tokens.token_size, strict=True)]
    blended = color_overlay(overview, colors, opacity * present, (round(left * scale), round(top * scale), *size))
    figure = Image.new("RGB", (blended.width, blended.height + _TITLE_HEIGHT), "white")
    figure.paste(blended, (0, _TITLE_HEIGHT))
    low, high = grid[present].min(), grid[present].max()
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


def _colors(values: np.ndarray) -> np.ndarray:
    """(N,) values -> (N, 3) uint8 by rank; equal values have equal colours."""
    distinct, order = np.unique(values, return_inverse=True)
    if len(distinct) <= 2:
        return heat_colors(order / max(1, len(distinct) - 1))
    ranks = np.searchsorted(np.sort(values), values, side="left")
    return heat_colors(ranks / max(1, len(values) - 1))
