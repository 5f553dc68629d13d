# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`TokenStrip`: consecutive block rows of one image, the unit in which a layer works at inference.

A strip's own patch tokens are queries. Their keys are the global tokens, the own patch tokens and those of the
`neighbor_radius` block rows above and below. So a strip is a grid of the same image in which only these are present,
and in which some are asked and the others only answer. Everything that reads a `TokenGrid` reads a strip.

    packed tokens of a strip: [ globals | rows above | own rows | rows below ]
    its queries:              [ globals | own rows ]

The global tokens attend to all patch tokens, a strip at a time: in each strip to its own patch tokens, in the first
also to themselves. Over all strips of an image that is every key once.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .token_grid import TokenGrid


class StripRange(NamedTuple):
    """Which patch tokens of an image a strip holds; (start, end) among the image's patch tokens.

    Attributes:
        own: those that are queries.
        around: those whose keys they need, the own ones among them.
        token_rows: how many token rows hold the own ones at most.
    """

    own: tuple[int, int]
    around: tuple[int, int]
    token_rows: int


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStrip(TokenGrid):
    """One strip of one image, as a grid of its own. S is the number of its own patch tokens.

    Attributes:
        own: (start, end) packed indices of the own patch tokens; both are known on the host.
        image_start: packed index of the image's first global token in the batch.
        packed_shift: by how much the packed index of a patch token in the batch exceeds that in the strip.
        is_first: whether it is the image's first strip, in which the global tokens see themselves.
        num_token_rows: how many token rows hold the own patch tokens at most.
        sees_context: whether its image has context tokens, which lie all over it and are no part of a strip.
    """

    own: tuple[int, int] = (0, 0)
    image_start: int = 0
    packed_shift: int = 0
    is_first: bool = False
    num_token_rows: int = 0
    sees_context: bool = False

    @property
    def num_queries(self) -> int:
        """G + S: the global tokens and the own patch tokens."""
        return self.num_global_tokens + self.own[1] - self.own[0]

    @property
    def own_in_batch(self) -> tuple[int, int]:
        """(start, end) packed indices of the own patch tokens in the batch."""
        return self.own[0] + self.packed_shift, self.own[1] + self.packed_shift

    @property
    def around_in_batch(self) -> tuple[int, int]:
        """(start, end) packed indices in the batch of all patch tokens of the strip."""
        return self.num_global_tokens + self.packed_shift, self.num_tokens + self.packed_shift

    @property
    def global_keys(self) -> tuple[int, int]:
        """(start, end) packed indices of the keys that the global tokens see in this strip."""
        return 0 if self.is_first else self.own[0], self.own[1]

    @property
    def query_shift(self) -> int:
        """By how much the packed index of an own patch token exceeds its place among the queries."""
        return self.own[0] - self.num_global_tokens

    def query_indices(self) -> torch.Tensor:
        """(G + S,) int64, packed indices of the queries."""
        own = torch.arange(*self.own, device=self.device)
        return torch.cat([torch.arange(self.num_global_tokens, device=self.device), own])


def strip_ranges(grid: TokenGrid, image: int, most_tokens: int) -> list[StripRange]:
    """Cuts an image into strips of at most `most_tokens` own patch tokens, or of one block row where that has more.

    Where a strip ends has to be known on the host. On the CPU, and where all patch tokens are present, it is. What
    pruning left on another device is cut anywhere instead, since asking where its block rows end would stall the
    device: a strip then has as many tokens as it may, and so many around it that the block rows are among them.

    Args:
        grid: where the tokens are.
        image: which image.
        most_tokens: at least 1.
    """
    count, (rows, columns) = grid.counts[image], grid.grid_sizes[image]
    ends = block_row_ends(grid, image)
    if ends is None:
        reach = (grid.neighbor_radius + 1) * grid.windows[image] * columns
        starts = range(0, count, most_tokens)
        owns = [(start, min(start + most_tokens, count)) for start in starts]
        return [StripRange(own, (max(0, own[0] - reach), min(count, own[1] + reach)), rows) for own in owns]
    return strip_ranges_of_rows(grid, image, ends, (0, len(ends) - 1), most_tokens)


