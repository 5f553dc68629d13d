# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Which queries form a tile of the SDPA backend, and where its keys lie: a table on the host, made once per grid."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .attention_backend import PreparedGrid
from .operator_names import operator_name
from .token_grid import TokenGrid
from .token_strips import TokenStrip

# Blocks are joined until a tile has this many queries: below it the cost of a call outweighs its arithmetic, above it
# the tile computes logits of keys that most of its queries do not see (measured with blocks of 4 to 64 tokens).
MIN_QUERIES_PER_TILE = 32


class QueryTile(NamedTuple):
    """Consecutive queries of one image that share their keys.

    Attributes:
        image: index of the image.
        queries: (start, end) packed token indices.
        keys: (start, end) packed token indices of each run of keys: the global tokens', then those of block rows.
        block_row: of the queries; -1 where they are global tokens or a whole image, and see all of it.
        block_columns: first and last block column of the queries, where they have a block row.
        num_block_columns: of the image.
        num_keys: how many keys the runs hold; context tokens come on top.
    """

    image: int
    queries: tuple[int, int]
    keys: list[tuple[int, int]]
    block_row: int
    block_columns: tuple[int, int]
    num_block_columns: int
    num_keys: int

    @property
    def joins_blocks(self) -> bool:
        """Whether the queries are of several blocks, which see different keys."""
        return self.block_row >= 0 and self.block_columns[0] < self.block_columns[1]


# Columns of a tile table before those of the runs: first query, end, image, its number of block columns, block row,
# first and last block column. `attention_cpu_source.py` has names for them in C.
_NUM_TILE_COLUMNS = 7


