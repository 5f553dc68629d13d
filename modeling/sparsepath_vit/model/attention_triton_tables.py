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
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .attention_triton_context_tables import ContextTables, context_tables
from .token_grid import TokenGrid, per_image
from .token_strips import TokenStrip

# Columns of `AttentionTiles.table` before those of the runs.
NUM_TILE_COLUMNS = 3

# Each width is a launch of its own, which takes longer than what it saves where there are few tiles.
LEAST_TILES_FOR_NARROW_ONES = 256


class AttentionTiles(NamedTuple):
    """The tiles of one grid; the tensors are int32.

    Attributes:
        table: (tiles, 3 + 2 * (2r+1)), wide tiles first, with the columns: first packed token, end (of a strip, where
            only some tokens are queries, their places among these), first packed token of the image, which is its first
            global token; then of each run its first packed token and its length.
        image_offsets: (batch + 1,) packed index of each image's first global token, and the end of the last image.
        num_global_tokens: G.
        neighbor_radius: r.
        tile_size: most patch tokens of a wide tile; medium ones take half, narrow ones a quarter of it.
        num_wide: how many tiles of the table are wide.
        num_medium: how many are medium.
        num_narrow: how many are narrow.
        global_shift: of a strip, its first key of the global tokens, `image_offsets` being where these keys start and
            end; 0 where all tokens are queries.
        most_entries: of `ContextTables`, that an image has at most.
        weights: (M,) float32, base-2 logarithm of what each packed token counts for; `None` where all count once.
        context: what is needed beside where there are context tokens.
    """

    table: torch.Tensor
    image_offsets: torch.Tensor
    num_global_tokens: int
    neighbor_radius: int
    tile_size: int
    num_wide: int
    num_medium: int
    num_narrow: int
    global_shift: int = 0
    most_entries: int = 0
    weights: torch.Tensor | None = None
    context: ContextTables | None = None

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
    entries = _entries(grid, image_offsets)
    table = _sorted_by_size(_pieces(grid, entries, tile_size), tile_sizes(tile_size), counts)
    context = None
    if grid.has_context or (isinstance(grid, TokenStrip) and grid.sees_context):
        columns = (entries.start, entries.end, entries.image, entries.row, entries.column, *entries.counts)
        context = context_tables(torch.stack(columns, dim=1), table[:, -1], grid)
    table = table[:, :-1].to(torch.int32).contiguous()
    global_shift = 0
    if isinstance(grid, TokenStrip):
        image_offsets, global_shift = per_image(grid.global_keys, grid.device), grid.global_keys[0]
    most_entries = max(rows * (columns + 1) for rows, columns in grid.block_counts)
    numbers = (grid.num_global_tokens, grid.neighbor_radius, tile_size, *counts, global_shift, most_entries)
    return AttentionTiles(table, image_offsets.to(torch.int32), *numbers, _log_weights(grid), context)


def _log_weights(grid: TokenGrid) -> torch.Tensor | None:
    """(M,) float32: base-2 logarithm of what each packed token counts for, 0 for global tokens."""
    if grid.weights is None:
        return None
    of_all = torch.zeros(grid.num_tokens, device=grid.device)
    return of_all.index_copy(0, grid.patch_indices(), grid.weights.float().log2())


class _Entries(NamedTuple):
    """(entries,) int64 of each entry of `TokenGrid.block_offsets`: a block, or the end of a block row.

    Attributes:
        start, end: packed index of its first token and after its last one; equal where it ends a block row.
        image, image_start: which image, and the packed index of its first token.
        row, column: of the block.
        counts: block rows and block columns of the image.
    """

    start: torch.Tensor
    end: torch.Tensor
    image: torch.Tensor
    image_start: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor
    counts: tuple[torch.Tensor, torch.Tensor]


def _entries(grid: TokenGrid, image_offsets: torch.Tensor) -> _Entries:
    offsets, device = grid.block_offsets, grid.device
    entry = torch.arange(len(offsets), device=device)
    if grid.batch_size == 1:
        num_rows, num_columns = (torch.full_like(entry, count) for count in grid.block_counts[0])
        place, image, image_start = entry, torch.zeros_like(entry), image_offsets[:1].expand_as(entry)
    else:
        image = grid.entry_shifts // grid.num_global_tokens - 1
        num_rows = per_image([rows for rows, _ in grid.block_counts], device)[image]
        num_columns = per_image([columns for _, columns in grid.block_counts], device)[image]
        place = entry - _starts([rows * (columns + 1) for rows, columns in grid.block_counts], device)[image]
        image_start = image_offsets[image]
    row, column = place // (num_columns + 1), place % (num_columns + 1)
    # An entry that ends a block row holds no tokens: it ends where it starts.
    end = offsets[entry + (column < num_columns)]
    return _Entries(offsets, end, image, image_start, row, column, (num_rows, num_columns))


