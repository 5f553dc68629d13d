# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Block-local attention as a loop over tiles of queries: one dense SDPA call per tile, nothing quadratic.

A tile is a run of consecutive blocks of one block row. Its keys are the global tokens and, for each of the 2r+1 block
rows around it, one contiguous run of packed tokens: no padding, no gather, no dense mask, however ragged the blocks
are. It uses torch operations only, so it also serves as the correct path on devices without a kernel. It computes in
the dtype of its arguments, probabilities in at least float32: autocast has no say in it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .attention_backend import AttentionBackend, PreparedGrid, operator_name
from .attention_precision import without_autocast
from .token_grid import TokenGrid

# Blocks are joined until a tile has this many queries: below it the cost of a call outweighs its arithmetic, above it
# the tile computes logits of keys that most of its queries do not see (measured with blocks of 4 to 64 tokens).
MIN_QUERIES_PER_TILE = 32

# Where probabilities are kept, of this many queries at a time: those of a large block do not fit the cache, nor at
# 60,000 keys the memory (measured with 32 to 4,900 queries).
MAX_QUERIES_AT_ONCE = 128


class QueryTile(NamedTuple):
    """Consecutive queries that share their keys.

    Attributes:
        queries: (start, end) packed token indices.
        keys: (start, end) packed token indices of each run of keys: the global tokens', then those of block rows.
        is_seen: (queries, keys) bool, or `None` where every query sees every key.
    """

    queries: tuple[int, int]
    keys: list[tuple[int, int]]
    is_seen: torch.Tensor | None


# Columns of a tile table before those of the runs: first query, end, 1 where block columns decide which key is seen,
# and the number of global tokens that precede the image's patch tokens.
_NUM_TILE_COLUMNS = 4


