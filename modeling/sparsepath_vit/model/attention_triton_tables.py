# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Which queries and keys each program of the attention kernel works on: tables made from a `TokenGrid` on its device.

A tile is a block, or of a block with more patch tokens than a tile takes a piece: all its queries see the same keys, so
no mask is ever needed between them. The keys are one contiguous run of packed tokens for each of the 2r+1 block rows
around the block, and the global tokens. Pruning leaves blocks of any size: there are wide, medium and narrow tiles, and
a tile is as wide as its piece needs, because slots beyond a piece are computed for nothing.

Nothing here waits for the device: the numbers of tiles are upper bounds computed from host integers, and the tiles
beyond the last one are empty.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .token_grid import TokenGrid, per_image

# Columns of `AttentionTiles.table` before those of the runs.
NUM_TILE_COLUMNS = 3

# Each width is a launch of its own, which takes longer than what it saves where there are few tiles.
LEAST_TILES_FOR_NARROW_ONES = 256


class AttentionTiles(NamedTuple):
    """The tiles of one grid; the tensors are int32.

    Attributes:
        table: (tiles, 3 + 2 * (2r+1)), wide tiles first, with the columns: first packed token, end, first packed token
            of the image, which is its first global token; then of each run its first packed token and its length.
        image_offsets: (batch + 1,) packed index of each image's first global token, and the end of the last image.
        num_global_tokens: G.
        neighbor_radius: r.
        tile_size: most patch tokens of a wide tile; medium ones take half, narrow ones a quarter of it.
        num_wide: how many tiles of the table are wide.
        num_medium: how many are medium.
        num_narrow: how many are narrow.
    """

    table: torch.Tensor
    image_offsets: torch.Tensor
    num_global_tokens: int
    neighbor_radius: int
    tile_size: int
    num_wide: int
    num_medium: int
    num_narrow: int

    def widths(self) -> list[tuple[int, int, int]]:
        """(patch tokens a tile takes, first tile, tiles) of each width that there are tiles of."""
        counts = (self.num_wide, self.num_medium, self.num_narrow)
        firsts = (0, self.num_wide, self.num_wide + self.num_medium)
        sizes = tile_sizes(self.tile_size)
        return [width for width in zip(sizes, firsts, counts, strict=True) if width[2] > 0]


def attention_tile_size(window_size: int | None) -> int:
    """Most patch tokens of a tile: larger where blocks are, because each of its keys is then read less often."""
    return 128 if window_size is None or window_size >= 16 else 64


def tile_sizes(tile_size: int) -> tuple[int, int, int]:
    """Most patch tokens of a wide, of a medium and of a narrow tile."""
    return tile_size, tile_size // 2, tile_size // 4


def attention_tiles(grid: TokenGrid) -> AttentionTiles:
    """The tiles of a grid, which all layers share."""
    tile_size = attention_tile_size(grid.window_size)
    counts = _most_tiles(grid, tile_size)
    image_offsets = _starts([count + grid.num_global_tokens for count in grid.counts], grid.device)
    return AttentionTiles(
        _sorted_by_size(_pieces(grid, image_offsets, tile_size), tile_sizes(tile_size), counts).to(torch.int32),
        image_offsets.to(torch.int32),
        grid.num_global_tokens,
        grid.neighbor_radius,
        tile_size,
        *counts,
    )


def _pieces(grid: TokenGrid, image_offsets: torch.Tensor, tile_size: int) -> torch.Tensor:
    """(pieces, columns of the table): each entry of `TokenGrid.block_offsets` in as many pieces as a block may have.

    Some are empty: of blocks with fewer tokens, and of the entries that end a block row and are no block.
    """
    entry = torch.arange(len(grid.block_offsets), device=grid.device)
    image = grid.entry_shifts // grid.num_global_tokens - 1
    num_rows = per_image([rows for rows, _ in grid.block_counts], grid.device)[image]
    num_columns = per_image([columns for _, columns in grid.block_counts], grid.device)[image]
    place = entry - _starts([rows * (columns + 1) for rows, columns in grid.block_counts], grid.device)[image]
    row, column = place // (num_columns + 1), place % (num_columns + 1)
    runs = _near_runs(grid, entry, row, column, num_rows, num_columns)
    start = grid.block_offsets
    end = torch.where(column < num_columns, start[torch.minimum(entry + 1, entry[-1])], start)
    first = torch.arange(_pieces_of_a_block(grid, tile_size), device=grid.device) * tile_size
    start = torch.minimum(start[:, None] + first, end[:, None])  # (entries, pieces)
    end = torch.minimum(start + tile_size, end[:, None])
    keys = torch.cat([image_offsets[image][:, None], runs], dim=1)[:, None].expand(-1, len(first), -1)
    return torch.cat([start[..., None], end[..., None], keys], dim=2).flatten(0, 1)


