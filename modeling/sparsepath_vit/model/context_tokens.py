# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Context tokens: what a layer's queries see of their image beyond their neighbourhood.

The few patch tokens that CLS and the mean query attend to most in the layer are *exact*: each stands for itself. All
others are seen as a sample, of each cell of the grid one token that stands for the cell's total weight without the
exact ones. A single token can hold nearly all of a head's attention, and a sample that misses it computes another head;
what is left is spread over many, and sampled well. Each layer draws anew, so that errors of layers do not add up in one
direction.
"""

import math
from typing import NamedTuple

import torch

from .stratified_sampling import CONTEXT_SEED, draw_from_cells
from .token_grid import TokenGrid

# One less than 64: of 1,024 context tokens it leaves 961 = 31 x 31 cells, which at 3430 px and patch 14 are of 8 x 8
# tokens. With half as many exact tokens one image of four lost 0.001 of its CLS cosine to dense, 0.06 of that of its
# patch tokens (docs/evidence.md).
MOST_EXACT_TOKENS = 63


class ContextTokens(NamedTuple):
    """The context tokens of one layer, image after image.

    Each image has an entry for each cell, then one for each exact token: numbers known without waiting for a device.
    A cell without a token to draw has an entry of weight 0.

    Attributes:
        tokens: (entries,) int64 packed token indices; the first of the batch where there is no token.
        weights: (entries,) int64, how many patch tokens each stands for.
        block_rows: (entries,) int64, the block row it lies in.
        block_columns: (entries,) int64, the block column it lies in.
        counts: entries of each image, host integers.
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    block_rows: torch.Tensor
    block_columns: torch.Tensor
    counts: tuple[int, ...]


def num_exact_tokens(grid: TokenGrid) -> tuple[int, ...]:
    """How many exact tokens each image has; none where there is a context token for every patch token anyway."""
    most = min(MOST_EXACT_TOKENS, grid.num_context_tokens // 2)
    return tuple(
        0 if math.prod(size) <= grid.num_context_tokens else min(most, count)
        for size, count in zip(grid.grid_sizes, grid.counts, strict=True)
    )


def exact_tokens(scores: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """The exact tokens of all images: those with the highest scores, of equal ones the first in the grid's order.

    Args:
        scores: (T,) attention probability from CLS and the mean query, mean over both and over heads.
        grid: where the tokens are.

    Returns:
        (sum of `num_exact_tokens`,) int64 indices into the T patch tokens, image after image.
    """
    chosen, start = [], 0
    for of_image, number in zip(scores.split(grid.counts), num_exact_tokens(grid), strict=True):
        chosen.append(start + of_image.sort(descending=True, stable=True).indices[:number])
        start += len(of_image)
    return torch.cat(chosen)


def draw_context_tokens(grid: TokenGrid, exact: torch.Tensor | None = None, draw: int = 0) -> ContextTokens:
    """The context tokens of a layer.

    Args:
        grid: where the tokens are; it says how many context tokens there are at most.
        exact: what `exact_tokens` returned; `None` draws from all tokens.
        draw: number of the draw; each layer has its own. The draw is a fixed function of this and of a token's place.
    """
    numbers = [
        grid.num_context_tokens - (min(MOST_EXACT_TOKENS, grid.num_context_tokens // 2) if number else 0)
        for number in num_exact_tokens(grid)
    ]
    cells, num_cells = grid.cells(numbers)
    own_weights = torch.ones_like(cells) if grid.weights is None else grid.weights
    weights = own_weights if exact is None else own_weights.index_fill(0, exact, 0)
    drawn = draw_from_cells(cells, sum(num_cells), grid.rows, grid.columns, weights, seed=CONTEXT_SEED, draw=draw)
    tokens, weights, counts = drawn.tokens, drawn.weights, num_cells
    if exact is not None:
        num_exact = num_exact_tokens(grid)
        parts = zip(tokens.split(num_cells), exact.split(num_exact), strict=True)
        tokens = torch.cat([part for image in parts for part in image])
        parts = zip(weights.split(num_cells), own_weights[exact].split(num_exact), strict=True)
        weights = torch.cat([part for image in parts for part in image])
        counts = tuple(map(sum, zip(num_cells, num_exact, strict=True)))

    def of_entries(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, values.new_zeros(1)])[tokens]  # the place after the last is of cells without a token

    window = max(grid.canvas_size) if grid.window_size is None else grid.window_size
    places = (of_entries(places // window) for places in (grid.rows, grid.columns))
    return ContextTokens(of_entries(grid.patch_indices()), weights, *places, counts)
