# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Which queries form a tile of the SDPA backend, and where its keys lie: a table on the host, made once per grid."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .attention_backend import PreparedGrid, operator_name
from .token_grid import TokenGrid
from .token_strips import TokenStrip

# Blocks are joined until a tile has this many queries: below it the cost of a call outweighs its arithmetic, above it
# the tile computes logits of keys that most of its queries do not see (measured with blocks of 4 to 64 tokens).
MIN_QUERIES_PER_TILE = 32


class QueryTile(NamedTuple):
    """Consecutive queries that share their keys: first those of packed tokens, then those of context tokens.

    Attributes:
        queries: (start, end) packed token indices.
        keys: (start, end) packed token indices of each run of keys: the global tokens', then those of block rows.
        context: (start, end) of each run of keys in the list of context tokens.
        is_seen: (queries, keys) bool, or `None` where every query sees every key.
    """

    queries: tuple[int, int]
    keys: list[tuple[int, int]]
    context: list[tuple[int, int]]
    is_seen: torch.Tensor | None


class KeyWeights(NamedTuple):
    """What keys count for, and which of them are context tokens; of cells without a token the last ones, of weight 0.

    Attributes:
        own: (M,) int64, the weight of each packed token; 1 for global tokens.
        context: (cells,) int64 packed token index of each context token.
        of_context: (cells,) int64, the total weight of its cell.
        block_rows: (cells,) int64, the block row it lies in.
        block_columns: (cells,) int64, the block column it lies in.
    """

    own: torch.Tensor
    context: torch.Tensor
    of_context: torch.Tensor
    block_rows: torch.Tensor
    block_columns: torch.Tensor


# Columns of a tile table before those of the runs: first query, end, and, where block columns decide which key is seen,
# 1 + the tile's block row; then the number of global tokens that precede the image's patch tokens.
_NUM_TILE_COLUMNS = 4