def strip_ranges_of_rows(
    grid: TokenGrid, image: int, row_ends: Sequence[int], block_rows: tuple[int, int], most_tokens: int
) -> list[StripRange]:
    """Likewise, of some block rows of an image.

    Args:
        grid: where the tokens are.
        image: which image.
        row_ends: (block rows + 1) patch tokens of the image before each block row, and all.
        block_rows: (start, end) of those that are cut.
        most_tokens: at least 1.
    """
    rows, radius, window = grid.grid_sizes[image][0], grid.neighbor_radius, grid.windows[image]
    ranges, (first, end) = [], block_rows
    for last in range(first + 1, end + 1):
        # A strip is closed before the block row that would make it too large.
        if row_ends[last] > row_ends[first] and (last == end or row_ends[last + 1] - row_ends[first] > most_tokens):
            above, below = max(0, first - radius), min(len(row_ends) - 1, last + radius)
            token_rows = min(rows, last * window) - first * window
            own, around = (row_ends[first], row_ends[last]), (row_ends[above], row_ends[below])
            ranges.append(StripRange(own, around, token_rows))
            first = last
    return ranges


def token_strip(grid: TokenGrid, image: int, strip: StripRange) -> TokenStrip:
    """A strip of an image, as a grid.

    Args:
        grid: of the batch.
        image: which image.
        strip: one of its `strip_ranges`.
    """
    num_globals, (start, end) = grid.num_global_tokens, strip.around
    first_token = sum(grid.counts[:image]) + start  # among the patch tokens of the batch
    tokens = slice(first_token, first_token + end - start)
    entries = [rows * (columns + 1) for rows, columns in grid.block_counts]
    first_entry = sum(entries[:image])
    offsets = grid.block_offsets[first_entry : first_entry + entries[image]]
    first_packed = grid.image_offsets[image] + num_globals + start
    return TokenStrip(
        grid_sizes=(grid.grid_sizes[image],),
        counts=(end - start,),
        num_global_tokens=num_globals,
        window_size=grid.window_size,
        neighbor_radius=grid.neighbor_radius,
        rows=grid.rows[tokens],
        columns=grid.columns[tokens],
        blocks=grid.blocks[tokens] - first_entry,
        # Blocks beyond the strip are empty.
        block_offsets=(offsets - first_packed).clamp(0, end - start) + num_globals,
        entry_shifts=torch.full_like(offsets, num_globals),
        weights=None if grid.weights is None else grid.weights[tokens],
        own=(strip.own[0] - start + num_globals, strip.own[1] - start + num_globals),
        image_start=grid.image_offsets[image],
        packed_shift=first_packed - num_globals,
        is_first=strip.own[0] == 0,
        num_token_rows=strip.token_rows,
        sees_context=grid.has_context,
    )


def strips_of(grid: TokenGrid, most_tokens: int) -> list[list[TokenStrip]]:
    """The strips of each image, cut once and kept with the grid, for all layers.

    Args:
        grid: where the tokens are.
        most_tokens: see `strip_ranges`.
    """
    name = f"strips of {most_tokens} tokens"
    if name not in grid.prepared:
        grid.prepared[name] = [
            [token_strip(grid, image, strip) for strip in strip_ranges(grid, image, most_tokens)]
            for image in range(grid.batch_size)
        ]
    return grid.prepared[name]


def block_row_ends(grid: TokenGrid, image: int) -> list[int] | None:
    """(block rows + 1) patch tokens of an image before each block row, and all; `None` where only the device knows."""
    rows, columns = grid.grid_sizes[image]
    if grid.counts[image] < rows * columns and grid.device.type != "cpu":
        return None
    return known_block_row_ends(grid, image)


def known_block_row_ends(grid: TokenGrid, image: int) -> list[int]:
    """Likewise, where the host may wait for the device."""
    (rows, columns), count, window = grid.grid_sizes[image], grid.counts[image], grid.windows[image]
    if count == rows * columns:
        return [columns * min(row, rows) for row in range(0, rows + window, window)]
    entries = [block_rows * (block_columns + 1) for block_rows, block_columns in grid.block_counts]
    first = sum(entries[:image])
    starts = grid.block_offsets[first : first + entries[image] : grid.block_counts[image][1] + 1]
    first_packed = grid.image_offsets[image] + grid.num_global_tokens
    return [*(starts - first_packed).tolist(), count]