def _pieces(grid: TokenGrid, entries: _Entries, tile_size: int) -> torch.Tensor:
    """(pieces, columns of the table and the entry): each entry in as many pieces as a block may have.

    Some are empty: of blocks with fewer tokens, and of the entries that end a block row and are no block.
    """
    entry = torch.arange(len(entries.start), device=grid.device)
    runs = _near_runs(grid, entry, entries.row, entries.column, *entries.counts)
    first = torch.arange(0, _pieces_of_a_block(grid, tile_size) * tile_size, tile_size, device=grid.device)
    start = torch.minimum(entries.start[:, None] + first, entries.end[:, None])  # (entries, pieces)
    end = torch.minimum(start + tile_size, entries.end[:, None])
    if isinstance(grid, TokenStrip):  # the others only answer
        start, end = (places.clamp(*grid.own) - grid.query_shift for places in (start, end))
    keys = [column[:, None].expand_as(start) for column in (entries.image_start, *runs, entry)]
    return torch.stack([start, end, *keys], dim=2).flatten(0, 1)


def _near_runs(
    grid: TokenGrid,
    entry: torch.Tensor,
    row: torch.Tensor,
    column: torch.Tensor,
    num_rows: torch.Tensor,
    num_columns: torch.Tensor,
) -> list[torch.Tensor]:
    """The first packed token and the length, (entries,), of each run of an entry's neighbourhood in turn."""
    radius = grid.neighbor_radius
    left = entry - column.clamp(max=radius)
    right = entry + (num_columns - column).clamp(max=radius + 1)
    step = torch.arange(-radius, radius + 1, device=grid.device)[:, None]
    near_row = row + step  # (runs, entries)
    is_row = (near_row >= 0) & (near_row < num_rows)
    # A run of a block row that is not there starts and ends at the first entry: it has no tokens.
    near = torch.where(is_row, torch.stack((left, right))[:, None] + step * (num_columns + 1), 0)
    start, end = grid.block_offsets[near]
    return [column for run in zip(start, end - start, strict=True) for column in run]


def _sorted_by_size(pieces: torch.Tensor, sizes: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """The pieces that hold tokens, those of wide tiles first; `counts[i]` rows for the tiles of `sizes[i]` tokens."""
    num_tokens = pieces[:, 1] - pieces[:, 0]
    # Pieces without a token go beyond the last tile, each to a place of its own: no two are written to one.
    place = torch.arange(sum(counts), sum(counts) + len(pieces), device=pieces.device)
    used = [size for size, count in zip(sizes, counts, strict=True) if count > 0]
    first = 0
    for size, least in zip(used, [*used[1:], 0], strict=True):
        is_of_size = num_tokens > least
        if size < used[0]:
            is_of_size &= num_tokens <= size
        place = torch.where(is_of_size, is_of_size.cumsum(dim=0) + (first - 1), place)
        first += counts[sizes.index(size)]
    table = pieces.new_zeros((sum(counts) + len(pieces), pieces.shape[1]))
    return table.index_copy(0, place, pieces)[: sum(counts)]


def _most_tiles(grid: TokenGrid, tile_size: int) -> tuple[int, ...]:
    """Upper bounds of the numbers of wide, medium and narrow tiles; the numbers where every patch token is present.

    A width with few tiles is not used: they join those that are wider. Sums and whole divisions only, and hardly a
    comparison, so that a compiled graph serves every image size.
    """
    num_present, sizes = sum(grid.counts), grid.grid_sizes
    if isinstance(grid, TokenStrip):
        num_present, sizes = grid.own[1] - grid.own[0], [(grid.num_token_rows, grid.grid_sizes[0][1])]
    is_full = num_present == sum(rows * columns for rows, columns in sizes)
    # Of the window, not of the image: else a small image would have the kernel compiled anew.
    largest = tile_size if grid.window_size is None else min(grid.window_size**2, tile_size)
    counts, least = dict.fromkeys(tile_sizes(tile_size), 0), 0
    for size in reversed(tile_sizes(tile_size)):
        most = _pieces_above(sizes, grid.window_size, tile_size, least)
        if size < largest and is_full:
            most -= _pieces_above(sizes, grid.window_size, tile_size, size)
        most = min(most, num_present // (least + 1))
        if size >= largest:
            counts[size] = most
            break
        if most >= LEAST_TILES_FOR_NARROW_ONES:
            counts[size], least = most, size
    return tuple(counts.values())


def _pieces_above(sizes: Sequence[tuple[int, int]], window: int | None, tile_size: int, least: int) -> int:
    """How many pieces of more than `least` tokens, which is less than `tile_size`, full grids are cut into."""
    pieces = 0
    for size in sizes:
        # Of blocks that are whole and of those that the image's border cuts: (tokens along a side, how many)
        sides = [[(side, 1)] if window is None else [(window, side // window), (side % window, 1)] for side in size]
        for (height, num_high), (width, num_broad) in itertools.product(*sides):
            tokens = height * width
            last_counts = (tokens % tile_size + tile_size - 1 - least) // tile_size  # 1 where it is above `least`
            pieces += num_high * num_broad * (tokens // tile_size + last_counts)
    return pieces


def _pieces_of_a_block(grid: TokenGrid, tile_size: int) -> int:
    """Most pieces that a block is cut into."""
    most = max(grid.counts) if grid.window_size is None else grid.window_size**2
    return -(-most // tile_size)


def _starts(sizes: Sequence[int], device: torch.device) -> torch.Tensor:
    """(n + 1,) where each of n consecutive pieces starts, and where the last one ends.

    Added up on the host: inductor of torch 2.11 fails on the cumulative sum of a tensor filled with a symbolic number.
    """
    if all(size == sizes[0] for size in sizes):
        return torch.arange(len(sizes) + 1, device=device) * sizes[0]
    return per_image(list(itertools.accumulate(sizes, initial=0)), device)