def prepare_tiles(grid: TokenGrid) -> PreparedGrid:
    """The tile table, on the host, the block column of each patch token, and the key weights where there are any.

    One read of the device per grid.
    """
    numbers = [grid.num_global_tokens, grid.neighbor_radius]
    block_counts = [count for counts in grid.block_counts for count in counts]
    context = grid.context_tokens()
    context_offsets = None if context is None else context.offsets
    layout = (grid.block_offsets, context_offsets, block_counts, list(grid.image_offsets), *numbers)
    # torch.compile, which needs a table of known size, never sees strips.
    is_strip = isinstance(grid, TokenStrip)
    table = torch.tensor(_tiles(*layout, grid.own, grid.global_keys)) if is_strip else _tile_table(*layout)
    tensors = [table, (grid.columns // _window(grid)).to(torch.int32)]
    return PreparedGrid([*tensors, *(_key_weights(grid) if grid.weighs_keys else ())], numbers)


def _window(grid: TokenGrid) -> int:
    return max(grid.canvas_size) if grid.window_size is None else grid.window_size


def _key_weights(grid: TokenGrid) -> KeyWeights:
    patch_indices = grid.patch_indices()
    own = torch.ones(grid.num_tokens, dtype=torch.int64, device=grid.device)
    if grid.weights is not None:
        own[patch_indices] = grid.weights
    context, weights = grid.context_tokens(), own.new_zeros(0)
    tokens = weights
    if context is not None:
        tokens, weights = context.tokens, context.weights

    def at_context_tokens(values: torch.Tensor) -> torch.Tensor:
        return torch.cat([values, values.new_zeros(1)])[tokens]

    places = (grid.rows // _window(grid), grid.columns // _window(grid))
    return KeyWeights(own, at_context_tokens(patch_indices), weights, *map(at_context_tokens, places))


def key_weights(prepared: PreparedGrid) -> KeyWeights | None:
    """What keys count for; `None` where each counts for itself."""
    return KeyWeights(*prepared.tensors[2:]) if len(prepared.tensors) > 2 else None


@torch.library.custom_op(operator_name("sdpa_tile_table"), mutates_args=())
def _tile_table(
    block_offsets: torch.Tensor,
    context_offsets: torch.Tensor | None,
    block_counts: list[int],
    image_offsets: list[int],
    num_global_tokens: int,
    neighbor_radius: int,
) -> torch.Tensor:
    """(tiles, 4 + 2 * runs) int64 on the host, of as many tiles as there can be at most: the last ones are empty."""
    tiles = _tiles(block_offsets, context_offsets, block_counts, image_offsets, num_global_tokens, neighbor_radius)
    most_tiles, columns = _table_shape(block_counts, neighbor_radius, context_offsets is not None)
    return torch.tensor(tiles + [[0] * columns] * (most_tiles - len(tiles)))


def _tiles(
    block_offsets: torch.Tensor,
    context_offsets: torch.Tensor | None,
    block_counts: list[int],
    image_offsets: list[int],
    num_global_tokens: int,
    neighbor_radius: int,
    own: tuple[int, int] | None = None,
    keys_of_globals: tuple[int, int] | None = None,
) -> list[list[int]]:
    """The rows of the table.

    `own` is (start, end) of the patch tokens that are queries, and `keys_of_globals` of what global tokens see; `None`
    where that is all.
    """
    offsets, first_entry, tiles = block_offsets.tolist(), 0, []
    context = None if context_offsets is None else context_offsets.tolist()
    for image, block_rows in enumerate(block_counts[::2]):
        block_columns = block_counts[2 * image + 1]
        starts = range(first_entry, first_entry + block_rows * (block_columns + 1), block_columns + 1)
        first_entry = starts.stop
        rows, context_rows = (
            None if values is None else [values[entry : entry + block_columns + 1] for entry in starts]
            for values in (offsets, context)
        )
        bounds, globals_before = image_offsets[image : image + 2], num_global_tokens * (image + 1)
        for queries, joins_blocks, *runs in _image_tiles(
            bounds, own, keys_of_globals, rows, context_rows, num_global_tokens, neighbor_radius
        ):
            tiles.append([*queries, joins_blocks, globals_before, *(end for part in runs for end in part)])
    columns = _table_shape(block_counts, neighbor_radius, context is not None)[1]
    return [tile + [0] * (columns - len(tile)) for tile in tiles]


@_tile_table.register_fake
def _tile_table_fake(
    block_offsets: torch.Tensor,
    context_offsets: torch.Tensor | None,
    block_counts: list[int],
    image_offsets: list[int],
    num_global_tokens: int,
    neighbor_radius: int,
) -> torch.Tensor:
    shape = _table_shape(block_counts, neighbor_radius, context_offsets is not None)
    return block_offsets.new_empty(shape, dtype=torch.int64, device="cpu")


def _table_shape(block_counts: list[int], neighbor_radius: int, has_context: bool) -> tuple[int, int]:
    """Each image has a tile of global queries and at most one per block.

    Runs of keys are the global tokens' and 2r+1; of context tokens, which lie around the neighbourhood, 2r+2.
    """
    most_tiles = sum(1 + rows * columns for rows, columns in zip(block_counts[::2], block_counts[1::2], strict=True))
    run_columns = 2 * (2 * neighbor_radius + 2)
    return most_tiles, _NUM_TILE_COLUMNS + run_columns * (2 if has_context else 1)


def _image_tiles(
    bounds: list[int],
    own: tuple[int, int] | None,
    keys_of_globals: tuple[int, int] | None,
    rows: list[list[int]],
    context_rows: list[list[int]] | None,
    num_global_tokens: int,
    neighbor_radius: int,
) -> Iterator[tuple[list[int], int, list[int], list[int]]]:
    """Queries, 1 + block row of tiles of several blocks, runs of keys and runs of context tokens of one image.

    `bounds` are those of its packed tokens, `own` and `keys_of_globals` as in `_tiles`; `rows` and `context_rows`
    hold where the blocks of each block row start.
    """
    global_keys = [bounds[0], bounds[0] + num_global_tokens]
    is_dense = max(len(rows), len(rows[0]) - 1) - 1 <= neighbor_radius
    if is_dense and own is None:
        yield bounds, 0, bounds, []
        return
    yield global_keys, 0, bounds if own is None else list(keys_of_globals), []
    if is_dense:
        yield list(own), 0, bounds, []
        return
    run_columns = 2 * (2 * neighbor_radius + 2)
    for row, offsets in enumerate(rows):
        query_offsets = offsets if own is None else [min(max(offset, own[0]), own[1]) for offset in offsets]
        for queries, blocks in _block_row_tiles(query_offsets):
            near = _near_blocks(row, blocks, neighbor_radius, len(offsets) - 1)
            joins_blocks = row + 1 if blocks[1] > blocks[0] else 0
            runs, context_runs = global_keys + _runs_inside(rows, *near), []
            if context_rows is not None:
                runs = runs + [0] * (run_columns - len(runs))
                context_runs = _whole_list(context_rows) if joins_blocks else _runs_outside(context_rows, *near)
            yield queries, joins_blocks, runs, context_runs


def _block_row_tiles(offsets: list[int]) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Queries, and first and last block, of the tiles of one block row, whose blocks start at `offsets`."""
    num_block_columns = len(offsets) - 1
    first = num_block_columns if offsets[0] == offsets[-1] else 0
    while first < num_block_columns:
        last = first
        while last + 1 < num_block_columns and offsets[last + 1] - offsets[first] < MIN_QUERIES_PER_TILE:
            last += 1
        if offsets[last + 1] > offsets[first]:
            yield [offsets[first], offsets[last + 1]], (first, last)
        first = last + 1


def _near_blocks(
    row: int, blocks: tuple[int, int], neighbor_radius: int, block_columns: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last block row, and block column, around some blocks of a row; the row may lie beyond the grid."""
    left = max(0, blocks[0] - neighbor_radius)
    right = min(block_columns - 1, blocks[1] + neighbor_radius)
    return (row - neighbor_radius, row + neighbor_radius), (left, right)


def _runs_inside(rows: list[list[int]], near_rows: tuple[int, int], near_columns: tuple[int, int]) -> list[int]:
    """Start and end of the run of each near block row; `rows` holds where the blocks of each block row start."""
    near = rows[max(0, near_rows[0]) : near_rows[1] + 1]
    return [end for offsets in near for end in (offsets[near_columns[0]], offsets[near_columns[1] + 1])]


def _runs_outside(rows: list[list[int]], near_rows: tuple[int, int], near_columns: tuple[int, int]) -> list[int]:
    """Start and end of the runs before, between and after those of `_runs_inside`."""
    start, end = _whole_list(rows)
    return [start, *_runs_inside(rows, near_rows, near_columns), end]


def _whole_list(rows: list[list[int]]) -> list[int]:
    return [rows[0][0], rows[-1][-1]]


def query_tiles(prepared: PreparedGrid) -> Iterator[QueryTile]:
    """The tiles of a batch: per image the global queries first, then its block rows from the top."""
    table, block_columns = prepared.tensors[:2]
    num_global_tokens, neighbor_radius = prepared.numbers
    weights = key_weights(prepared)
    first_of_context = 2 * (2 * neighbor_radius + 2)
    for start, end, joins_blocks, globals_before, *columns in table.tolist():
        if start == end:
            continue
        ends = columns[:first_of_context], columns[first_of_context:]
        keys, context = ([run for run in zip(run[::2], run[1::2], strict=True) if run[0] < run[1]] for run in ends)
        is_seen = None
        if joins_blocks:
            query_columns = block_columns[start - globals_before : end - globals_before]
            key_columns = take_runs(block_columns, [(a - globals_before, b - globals_before) for a, b in keys[1:]])
            is_near = (query_columns[:, None] - key_columns[None, :]).abs() <= neighbor_radius  # (queries, patch keys)
            is_seen = torch.nn.functional.pad(is_near, (num_global_tokens, 0), value=True)
            if context:
                is_far = _is_far(query_columns, joins_blocks - 1, weights, slice(*context[0]), neighbor_radius)
                is_seen = torch.cat([is_seen, is_far], dim=1)
        yield QueryTile((start, end), keys, context, is_seen)


def _is_far(
    query_columns: torch.Tensor, query_row: int, weights: KeyWeights, context: slice, neighbor_radius: int
) -> torch.Tensor:
    """(queries, context tokens) bool, True where the context token lies outside the query's neighbourhood."""
    is_far_row = (weights.block_rows[context] - query_row).abs() > neighbor_radius
    return (query_columns[:, None] - weights.block_columns[context]).abs().gt(neighbor_radius) | is_far_row


def take_runs(states: torch.Tensor, runs: list[tuple[int, int]]) -> torch.Tensor:
    """The tokens of the runs, one after the other; a view where there is one run."""
    if len(runs) == 1:
        return states[runs[0][0] : runs[0][1]]
    return torch.cat([states[start:end] for start, end in runs])