def _near_runs(
    grid: TokenGrid,
    entry: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    num_rows: torch.Tensor,
    num_columns: torch.Tensor,
) -> torch.Tensor:
    """(entries, 2 * (2r+1)): the first packed token and the length of each run of an entry's neighbourhood."""
    radius = grid.neighbor_radius
    step = torch.arange(-radius, radius + 1, device=grid.device)
    near_row = row[:, None] + step  # (entries, runs)
    is_row = (near_row >= 0) & (near_row < num_rows[:, None])
    row_entry = torch.where(is_row, (entry - column)[:, None] + step * (num_columns + 1)[:, None], 0)
    left = (column - radius).clamp(min=0)
    right = torch.minimum(column + radius + 1, num_columns)
    start = grid.block_offsets[row_entry + left[:, None]]
    length = torch.where(is_row, grid.block_offsets[row_entry + right[:, None]] - start, 0)
    return torch.stack((start, length), dim=2).flatten(1)


def _sorted_by_size(pieces: torch.Tensor, sizes: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """The pieces that hold tokens, those of wide tiles first; `counts[i]` rows for the tiles of `sizes[i]` tokens."""
    used = [size for size, count in zip(sizes, counts, strict=True) if count > 0]
    firsts = per_image(list(itertools.accumulate([count for count in counts if count > 0], initial=0)), pieces.device)
    num_tokens = pieces[:, 1] - pieces[:, 0]
    width = torch.zeros_like(num_tokens)
    for size in used[1:]:
        width = width + (num_tokens <= size)
    is_filled = num_tokens > 0
    is_of_width = (width == torch.arange(len(used), device=pieces.device)[:, None]) & is_filled  # (widths, pieces)
    rank = is_of_width.cumsum(dim=1).gather(0, width[None])[0] - 1
    # Places beyond the last tile for pieces without a token, each its own, so that no two are written to one place.
    beyond = sum(counts) + torch.arange(len(pieces), device=pieces.device)
    place = torch.where(is_filled, firsts[width] + rank, beyond)
    table = pieces.new_zeros((sum(counts) + len(pieces), pieces.shape[1]))
    return table.index_copy(0, place, pieces)[: sum(counts)]


def _most_tiles(grid: TokenGrid, tile_size: int) -> tuple[int, ...]:
    """Upper bounds of the numbers of wide, medium and narrow tiles; the numbers where every patch token is present.

    A width with few tiles is not used: they join those that are wider.
    """
    pieces, num_present = _piece_sizes(grid, tile_size), sum(grid.counts)
    is_full = num_present == sum(rows * columns for rows, columns in grid.grid_sizes)

    def most(least: int, size: int) -> int:
        """How many pieces can hold more than `least` and at most `size` tokens."""
        count = sum(count for tokens, count in pieces.items() if tokens > least and (tokens <= size or not is_full))
        return min(count, num_present // (least + 1))

    # Of the window, not of the image: else a small image would have the kernel compiled anew.
    largest = tile_size if grid.window_size is None else min(grid.window_size**2, tile_size)
    counts, least = dict.fromkeys(tile_sizes(tile_size), 0), 0
    for size in reversed(tile_sizes(tile_size)):
        if size >= largest or most(least, size) >= LEAST_TILES_FOR_NARROW_ONES:
            counts[size] = most(least, size)
            least = size
    return tuple(counts.values())


def _piece_sizes(grid: TokenGrid, tile_size: int) -> Counter[int]:
    """How many pieces of how many tokens the blocks of the full grid are cut into."""
    pieces: Counter[int] = Counter()
    for rows, columns in grid.grid_sizes:
        window = max(rows, columns) if grid.window_size is None else grid.window_size
        heights, widths = ([(window, side // window), (side % window, 1)] for side in (rows, columns))
        for (height, num_high), (width, num_broad) in itertools.product(heights, widths):
            whole, rest = divmod(height * width, tile_size)
            pieces[tile_size] += num_high * num_broad * whole
            pieces[rest] += num_high * num_broad
    return Counter({size: count for size, count in pieces.items() if size > 0 and count > 0})


def _pieces_of_a_block(grid: TokenGrid, tile_size: int) -> int:
    """Most pieces that a block is cut into."""
    most = 0
    for (rows, columns), count in zip(grid.grid_sizes, grid.counts, strict=True):
        window = max(rows, columns) if grid.window_size is None else grid.window_size
        most = max(most, min(count, min(window, rows) * min(window, columns)))
    return -(-most // tile_size)


def _starts(sizes: Sequence[int], device: torch.device) -> torch.Tensor:
    """(n + 1,) where each of n consecutive pieces starts, and where the last one ends.

    Added up on the host: inductor of torch 2.11 fails on the cumulative sum of a tensor filled with a symbolic number.
    """
    if all(size == sizes[0] for size in sizes):
        return torch.arange(len(sizes) + 1, device=device) * sizes[0]
    return per_image(list(itertools.accumulate(sizes, initial=0)), device)