def _prepare(grid: TokenGrid) -> PreparedGrid:
    """The tile table, on the host, and the block column of each patch token: one read of the device per grid."""
    window = max(grid.canvas_size) if grid.window_size is None else grid.window_size
    numbers = [grid.num_global_tokens, grid.neighbor_radius]
    block_counts = [count for counts in grid.block_counts for count in counts]
    table = _tile_table(grid.block_offsets, block_counts, list(grid.image_offsets), *numbers)
    return PreparedGrid([table, (grid.columns // window).to(torch.int32)], numbers)


@torch.library.custom_op(operator_name("sdpa_tile_table"), mutates_args=())
def _tile_table(
    block_offsets: torch.Tensor,
    block_counts: list[int],
    image_offsets: list[int],
    num_global_tokens: int,
    neighbor_radius: int,
) -> torch.Tensor:
    """(tiles, 4 + 2 * runs) int64 on the host, of as many tiles as there can be at most: the last ones are empty."""
    offsets, first_entry, tiles = block_offsets.tolist(), 0, []
    for image, block_rows in enumerate(block_counts[::2]):
        block_columns = block_counts[2 * image + 1]
        start, end = image_offsets[image : image + 2]
        starts = range(first_entry, first_entry + block_rows * (block_columns + 1), block_columns + 1)
        first_entry = starts.stop
        globals_before = num_global_tokens * (image + 1)
        if max(block_rows, block_columns) - 1 <= neighbor_radius:
            tiles.append([start, end, 0, globals_before, start, end])
            continue
        global_keys = [start, start + num_global_tokens]
        tiles.append([*global_keys, 0, globals_before, start, end])
        rows = [offsets[entry : entry + block_columns + 1] for entry in starts]
        for row, row_offsets in enumerate(rows):
            near_rows = rows[max(0, row - neighbor_radius) : row + neighbor_radius + 1]
            for queries, joins_blocks, runs in _block_row_tiles(row_offsets, near_rows, neighbor_radius):
                tiles.append([*queries, joins_blocks, globals_before, *global_keys, *runs])
    most_tiles, columns = _table_shape(block_counts, neighbor_radius)
    tiles += [[]] * (most_tiles - len(tiles))
    return torch.tensor([tile + [0] * (columns - len(tile)) for tile in tiles])


@_tile_table.register_fake
def _tile_table_fake(
    block_offsets: torch.Tensor,
    block_counts: list[int],
    image_offsets: list[int],
    num_global_tokens: int,
    neighbor_radius: int,
) -> torch.Tensor:
    return block_offsets.new_empty(_table_shape(block_counts, neighbor_radius), dtype=torch.int64, device="cpu")


def _table_shape(block_counts: list[int], neighbor_radius: int) -> tuple[int, int]:
    """Each image has a tile of global queries and at most one per block; runs are the global tokens' and 2r+1."""
    most_tiles = sum(1 + rows * columns for rows, columns in zip(block_counts[::2], block_counts[1::2], strict=True))
    return most_tiles, _NUM_TILE_COLUMNS + 2 * (2 * neighbor_radius + 2)


def _block_row_tiles(
    offsets: list[int], near_rows: list[list[int]], neighbor_radius: int
) -> Iterator[tuple[tuple[int, int], bool, list[int]]]:
    """Queries, whether they are of several blocks, and the ends of the key runs of the tiles of one block row.

    `offsets` are the starts of its own blocks, `near_rows` those of the block rows of its neighbourhood.
    """
    num_block_columns = len(offsets) - 1
    first = 0
    while first < num_block_columns:
        last = first
        while last + 1 < num_block_columns and offsets[last + 1] - offsets[first] < MIN_QUERIES_PER_TILE:
            last += 1
        if offsets[last + 1] > offsets[first]:
            left = max(0, first - neighbor_radius)
            right = min(num_block_columns - 1, last + neighbor_radius)
            runs = [end for near in near_rows for end in (near[left], near[right + 1])]
            yield (offsets[first], offsets[last + 1]), last > first, runs
        first = last + 1


def query_tiles(prepared: PreparedGrid) -> Iterator[QueryTile]:
    """The tiles of a batch: per image the global queries first, then its block rows from the top."""
    (table, block_columns), (num_global_tokens, neighbor_radius) = prepared
    for start, end, joins_blocks, globals_before, *runs in table.tolist():
        if start == end:
            continue
        keys = [run for run in zip(runs[::2], runs[1::2], strict=True) if run[0] < run[1]]
        is_seen = None
        if joins_blocks:
            query_columns = block_columns[start - globals_before : end - globals_before]
            key_columns = _take(
                block_columns, [(first - globals_before, stop - globals_before) for first, stop in keys[1:]]
            )
            is_near = (query_columns[:, None] - key_columns[None, :]).abs() <= neighbor_radius  # (queries, patch keys)
            is_seen = torch.nn.functional.pad(is_near, (num_global_tokens, 0), value=True)
        yield QueryTile((start, end), keys, is_seen)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tile: QueryTile, scale: float) -> torch.Tensor:
    """SDPA of one tile; (tokens, heads, head_dim) in and out."""
    output = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],  # (1, heads, tokens, head_dim): a 5-D tensor would take SDPA's slow path
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=tile.is_seen,
        scale=scale,
    )
    return output[0].transpose(0, 1)


def _query_parts(tile: QueryTile) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """At most `MAX_QUERIES_AT_ONCE` queries of a tile at a time, with their rows of its mask."""
    first, end = tile.queries
    for start in range(first, end, MAX_QUERIES_AT_ONCE):
        stop = min(start + MAX_QUERIES_AT_ONCE, end)
        yield slice(start, stop), None if tile.is_seen is None else tile.is_seen[start - first : stop - first]