def prepare_tiles(grid: TokenGrid) -> PreparedGrid:
    """The tile table, on the host; of each packed token the block column and, where tokens have weights, the weight.

    One read of the device per grid.
    """
    table = tile_table(grid, MIN_QUERIES_PER_TILE)
    window = max(grid.canvas_size) if grid.window_size is None else grid.window_size
    patch_indices = grid.patch_indices()

    def of_packed(values: torch.Tensor, of_globals: int) -> torch.Tensor:
        packed = values.new_full((grid.num_tokens,), of_globals)
        return packed.index_copy(0, patch_indices, values)

    tensors = [table, of_packed(grid.columns // window, 0)]
    if grid.weights is not None:
        tensors.append(of_packed(grid.weights, 1))
    return PreparedGrid(tensors, [grid.num_global_tokens, grid.neighbor_radius])


def tile_table(grid: TokenGrid, min_queries: int) -> torch.Tensor:
    """(tiles, 7 + 2 * runs) int64 on the host: `_NUM_TILE_COLUMNS`, then start and end of each run of keys.

    Args:
        grid: the tokens.
        min_queries: up to which blocks of a row are joined; 1 for a tile for each block.
    """
    block_counts = [count for counts in grid.block_counts for count in counts]
    layout = (grid.block_offsets, block_counts, list(grid.image_offsets))
    settings = (grid.num_global_tokens, grid.neighbor_radius, min_queries)
    # torch.compile, which needs a table of known size, never sees strips.
    if isinstance(grid, TokenStrip):
        return torch.tensor(_tiles(*layout, *settings, grid.own, grid.global_keys))
    return _tile_table(*layout, *settings)


@torch.library.custom_op(operator_name("sdpa_tile_table"), mutates_args=())
def _tile_table(
    block_offsets: torch.Tensor,
    block_counts: list[int],
    image_offsets: list[int],
    num_global_tokens: int,
    neighbor_radius: int,
    min_queries: int,
) -> torch.Tensor:
    """The table of `tile_table`, of as many tiles as there can be at most: the last ones are empty."""
    tiles = _tiles(block_offsets, block_counts, image_offsets, num_global_tokens, neighbor_radius, min_queries)
    most_tiles, columns = _table_shape(block_counts, neighbor_radius)
    return torch.tensor(tiles + [[0] * columns] * (most_tiles - len(tiles)))


def _tiles(
    block_offsets: torch.Tensor,
    block_counts: list[int],
    image_offsets: list[int],
    num_global_tokens: int,
    neighbor_radius: int,
    min_queries: int,
    own: tuple[int, int] | None = None,
    keys_of_globals: tuple[int, int] | None = None,
) -> list[list[int]]:
    """The rows of the table.

    `own` is (start, end) of the patch tokens that are queries, and `keys_of_globals` of what global tokens see; `None`
    where that is all.
    """
    offsets, first_entry, tiles = block_offsets.tolist(), 0, []
    for image, block_rows in enumerate(block_counts[::2]):
        block_columns = block_counts[2 * image + 1]
        starts = range(first_entry, first_entry + block_rows * (block_columns + 1), block_columns + 1)
        first_entry = starts.stop
        rows = [offsets[entry : entry + block_columns + 1] for entry in starts]
        bounds = image_offsets[image : image + 2]
        settings = num_global_tokens, neighbor_radius, min_queries
        of_image = _image_tiles(bounds, own, keys_of_globals, rows, *settings)
        tiles += [[start, end, image, block_columns, *rest] for start, end, *rest in of_image]
    columns = _table_shape(block_counts, neighbor_radius)[1]
    return [tile + [0] * (columns - len(tile)) for tile in tiles]


@_tile_table.register_fake
def _tile_table_fake(
    block_offsets: torch.Tensor,
    block_counts: list[int],
    image_offsets: list[int],
    num_global_tokens: int,
    neighbor_radius: int,
    min_queries: int,
) -> torch.Tensor:
    shape = _table_shape(block_counts, neighbor_radius)
    return block_offsets.new_empty(shape, dtype=torch.int64, device="cpu")


def _table_shape(block_counts: list[int], neighbor_radius: int) -> tuple[int, int]:
    """Each image has a tile of global queries and at most one per block; keys are the global tokens and 2r+1 runs."""
    most_tiles = sum(1 + rows * columns for rows, columns in zip(block_counts[::2], block_counts[1::2], strict=True))
    return most_tiles, _NUM_TILE_COLUMNS + 2 * (2 * neighbor_radius + 2)


def _image_tiles(
    bounds: list[int],
    own: tuple[int, int] | None,
    keys_of_globals: tuple[int, int] | None,
    rows: list[list[int]],
    num_global_tokens: int,
    neighbor_radius: int,
    min_queries: int,
) -> Iterator[list[int]]:
    """Queries, block row, first and last block column, and runs of keys of the tiles of one image.

    `bounds` are those of its packed tokens, `own` and `keys_of_globals` as in `_tiles`; `rows` holds where the blocks
    of each block row start.
    """
    global_keys = [bounds[0], bounds[0] + num_global_tokens]
    is_dense = max(len(rows), len(rows[0]) - 1) - 1 <= neighbor_radius
    if is_dense and own is None:
        yield [*bounds, -1, 0, 0, *bounds]
        return
    yield [*global_keys, -1, 0, 0, *(bounds if own is None else keys_of_globals)]
    if is_dense:
        yield [*own, -1, 0, 0, *bounds]
        return
    for row, offsets in enumerate(rows):
        query_offsets = offsets if own is None else [min(max(offset, own[0]), own[1]) for offset in offsets]
        for queries, blocks in _block_row_tiles(query_offsets, min_queries):
            yield [*queries, row, *blocks, *global_keys, *_near_runs(rows, row, blocks, neighbor_radius)]


def _block_row_tiles(offsets: list[int], min_queries: int) -> Iterator[tuple[list[int], tuple[int, int]]]:
    """Queries, and first and last block, of the tiles of one block row, whose blocks start at `offsets`."""
    num_block_columns, first = len(offsets) - 1, 0
    while first < num_block_columns:
        last = first
        if offsets[first] < offsets[first + 1]:  # a tile does not begin with empty blocks
            while last + 1 < num_block_columns and offsets[last + 1] - offsets[first] < min_queries:
                last += 1
            yield [offsets[first], offsets[last + 1]], (first, last)
        first = last + 1


def _near_runs(rows: list[list[int]], row: int, blocks: tuple[int, int], neighbor_radius: int) -> list[int]:
    """Start and end of the run of keys in each block row around some blocks of a row."""
    left = max(0, blocks[0] - neighbor_radius)
    right = min(len(rows[row]) - 2, blocks[1] + neighbor_radius)
    near = rows[max(0, row - neighbor_radius) : row + neighbor_radius + 1]
    return [end for offsets in near for end in (offsets[left], offsets[right + 1])]


def query_tiles(prepared: PreparedGrid) -> Iterator[QueryTile]:
    """The tiles of a batch: per image the global queries first, then its block rows from the top."""
    for start, end, image, num_block_columns, block_row, first, last, *ends in prepared.tensors[0].tolist():
        if start < end:
            keys = [run for run in zip(ends[::2], ends[1::2], strict=True) if run[0] < run[1]]
            num_keys = sum(end_of_keys - start_of_keys for start_of_keys, end_of_keys in keys)
            yield QueryTile(image, (start, end), keys, block_row, (first, last), num_block_columns, num_keys)


def log_weights(prepared: PreparedGrid, dtype: torch.dtype) -> torch.Tensor | None:
    """(M,) what is added to the logits of each packed token, in at least float32; `None` where that is nothing."""
    if len(prepared.tensors) == 2:
        return None
    return prepared.tensors[2].to(torch.promote_types(dtype, torch.float32)).log()


def near_keys(tile: QueryTile, prepared: PreparedGrid, has_mean_queries: bool) -> torch.Tensor:
    """(queries, keys) bool, which keys lie near the queries of a tile that joins blocks; global tokens always do.

    With mean queries one of each of its blocks comes after the queries, from left to right.
    """
    query_columns = columns_of_queries(tile, prepared)
    if has_mean_queries:
        of_blocks = torch.arange(tile.block_columns[0], tile.block_columns[1] + 1, device=query_columns.device)
        query_columns = torch.cat([query_columns, of_blocks])
    return are_near(query_columns, take_runs(prepared.tensors[1], tile.keys), prepared)


def are_near(query_columns: torch.Tensor, key_columns: torch.Tensor, prepared: PreparedGrid) -> torch.Tensor:
    """(..., queries, keys) bool of (..., queries) and (..., keys) block columns; the first keys are global tokens."""
    num_global_tokens, neighbor_radius = prepared.numbers
    is_near = (query_columns[..., :, None] - key_columns[..., None, :]).abs_() <= neighbor_radius
    is_near[..., :num_global_tokens] = True
    return is_near


def columns_of_queries(tile: QueryTile, prepared: PreparedGrid) -> torch.Tensor:
    """(queries,) int64 block column of each query of a tile that has a block row."""
    return prepared.tensors[1][slice(*tile.queries)]


def take_runs(states: torch.Tensor, runs: list[tuple[int, int]]) -> torch.Tensor:
    """The tokens of the runs, one after the other; a view where there is one run."""
    if len(runs) == 1:
        return states[runs[0][0] : runs[0][1]]
    return torch.cat([states[start:end] for start, end in runs])


def next_multiple(number: int, multiple: int) -> int:
    """The smallest multiple that is not less than a number."""
    return -(-number // multiple) * multiple
