# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Random batches of token grids, and the attention pattern read word for word from its definition."""

import itertools
import math
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from small_models import random_mask

from sparsepath_vit import TokenGrid


class Batch(NamedTuple):
    """Images of present patch tokens and the pattern's parameters; `present` is None where all are present."""

    sizes: list
    present: torch.Tensor | None
    window_size: int | None
    neighbor_radius: int
    num_global_tokens: int
    num_context_tokens: int = 0

    def grid(self, images=None):
        """The TokenGrid of all images, or of some."""
        images = range(len(self.sizes)) if images is None else images
        return TokenGrid.create(
            [self.sizes[image] for image in images],
            num_global_tokens=self.num_global_tokens,
            window_size=self.window_size,
            neighbor_radius=self.neighbor_radius,
            present=None if self.present is None else self.present[list(images)],
            num_context_tokens=self.num_context_tokens,
        )

    def positions(self, image):
        """(row, column) of the present patch tokens in raster order."""
        rows, columns = self.sizes[image]
        return [
            (row, column)
            for row, column in itertools.product(range(rows), range(columns))
            if self.present is None or self.present[image, row, column]
        ]

    def block(self, row, column):
        return (0, 0) if self.window_size is None else (row // self.window_size, column // self.window_size)


@st.composite
def batches(draw, max_side=7, max_images=3):
    sides = st.integers(1, max_side)
    sizes = draw(st.lists(st.tuples(sides, sides), min_size=1, max_size=max_images))
    if draw(st.booleans()):
        sizes = [sizes[0]] * len(sizes)
    present = None
    if draw(st.booleans()):
        canvas = max(rows for rows, _ in sizes), max(columns for _, columns in sizes)
        share, seed = draw(st.sampled_from([0.2, 0.5, 0.8])), draw(st.integers(0, 99))
        present = random_mask(len(sizes), *canvas, share, seed)
        present[:, 0, 0] |= torch.tensor([not mask[:r, :c].any() for mask, (r, c) in zip(present, sizes, strict=True)])
    return Batch(
        sizes, present, draw(st.sampled_from([None, 1, 2, 3, 4, 5])), draw(st.integers(0, 2)), draw(st.integers(1, 4))
    )


def sees(batch, query, key):
    """Whether a query sees a key of its image; a token is its (row, column), or None for a global token."""
    if query is None or key is None:
        return True
    (query_row, query_column), (key_row, key_column) = batch.block(*query), batch.block(*key)
    near_rows = abs(query_row - key_row) <= batch.neighbor_radius
    return near_rows and abs(query_column - key_column) <= batch.neighbor_radius


def softmax(logits):
    largest = max(logits)
    exponentials = [math.exp(logit - largest) for logit in logits]
    return [exponential / sum(exponentials) for exponential in exponentials]


def raster_tokens(batch, image):
    """The tokens of an image in raster order: None for each global token, then (row, column) of each patch token."""
    return [None] * batch.num_global_tokens + batch.positions(image)


def raster_index_of_packed(batch, grid):
    """For each packed token of the grid, its index among the tokens of all images in raster order."""
    positions = iter(zip(grid.rows.tolist(), grid.columns.tolist(), strict=True))
    indices, start = [], 0
    for image, count in enumerate(grid.counts):
        present = {token: index for index, token in enumerate(batch.positions(image))}
        globals_before = start + batch.num_global_tokens
        indices += range(start, globals_before)
        indices += [globals_before + present[next(positions)] for _ in range(count)]
        start = globals_before + len(present)
    return torch.tensor(indices)


def in_grid_order(states, batch, grid):
    """(heads, M, head_dim) of all images in raster order -> (batch, heads, tokens, head_dim) in the grid's order."""
    heads, _, head_dim = states.shape
    packed = states[:, raster_index_of_packed(batch, grid)]
    return packed.reshape(heads, *grid.batch_shape, head_dim).transpose(0, 1)


def in_raster_order(states, batch, grid):
    """The inverse of `in_grid_order`."""
    heads, head_dim = states.shape[1], states.shape[3]
    packed = states.transpose(0, 1).reshape(heads, -1, head_dim)
    return torch.empty_like(packed).index_copy_(1, raster_index_of_packed(batch, grid), packed)
