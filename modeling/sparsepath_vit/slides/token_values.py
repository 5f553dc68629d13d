# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Numbers per token of a slide, read from what `embed` stored or computed from it, and their colours."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..runtime.figures import heat_colors
from .embedded_slide import EmbeddedSlide
from .errors import SlideError
from .feature_colors import fit_feature_colors
from .similarity import token_similarity

VALUES = "prune_scores, kept, norm, attention, pca, similarity:X,Y, or a .npy file of one number per token"
_PLACE = re.compile(r"similarity:(-?[\d.]+),(-?[\d.]+)")
_COLUMN = re.compile(r"(?P<path>.+\.npy)(?::(?P<column>\d+))?")


@dataclass(frozen=True)
class TokenValues:
    """One number, or one colour, for each of many tokens of a slide.

    Attributes:
        name: what the numbers are.
        corners: (N, 2) x and y of the tokens' top left corners in level-0 pixels.
        values: (N,) float; or (N, 3) red, green and blue in [0, 1].
        token_size: (width, height) of a token in level-0 pixels.
        dimensions: (width, height) of the slide in level-0 pixels.
        limits: the numbers that get the darkest and the brightest colour; by rank where None, since a few tokens hold
            most of any attention.
        unit: of the numbers, in words.
    """

    name: str
    corners: np.ndarray
    values: np.ndarray
    token_size: tuple[float, float]
    dimensions: tuple[int, int]
    limits: tuple[float, float] | None = None
    unit: str = ""

    @property
    def is_colored(self) -> bool:
        """Whether the values are colours."""
        return self.values.ndim == 2

    def grid(self, merged: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(rows, columns) of the values, NaN where there is no token, and the (x, y) of its top left corner.

        Of colours it is (rows, columns, 3). Where regions overlap, a token's value is the mean of its values.

        Args:
            merged: tokens along each side of a cell, whose mean it holds; for slides of more tokens than pixels.
        """
        origin = self.corners.min(axis=0)
        size = np.asarray(self.token_size)
        columns, rows = (np.rint((self.corners - origin) / size).astype(int) // merged).T
        shape = (rows.max() + 1, columns.max() + 1)
        cells = np.ravel_multi_index((rows, columns), shape)
        counts = np.bincount(cells, minlength=shape[0] * shape[1])
        channels = self.values.reshape(len(self.values), -1).T
        sums = np.stack([np.bincount(cells, weights=channel, minlength=len(counts)) for channel in channels], axis=-1)
        with np.errstate(invalid="ignore"):
            means = sums / counts[:, None]
        return means.reshape(*shape, *self.values.shape[1:]), origin

    def colors(self, merged: int = 1) -> "ColoredGrid":
        """The grid and its colours; `merged` is that of `grid`."""
        grid, origin = self.grid(merged)
        present = ~np.isnan(grid if grid.ndim == 2 else grid[..., 0])
        colors = np.zeros((*present.shape, 3), dtype=np.uint8)
        colors[present] = colored(grid[present], self.limits)
        return ColoredGrid(grid, present, colors, (float(origin[0]), float(origin[1])))


class ColoredGrid(NamedTuple):
    """Values on the grid of their tokens, and what is drawn.

    Attributes:
        values: (rows, columns), or (rows, columns, 3), NaN where there is no token.
        present: (rows, columns) bool, where there is one.
        colors: (rows, columns, 3) uint8.
        origin: (x, y) of the top left corner in level-0 pixels.
    """

    values: np.ndarray
    present: np.ndarray
    colors: np.ndarray
    origin: tuple[float, float]


def read_token_values(source: str | os.PathLike[str] | EmbeddedSlide, value: str = "prune_scores") -> TokenValues:
    """Numbers per token from a file that `embed` wrote with its dense features.

    Args:
        source: the HDF5 file, or what was opened from it.
        value: what to show:
            "prune_scores", relative to equal scores of all tokens of a region;
            "kept": 1 for kept, 0 for removed tokens;
            "norm" of the kept tokens' features;
            "attention" of the global tokens to the kept tokens, of files made with `--attention`, relative to equal
            attention: the mean of all global tokens, or "attention:G" of number G alone (0 is CLS, then the register
            tokens), or "attention:G:H" of its head H;
            "pca": the three principal components of the features as colours;
            "similarity:X,Y": cosine similarity to the token at a place, in level-0 pixels as the file counts them;
            or a .npy file with one number per kept token (in the order of `patch_features`) or per tissue token
            (`token_coords`); "FILE.npy:C" takes column C of a table.

    Raises:
        SlideError: the file holds no tokens, or not these numbers; the message says how to get them.
    """
    slide = source if isinstance(source, EmbeddedSlide) else EmbeddedSlide(source)
    if value in ("prune_score", "prune_scores"):
        return _prune_scores(slide)
    if value == "kept":
        return _kept(slide)
    if value == "norm":
        return of_kept(slide, "norm", slide.features.norms())
    if value == "pca":
        return of_kept(slide, "pca", fit_feature_colors([slide]).of(slide))
    if value.partition(":")[0] == "attention":
        return attention_values(slide, *_numbers_of_attention(value))
    if place := _PLACE.fullmatch(value):
        x, y = float(place[1]) + slide.origin[0], float(place[2]) + slide.origin[1]
        query = slide.features.rows(np.array([slide.nearest_token(x, y)]))[0]
        return similarity_values(slide, token_similarity(slide, query), f"similarity_{place[1]}_{place[2]}")
    return _of_file(slide, value)


def of_kept(
    slide: EmbeddedSlide, name: str, values: np.ndarray, limits: tuple[float, float] | None = None, unit: str = ""
) -> TokenValues:
    """(K,) numbers, or (K, 3) colours, of the kept tokens of a slide; see `TokenValues`."""
    return TokenValues(name, slide.kept, values.astype(float), slide.token_size, slide.dimensions, limits, unit)


def similarity_values(slide: EmbeddedSlide, cosines: np.ndarray, name: str = "similarity") -> TokenValues:
    """What `token_similarity` returned, from its lowest percentile to 1."""
    low = min(float(np.percentile(cosines, 1)), 0.99)
    return of_kept(slide, name, cosines, (low, 1.0), "cosine similarity")


def attention_values(slide: EmbeddedSlide, token: int | None = None, head: int | None = None) -> TokenValues:
    """Attention of global tokens to the kept tokens in the last layer, relative to equal attention.

    Args:
        slide: embedded with `--attention`.
        token: number of the global token, 0 for CLS; the mean of all of them where None.
        head: number of the head, where heads were stored; the mean of all of them where None.

    Raises:
        SlideError: no attention was stored, or not of this token or head.
    """
    shape = slide.shape_of("attention")  # (K, global tokens) or (K, global tokens, heads)
    if shape is None:
        raise SlideError(
            f"{slide.path} holds no attention: run `sparsepath embed` again with --dense --attention mean (or heads), "
            "into a new folder."
        )
    name = "attention"
    for number, what, axis in ((token, "global token", 1), (head, "head", 2)):
        sides = shape[axis] if len(shape) > axis else 1
        if number is not None and not 0 <= number < sides:
            raise SlideError(f"{what} {number} is not stored in {slide.path}: it holds {sides}, counted from 0.")
        name += "" if number is None else f"_{what.split()[-1]}_{number}"
    tokens = slice(None) if token is None else slice(token, token + 1)
    heads = slice(None) if head is None else slice(head, head + 1)
    taken = (slice(None), tokens, heads)[: len(shape)]
    means = [block[taken].reshape(len(block), -1).mean(axis=1) for block in slide.blocks("attention")]
    values = _times_tokens(slide, np.concatenate(means), "patch_counts")
    return of_kept(slide, name, values, unit="times equal attention")


def _times_tokens(slide: EmbeddedSlide, values: np.ndarray, counts_name: str) -> np.ndarray:
    """Shares of a region's tokens, which have one sum, times their number: then regions of all sizes compare."""
    counts = (slide.dataset(counts_name) or (np.empty(0, np.int64), {}))[0]
    if counts.dtype.kind not in "iu" or counts.ndim != 1 or (counts < 0).any() or counts.sum() != len(values):
        raise SlideError(
            f"{slide.path} is damaged: {counts_name} do not sum to the {len(values)} values that they are of. Run "
            "`sparsepath embed` again into a new folder."
        )
    return values * np.repeat(counts, counts)


def _numbers_of_attention(value: str) -> list[int]:
    _, *numbers = value.split(":")
    if len(numbers) > 2 or not all(number.isdigit() for number in numbers):
        raise SlideError(
            f"value={value!r} is unknown: attention, attention:TOKEN or attention:TOKEN:HEAD, numbers from 0."
        )
    return [int(number) for number in numbers]


def _prune_scores(slide: EmbeddedSlide) -> TokenValues:
    scores = slide.dataset("prune_scores")
    if scores is None:
        raise SlideError(
            "there are no prune scores in the file: the model does not prune (prune_ratio=0). Choose another value "
            f"({VALUES}), or embed with a prune_ratio."
        )
    values = _times_tokens(slide, scores[0], "token_counts").astype(float)
    unit = "times equal scores"
    return TokenValues("prune_scores", slide.tissue, values, slide.token_size, slide.dimensions, unit=unit)


def _kept(slide: EmbeddedSlide) -> TokenValues:
    corners = np.unique(slide.tissue, axis=0)
    known = {tuple(corner) for corner in slide.kept.tolist()}
    values = np.array([tuple(corner) in known for corner in corners.tolist()], dtype=float)
    return TokenValues("kept", corners, values, slide.token_size, slide.dimensions, (0.0, 1.0), "1 kept, 0 removed")


def read_array(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of a .npy file, read where it is used.

    Raises:
        SlideError: it is missing, or no .npy file of numbers.
    """
    if not Path(path).is_file():
        raise SlideError(f"{path} does not exist: pass a .npy file of numbers, as numpy.save writes it.")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:  # NumPy's words advise to load what may run code
        raise SlideError(f"{path} is no .npy file of numbers: numpy.save writes them.") from error


def _of_file(slide: EmbeddedSlide, value: str) -> TokenValues:
    named = _COLUMN.fullmatch(value)
    if named is None:
        raise SlideError(f"value={value!r} is unknown: {VALUES}.")
    path, column = named["path"], named["column"]
    values = read_array(path)
    if column is not None and values.ndim == 2 and int(column) < values.shape[1]:
        values = values[:, int(column)]
    name = Path(path).stem + ("" if column is None else f"_{column}")
    for corners in (slide.kept, slide.tissue):
        if values.shape == (len(corners),):
            return TokenValues(name, corners, values.astype(float), slide.token_size, slide.dimensions)
    raise SlideError(
        f"{value} holds an array of shape {values.shape}: it takes one number for each of the {len(slide.kept)} kept "
        f"or the {len(slide.tissue)} tissue tokens; FILE.npy:C is column C of a table."
    )


def colored(values: np.ndarray, limits: tuple[float, float] | None) -> np.ndarray:
    """(N,) numbers, or (N, 3) colours in [0, 1] -> (N, 3) uint8; equal numbers have equal colours.

    Args:
        values: the numbers.
        limits: of the darkest and the brightest colour; by rank where None.
    """
    if values.ndim == 2:
        return np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8)
    if limits is not None:
        low, high = limits
        return heat_colors(np.clip((values - low) / max(high - low, 1e-12), 0, 1))
    distinct, order = np.unique(values, return_inverse=True)
    if len(distinct) <= 2:
        return heat_colors(order / max(1, len(distinct) - 1))
    ranks = np.searchsorted(np.sort(values), values, side="left")
    return heat_colors(ranks / max(1, len(values) - 1))


def bar_labels(values: np.ndarray, limits: tuple[float, float] | None, count: int = 5) -> list[float]:
    """What numbers stand at evenly spaced places of the colour bar, from dark to bright."""
    if limits is not None:
        return np.linspace(*limits, count).tolist()
    return np.quantile(values, np.linspace(0, 1, count)).tolist()
