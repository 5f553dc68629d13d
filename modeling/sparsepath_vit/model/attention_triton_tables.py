# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Which queries and keys each program of the attention kernel works on: tables made from a `TokenGrid` on its device.

A tile is a run of consecutive patch tokens of one block row. Its neighbourhood is one contiguous run of packed tokens
for each of the 2r+1 block rows around it. The kernel walks through these runs as if they lay one after the other:
position p of the neighbourhood is packed token p + shift, and the shift changes where one run ends and the next begins.

Nothing here waits for the device: the number of tiles is an upper bound computed from host integers, and the tiles
beyond the last one are empty.
"""

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


def check_states(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: TokenGrid, scale: float | None
) -> float:
    """Raises a ValueError where states do not fit each other or the grid; returns the scale to use.

    Args:
        query, key, value: (batch, heads, tokens, head_dim).
        grid: where the tokens are.
        scale: factor on the logits, head_dim ** -0.5 by default.
    """
    if query.ndim != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}: it takes (batch, heads, tokens, head_dim).")
    for name, states in (("key", key), ("value", value)):
        if states.shape != query.shape:
            raise ValueError(f"{name} has shape {tuple(states.shape)}: it takes the query's, {tuple(query.shape)}.")
        if states.dtype != query.dtype:
            raise ValueError(f"{name} is {states.dtype}: it takes the query's dtype, {query.dtype}.")
        if states.device != query.device:
            raise ValueError(f"{name} is on {states.device}: it takes the query's device, {query.device}.")
    for name, states in (("query", query), ("key", key), ("value", value)):
        if states.stride(-1) != 1:
            raise ValueError(
                f"{name} has strides {states.stride()}: its last dimension, head_dim, must be contiguous (stride 1). "
                "Call .contiguous() on it."
            )
    if not query.is_floating_point():
        raise ValueError(f"query is {query.dtype}: it takes a floating point dtype.")
    if grid.device != query.device:
        raise ValueError(f"grid is on {grid.device}: it takes the query's device, {query.device}.")
    if (query.shape[0], query.shape[2]) != grid.batch_shape:
        raise ValueError(
            f"grid describes (batch, tokens) = {grid.batch_shape}, but query has shape {tuple(query.shape)}, that is "
            f"{(query.shape[0], query.shape[2])}: pass the grid these tokens were made with."
        )
    if len(grid.rows) != sum(grid.counts):
        raise ValueError(
            f"grid has {len(grid.rows)} patch tokens, but its counts {grid.counts} add up to {sum(grid.counts)}: pass "
            "TokenGrid.select the counts of the tokens it keeps."
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0.0:
        raise ValueError(f"scale={scale!r} is not possible: it takes a positive number.")
    return scale


def attention_tile_size(window_size: int | None) -> int:
    """Most patch tokens of a tile: where blocks are large, tiles of one block can be larger too."""
    return 128 if window_size is None or window_size >= 16 else 64


def attention_tiles(grid: TokenGrid) -> AttentionTiles:
    """The tiles of a grid; made on the first call and kept with the grid, since all layers use the same."""
    kept = vars(grid)
    if "_attention_tiles" not in kept:
        kept["_attention_tiles"] = _make_tiles(grid)
    return kept["_attention_tiles"]


def _make_tiles(grid: TokenGrid) -> AttentionTiles:
    device, radius, tile_size = grid.device, grid.neighbor_radius, attention_tile_size(grid.window_size)
    num_block_rows = per_image([rows for rows, _ in grid.block_counts], device)
    num_block_columns = per_image([columns for _, columns in grid.block_counts], device)
    image_offsets = _starts(per_image(grid.counts, device) + grid.num_global_tokens)

    # One element per block row of the batch.
    total_block_rows = sum(rows for rows, _ in grid.block_counts)
    block_row = torch.arange(total_block_rows, device=device)
    first_block_rows = _starts(num_block_rows)
    image = torch.searchsorted(first_block_rows[1:], block_row, right=True)
    block_row = block_row - first_block_rows[image]
    entry = _starts(num_block_rows * (num_block_columns + 1))[image] + block_row * (num_block_columns[image] + 1)
    row_end = grid.block_offsets[entry + num_block_columns[image]]
    first_tiles = _starts(-((grid.block_offsets[entry] - row_end) // tile_size))

    # One element per tile; those beyond the last tile are made of the last block row, and empty.
    tile = torch.arange(_most_tiles(grid, tile_size), device=device)
    row = torch.searchsorted(first_tiles[1:], tile, right=True).clamp(max=total_block_rows - 1)
    image, block_row, entry, row_end = image[row], block_row[row], entry[row], row_end[row]
    start = grid.block_offsets[entry] + (tile - first_tiles[row]) * tile_size
    start = torch.minimum(start, row_end)
    end = torch.minimum(start + tile_size, row_end)
    num_globals_before = grid.num_global_tokens * (image + 1)
    last_patch = len(grid.blocks) - 1
    first_column = (grid.blocks[(start - num_globals_before).clamp(max=last_patch)] - entry).clamp(min=0)
    last_column = (grid.blocks[(end - 1 - num_globals_before).clamp(min=0)] - entry).clamp(min=0)
    header = (start, end, image_offsets[image], num_globals_before, first_column == last_column)

    # One element per tile and block row of its neighbourhood.
    step = torch.arange(-radius, radius + 1, device=device)
    last_block_row, last_block_column = num_block_rows[image] - 1, num_block_columns[image] - 1
    left = (first_column - radius).clamp(min=0)
    right = torch.minimum(last_column + radius, last_block_column)
    near_row = block_row[:, None] + step
    is_row = (near_row >= 0) & (near_row <= last_block_row[:, None]) & (start < end)[:, None]
    near_entry = torch.where(is_row, entry[:, None] + step * (last_block_column + 2)[:, None], entry[:, None])
    run_start = grid.block_offsets[near_entry + left[:, None]]
    run_end = grid.block_offsets[near_entry + right[:, None] + 1]
    position_end = torch.where(is_row, run_end - run_start, 0).cumsum(dim=1)
    shift = run_end - position_end
    table = torch.cat([torch.stack(header, dim=1), torch.stack((position_end, shift), dim=2).flatten(1)], dim=1)
    window = max(grid.canvas_size) if grid.window_size is None else grid.window_size
    return AttentionTiles(
        table.to(torch.int32),
        (grid.columns // window).to(torch.int32),
        image_offsets.to(torch.int32),
        tile_size,
        grid.num_global_tokens,
        radius,
    )


def _most_tiles(grid: TokenGrid, tile_size: int) -> int:
    """Upper bound of the number of tiles; reached where every patch token is present."""
    most = total_block_rows = 0
    for (rows, columns), (block_rows, _) in zip(grid.grid_sizes, grid.block_counts, strict=True):
        window = max(rows, columns) if grid.window_size is None else grid.window_size
        full_rows, last_rows = rows // window, rows % window
        most += full_rows * -(-window * columns // tile_size) - (-last_rows * columns // tile_size)
        total_block_rows += block_rows
    return min(most, (sum(grid.counts) + total_block_rows * (tile_size - 1)) // tile_size)


def _starts(sizes: torch.Tensor) -> torch.Tensor:
    """(n + 1,) where each of n consecutive pieces starts, and where the last one ends."""
    return torch.nn.functional.pad(sizes.cumsum(dim=0), (1, 0))
