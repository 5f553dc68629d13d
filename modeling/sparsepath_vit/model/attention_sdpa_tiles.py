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
from transformers.utils.generic import maybe_autocast

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
        keys: (start, end) packed token indices of each run of keys.
        is_seen: (queries, keys) bool, or `None` where every query sees every key.
    """

    queries: tuple[int, int]
    keys: list[tuple[int, int]]
    is_seen: torch.Tensor | None


def query_tiles(grid: TokenGrid) -> Iterator[QueryTile]:
    """The tiles of a batch: per image the global queries first, then its block rows from the top."""
    offsets = grid.block_offsets.tolist()
    first_entry = 0
    for image, (num_block_rows, num_block_columns) in enumerate(grid.block_counts):
        start, end = grid.image_offsets[image : image + 2]
        entries = num_block_columns + 1
        row_offsets = [
            offsets[first_entry + row * entries : first_entry + (row + 1) * entries] for row in range(num_block_rows)
        ]
        first_entry += num_block_rows * entries
        if max(num_block_rows, num_block_columns) - 1 <= grid.neighbor_radius:
            yield QueryTile((start, end), [(start, end)], None)
            continue
        global_keys = (start, start + grid.num_global_tokens)
        yield QueryTile(global_keys, [(start, end)], None)
        for row in range(num_block_rows):
            near_rows = row_offsets[max(0, row - grid.neighbor_radius) : row + grid.neighbor_radius + 1]
            yield from _block_row_tiles(row_offsets[row], near_rows, global_keys, grid)


def _block_row_tiles(
    offsets: list[int], near_rows: list[list[int]], global_keys: tuple[int, int], grid: TokenGrid
) -> Iterator[QueryTile]:
    """The tiles of one block row; `offsets` are its own block starts, `near_rows` those of its neighbourhood."""
    num_block_columns = len(offsets) - 1
    first = 0
    while first < num_block_columns:
        last = first
        while last + 1 < num_block_columns and offsets[last + 1] - offsets[first] < MIN_QUERIES_PER_TILE:
            last += 1
        if offsets[last + 1] > offsets[first]:
            left = max(0, first - grid.neighbor_radius)
            right = min(num_block_columns - 1, last + grid.neighbor_radius)
            keys = [global_keys, *((near[left], near[right + 1]) for near in near_rows)]
            is_seen = None
            if last > first:
                query_columns = _block_columns(offsets, first, last)
                key_columns = torch.cat([_block_columns(near, left, right) for near in near_rows])
                is_near = (query_columns[:, None] - key_columns[None, :]).abs() <= grid.neighbor_radius
                is_seen = torch.nn.functional.pad(is_near, (grid.num_global_tokens, 0), value=True).to(grid.device)
            yield QueryTile((offsets[first], offsets[last + 1]), keys, is_seen)
        first = last + 1


def _block_columns(offsets: list[int], first: int, last: int) -> torch.Tensor:
    """Block column of each token of the blocks first..last of a block row."""
    sizes = [offsets[column + 1] - offsets[column] for column in range(first, last + 1)]
    return torch.repeat_interleave(torch.arange(first, last + 1), torch.tensor(sizes))


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
    grid: TokenGrid,
    scale: float,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Block-local attention, tile by tile.

    Args:
        query, key, value: (M, heads, head_dim) packed tokens.
        grid: where the tokens are.
        scale: factor on the logits.
        dropout: share of attention probabilities set to zero.
        generator: draws the dropout.

    Returns:
        (M, heads, head_dim).
    """
    output = query.new_empty(query.shape)
    with maybe_autocast(query.device.type, enabled=False):
        for tile in query_tiles(grid):
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
    return output


def tiled_block_attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: TokenGrid,
    scale: float,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `tiled_block_attention`; each tile's probabilities are recomputed, none are kept.

    `generator` must be seeded as it was for the forward: the dropout is drawn again in the same order.

    Returns:
        Gradients with respect to query, key and value, each (M, heads, head_dim).
    """
    grad_query = query.new_empty(query.shape)
    dtype = torch.promote_types(query.dtype, torch.float32)
    grad_key, grad_value = (torch.zeros(states.shape, dtype=dtype, device=states.device) for states in (key, value))
    with maybe_autocast(query.device.type, enabled=False):
        for tile in query_tiles(grid):
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
