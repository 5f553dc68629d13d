# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Attention of a tile where its probabilities are wanted: for dropout, for gradients, for the log-sum-exp.

In at least float32, of so many queries at a time that the probabilities stay in the cache.
"""

from collections.abc import Iterator

import torch

from .attention_sdpa_tables import QueryTile

# Where probabilities are kept, of this many queries at a time: those of a large block do not fit the cache, nor at
# 60,000 keys the memory (measured with 32 to 4,900 queries).
MAX_QUERIES_AT_ONCE = 128


def query_parts(tile: QueryTile, mask: torch.Tensor | None) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """At most `MAX_QUERIES_AT_ONCE` queries of a tile at a time, with their rows of its mask."""
    first, end = tile.queries
    for start in range(first, end, MAX_QUERIES_AT_ONCE):
        stop = min(start + MAX_QUERIES_AT_ONCE, end)
        yield slice(start, stop), rows_of_mask(mask, slice(start - first, stop - first))


def rows_of_mask(mask: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """Some rows of a mask; all queries share one that has a single row."""
    return mask[rows] if mask is not None and len(mask) > 1 else mask


def heads_first(states: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, head_dim) -> (heads, tokens, head_dim), of at least float32."""
    return at_least_float32(states.transpose(0, 1))


def at_least_float32(states: torch.Tensor) -> torch.Tensor:
    """The same in float32, or as it is where it is wider."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def attention_probabilities(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """(heads, queries, keys) attention probabilities of (heads, tokens, head_dim) queries and keys."""
    return torch.softmax(attention_logits(query, key, mask, scale), dim=-1)


def attention_logits(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """(heads, queries, keys) of (heads, tokens, head_dim) queries and keys."""
    logits = (query * scale) @ key.mT
    if mask is not None and mask.dtype == torch.bool:
        logits.masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        logits += mask
    return logits


def dropout_factors(probabilities: torch.Tensor, dropout: float, generator: torch.Generator | None) -> torch.Tensor:
    """0 where a probability is dropped, 1 / (1 - dropout) elsewhere."""
    drawn = torch.rand(probabilities.shape, generator=generator, device=probabilities.device)
    return (drawn >= dropout).to(probabilities.dtype) / (1.0 - dropout)


def attend_with_dropout(
    query: torch.Tensor,
    tile: QueryTile,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    dropout: float,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """(queries, heads, head_dim) of one tile, whose `key` and `value` are (heads, keys, head_dim)."""
    key, value, attended = at_least_float32(key), at_least_float32(value), []
    for queries, part_mask in query_parts(tile, mask):
        probabilities = attention_probabilities(heads_first(query[queries]), key, part_mask, scale)
        probabilities *= dropout_factors(probabilities, dropout, generator)
        attended.append((probabilities @ value).transpose(0, 1))
    return torch.cat(attended)