def _heads_first(states: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, head_dim) -> (heads, tokens, head_dim), of at least float32."""
    return states.transpose(0, 1).to(torch.promote_types(states.dtype, torch.float32))


def _probabilities(query: torch.Tensor, key: torch.Tensor, is_seen: torch.Tensor | None, scale: float) -> torch.Tensor:
    """(heads, queries, keys) attention probabilities of (heads, tokens, head_dim) queries and keys."""
    logits = (query * scale) @ key.mT
    if is_seen is not None:
        logits.masked_fill_(~is_seen, -torch.inf)
    return torch.softmax(logits, dim=-1)


def _dropout_factors(probabilities: torch.Tensor, dropout: float, generator: torch.Generator | None) -> torch.Tensor:
    """0 where a probability is dropped, 1 / (1 - dropout) elsewhere."""
    drawn = torch.rand(probabilities.shape, generator=generator, device=probabilities.device)
    return (drawn >= dropout).to(probabilities.dtype) / (1.0 - dropout)


def _take(states: torch.Tensor, runs: list[tuple[int, int]]) -> torch.Tensor:
    """The tokens of the runs, one after the other; a view where there is one run."""
    if len(runs) == 1:
        return states[runs[0][0] : runs[0][1]]
    return torch.cat([states[start:end] for start, end in runs])


def tiled_block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prepared: PreparedGrid,
    scale: float,
    dropout: float,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, None]:
    """Block-local attention, tile by tile.

    Args:
        query, key, value: (M, heads, head_dim) packed tokens.
        prepared: where the tokens are, see `_prepare`.
        scale: factor on the logits.
        dropout: share of attention probabilities set to zero.
        generator: draws the dropout.

    Returns:
        (M, heads, head_dim), and `None`: the backward computes the log-sum-exps anew.
    """
    output = query.new_empty(query.shape)
    with without_autocast(query.device.type):
        for tile in query_tiles(prepared):
            tile_key, tile_value = _take(key, tile.keys), _take(value, tile.keys)
            if dropout == 0.0:
                queries = slice(*tile.queries)
                output[queries] = _attend(query[queries], tile_key, tile_value, tile, scale)
                continue
            tile_key, tile_value = _heads_first(tile_key), _heads_first(tile_value)
            for queries, is_seen in _query_parts(tile):
                probabilities = _probabilities(_heads_first(query[queries]), tile_key, is_seen, scale)
                probabilities *= _dropout_factors(probabilities, dropout, generator)
                output[queries] = (probabilities @ tile_value).transpose(0, 1)
    return output, None


def tiled_block_attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    prepared: PreparedGrid,
    scale: float,
    dropout: float,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `tiled_block_attention`; each tile's probabilities are recomputed, `output` and `logsumexp` unused.

    `generator` must be seeded as it was for the forward: the dropout is drawn again in the same order.

    Returns:
        Gradients with respect to query, key and value, each (M, heads, head_dim).
    """
    grad_query = query.new_empty(query.shape)
    dtype = torch.promote_types(query.dtype, torch.float32)
    grad_key, grad_value = (torch.zeros(states.shape, dtype=dtype, device=states.device) for states in (key, value))
    with without_autocast(query.device.type):
        for tile in query_tiles(prepared):
            tile_key, tile_value = (_heads_first(_take(states, tile.keys)).contiguous() for states in (key, value))
            tile_grad_key, tile_grad_value = torch.zeros_like(tile_key), torch.zeros_like(tile_value)
            for queries, is_seen in _query_parts(tile):
                tile_query, tile_grad = _heads_first(query[queries]), _heads_first(grad_output[queries])
                probabilities = _probabilities(tile_query, tile_key, is_seen, scale)  # (heads, queries, keys)
                grad_logits = tile_grad @ tile_value.mT  # with respect to the probabilities, so far
                dropped = probabilities
                if dropout > 0.0:
                    factors = _dropout_factors(probabilities, dropout, generator)
                    dropped, grad_logits = probabilities * factors, grad_logits * factors
                tile_grad_value.baddbmm_(dropped.mT, tile_grad)
                delta = (probabilities * grad_logits).sum(dim=-1, keepdim=True)
                grad_logits.sub_(delta).mul_(probabilities)
                grad_query[queries] = (grad_logits @ tile_key).mul_(scale).transpose(0, 1)
                tile_grad_key.baddbmm_(grad_logits.mT, tile_query, alpha=scale)
            _add_runs(grad_key, tile_grad_key, tile.keys)
            _add_runs(grad_value, tile_grad_value, tile.keys)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _add_runs(states: torch.Tensor, additions: torch.Tensor, runs: list[tuple[int, int]]) -> None:
    """Adds (heads, keys, head_dim) to the runs of (M, heads, head_dim) they were taken from."""
    position = 0
    for start, end in runs:
        states[start:end] += additions[:, position : position + end - start].transpose(0, 1)
        position += end - start


SDPA_TILES = AttentionBackend(
    name="sdpa_tiles",
    description="tiles of SDPA calls",
    missing=lambda device: None,
    unwanted=lambda device: None,
    check_query=lambda query: None,
    prepare=_prepare,
    forward=tiled_block_attention,
    backward=tiled_block_attention_backward,
    has_dropout=True,
    returns_logsumexp=False,
)
