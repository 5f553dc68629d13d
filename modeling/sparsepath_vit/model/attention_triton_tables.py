# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Which queries and keys each program of the attention kernel works on: tables made from a `TokenGrid` on its device.

A tile is a run of consecutive patch tokens of one block row. Its neighbourhood is one contiguous run of packed tokens
for each of the 2r+1 block rows around it. The kernel walks through these runs as if they lay one after the other:
position p of the neighbourhood is packed token p + shift, and the shift changes where one run ends and the next begins.

Nothing here waits for the device: the number of tiles is an upper bound computed from host integers, and the tiles
beyond the last one are empty.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .token_grid import TokenGrid, per_image

# Columns of `AttentionTiles.table` before those of the runs.
NUM_TILE_COLUMNS = 5


class AttentionTiles(NamedTuple):
    """The tiles of one grid; the tensors are int32.

    Attributes:
        table: (tiles, 5 + 2 * (2r+1)) with the columns: first packed token, end, first packed token of the image,
            global tokens that precede the image's patch tokens, 1 where the tile lies in one block; then of each run
            its end among the positions of the neighbourhood, and the shift from position to packed token.
        block_columns: (T,) block column of each patch token.
        image_offsets: (batch + 1,) packed index of each image's first global token, and the end of the last image.
        tile_size: most patch tokens of a tile.
        num_global_tokens: G.
        neighbor_radius: r.
    """

    table: torch.Tensor
    block_columns: torch.Tensor
    image_offsets: torch.Tensor
    tile_size: int
    num_global_tokens: int
    neighbor_radius: int


def attention_tile_size(window_size: int | None) -> int:
    """Most patch tokens of a tile: where blocks are large, tiles of one block can be larger too."""
    return 128 if window_size is None or window_size >= 16 else 64


def attention_tiles(grid: TokenGrid) -> AttentionTiles:
    """The tiles of a grid, which all layers share."""
    tile_size = attention_tile_size(grid.window_size)
    image_offsets = _starts([count + grid.num_global_tokens for count in grid.counts], grid.device)
    rows = _block_rows(grid)
    # One element per tile; those beyond the last tile are made of the last block row, and empty.
    num_tiles = -((rows.start - rows.end) // tile_size)
    end_tiles = num_tiles.cumsum(dim=0)
    tile = torch.arange(_most_tiles(grid, tile_size), device=grid.device)
    row = torch.searchsorted(end_tiles, tile, right=True).clamp(max=len(rows.image) - 1)
    rows = _BlockRows(*(of_row[row] for of_row in rows))
    start = torch.minimum(rows.start + (tile - (end_tiles - num_tiles)[row]) * tile_size, rows.end)
    end = torch.minimum(start + tile_size, rows.end)
    num_globals_before = grid.num_global_tokens * (rows.image + 1)
    last_patch = len(grid.blocks) - 1
    first_column = (grid.blocks[(start - num_globals_before).clamp(max=last_patch)] - rows.entry).clamp(min=0)
    last_column = (grid.blocks[(end - 1 - num_globals_before).clamp(min=0)] - rows.entry).clamp(min=0)
    header = (start, end, image_offsets[rows.image], num_globals_before, first_column == last_column)
    runs = _near_runs(grid, rows, first_column, last_column, start < end)
    window = max(grid.canvas_size) if grid.window_size is None else grid.window_size
    return AttentionTiles(
        torch.cat([torch.stack(header, dim=1), runs], dim=1).to(torch.int32),
        (grid.columns // window).to(torch.int32),
        image_offsets.to(torch.int32),
        tile_size,
        grid.num_global_tokens,
        grid.neighbor_radius,
    )


class _BlockRows(NamedTuple):
    """Block rows of the batch, one element each, or the block row of each tile.

    Attributes:
        image: which image it is of.
        row: its number in the image.
        last_row: the number of the image's last block row.
        last_column: the number of the image's last block column.
        entry: where its blocks begin among `TokenGrid.block_offsets`.
        start: its first packed token.
        end: the end of its packed tokens.
    """

    image: torch.Tensor
    row: torch.Tensor
    last_row: torch.Tensor
    last_column: torch.Tensor
    entry: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor


def _block_rows(grid: TokenGrid) -> _BlockRows:
    num_rows = per_image([rows for rows, _ in grid.block_counts], grid.device)
    num_columns = per_image([columns for _, columns in grid.block_counts], grid.device)
    row = torch.arange(sum(rows for rows, _ in grid.block_counts), device=grid.device)
    first_rows = _starts([rows for rows, _ in grid.block_counts], grid.device)
    # A sum, not a slice of the starts, because inductor takes no slice to search in.
    image = torch.searchsorted(first_rows[:-1] + num_rows, row, right=True)
    row = row - first_rows[image]
    first_entries = _starts([rows * (columns + 1) for rows, columns in grid.block_counts], grid.device)
    entry = first_entries[image] + row * (num_columns[image] + 1)
    start, end = grid.block_offsets[entry], grid.block_offsets[entry + num_columns[image]]
    return _BlockRows(image, row, num_rows[image] - 1, num_columns[image] - 1, entry, start, end)


def _near_runs(
    grid: TokenGrid,
    rows: _BlockRows,
    first_column: torch.Tensor,
    last_column: torch.Tensor,
    is_filled: torch.Tensor,
) -> torch.Tensor:
    """(tiles, 2 * (2r+1)): where each run ends among the positions of the neighbourhood, and its shift."""
    radius = grid.neighbor_radius
    step = torch.arange(-radius, radius + 1, device=grid.device)
    left = (first_column - radius).clamp(min=0)
    right = torch.minimum(last_column + radius, rows.last_column)
    near_row = rows.row[:, None] + step  # (tiles, runs)
    is_row = (near_row >= 0) & (near_row <= rows.last_row[:, None]) & is_filled[:, None]
    near_entry = rows.entry[:, None] + step * (rows.last_column + 2)[:, None]
    near_entry = torch.where(is_row, near_entry, rows.entry[:, None])
    run_start = grid.block_offsets[near_entry + left[:, None]]
    run_end = grid.block_offsets[near_entry + right[:, None] + 1]
    position_end = torch.where(is_row, run_end - run_start, 0).cumsum(dim=1)
    shift = run_end - position_end
    return torch.stack((position_end, shift), dim=2).flatten(1)


def _most_tiles(grid: TokenGrid, tile_size: int) -> int:
    """Upper bound of the number of tiles; reached where every patch token is present."""
    most = total_block_rows = 0
    for (rows, columns), (block_rows, _) in zip(grid.grid_sizes, grid.block_counts, strict=True):
        window = max(rows, columns) if grid.window_size is None else grid.window_size
        full_rows, last_rows = rows // window, rows % window
        most += full_rows * -(-window * columns // tile_size) - (-last_rows * columns // tile_size)
        total_block_rows += block_rows
    return min(most, (sum(grid.counts) + total_block_rows * (tile_size - 1)) // tile_size)


def _starts(sizes: Sequence[int], device: torch.device) -> torch.Tensor:
    """(n + 1,) where each of n consecutive pieces starts, and where the last one ends.

    Added up on the host: inductor of torch 2.11 fails on the cumulative sum of a tensor filled with a symbolic number.
    """
    if all(size == sizes[0] for size in sizes):
        return torch.arange(len(sizes) + 1, device=device) * sizes[0]
    return per_image(list(itertools.accumulate(sizes, initial=0)), device)
