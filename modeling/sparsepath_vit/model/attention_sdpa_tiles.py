# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Block-local attention as a loop over tiles of queries: one dense SDPA call per tile, nothing quadratic.

A tile is a run of consecutive blocks of one block row. Its keys are the global tokens and, for each of the 2r+1 block
rows around it, one contiguous run of packed tokens: no padding, no gather, no dense mask, however ragged the blocks
are. Context tokens outside the neighbourhood are 2r+2 more runs, of a list of their own; where keys have weights, a
number per key is added to the logits. It uses torch operations only, so it also serves as the correct path on devices
without a kernel. It computes in the dtype of its arguments, probabilities in at least float32: autocast has no say in
it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .attention_backend import AttentionBackend, PreparedGrid
from .attention_precision import without_autocast
from .attention_sdpa_tables import QueryTile, key_weights, prepare_tiles, query_tiles

# Where probabilities are kept, of this many queries at a time: those of a large block do not fit the cache, nor at
# 60,000 keys the memory (measured with 32 to 4,900 queries).
MAX_QUERIES_AT_ONCE = 128


class _Keys(NamedTuple):
    """Where the tiles take from what they need of each key: states, gradients or the logarithms of weights.

    Attributes:
        packed: (M, ...) of the packed tokens.
        context: (cells, ...) of the context tokens; `None` where there are none.
    """

    packed: torch.Tensor
    context: torch.Tensor | None

    def of(self, tile: QueryTile) -> torch.Tensor:
        """(keys, ...) of one tile; a view where its keys are one run."""
        parts = [source[start:end] for source, start, end in self._runs(tile)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def add(self, tile: QueryTile, additions: torch.Tensor) -> None:
        """Adds (heads, keys, head_dim) to the (tokens, heads, head_dim) that a tile's keys were taken from."""
        position = 0
        for source, start, end in self._runs(tile):
            source[start:end] += additions[:, position : position + end - start].transpose(0, 1)
            position += end - start

    def _runs(self, tile: QueryTile) -> list[tuple[torch.Tensor, int, int]]:
        runs = [(self.packed, *run) for run in tile.keys]
        return runs if self.context is None else runs + [(self.context, *run) for run in tile.context]


def _with_context(states: torch.Tensor, prepared: PreparedGrid) -> _Keys:
    """(M, heads, head_dim) and what of it belongs to context tokens: taken once, not by every tile."""
    weights = key_weights(prepared)
    return _Keys(states, None if weights is None else states[weights.context])


def _log_weights(prepared: PreparedGrid, dtype: torch.dtype) -> _Keys | None:
    """What is added to the logits of each key; `None` where that is nothing."""
    weights = key_weights(prepared)
    if weights is None:
        return None
    dtype = torch.promote_types(dtype, torch.float32)
    return _Keys(weights.own.to(dtype).log(), weights.of_context.to(dtype).log())


def _mask(tile: QueryTile, log_weights: _Keys | None) -> torch.Tensor | None:
    """(queries, keys) bool where queries see different keys; what is added to logits where keys have weights.

    That is (1, keys) where all queries see the same keys.
    """
    if log_weights is None:
        return tile.is_seen
    added = log_weights.of(tile)[None]  # (1, keys)
    return added if tile.is_seen is None else torch.where(tile.is_seen, added, -torch.inf)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """SDPA of one tile; (tokens, heads, head_dim) in and out."""
    output = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1)[None],  # (1, heads, tokens, head_dim): a 5-D tensor would take SDPA's slow path
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        scale=scale,
    )
    return output[0].transpose(0, 1)


def _query_parts(tile: QueryTile, mask: torch.Tensor | None) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """At most `MAX_QUERIES_AT_ONCE` queries of a tile at a time, with their rows of its mask."""
    first, end = tile.queries
    for start in range(first, end, MAX_QUERIES_AT_ONCE):
        stop = min(start + MAX_QUERIES_AT_ONCE, end)
        is_per_query = mask is not None and len(mask) > 1
        yield slice(start, stop), mask[start - first : stop - first] if is_per_query else mask


def _heads_first(states: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, head_dim) -> (heads, tokens, head_dim), of at least float32."""
    return states.transpose(0, 1).to(torch.promote_types(states.dtype, torch.float32))


def _probabilities(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """(heads, queries, keys) attention probabilities of (heads, tokens, head_dim) queries and keys."""
    return torch.softmax(_logits(query, key, mask, scale), dim=-1)


def _logits(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """(heads, queries, keys) of (heads, tokens, head_dim) queries and keys."""
    logits = (query * scale) @ key.mT
    if mask is not None and mask.dtype == torch.bool:
        logits.masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        logits += mask
    return logits


def _dropout_factors(probabilities: torch.Tensor, dropout: float, generator: torch.Generator | None) -> torch.Tensor:
    """0 where a probability is dropped, 1 / (1 - dropout) elsewhere."""
    drawn = torch.rand(probabilities.shape, generator=generator, device=probabilities.device)
    return (drawn >= dropout).to(probabilities.dtype) / (1.0 - dropout)


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
        prepared: where the tokens are, see `prepare_tiles`.
        scale: factor on the logits.
        dropout: share of attention probabilities set to zero.
        generator: draws the dropout.

    Returns:
        (M, heads, head_dim), and `None`: the backward computes the log-sum-exps anew.
    """
    output = query.new_empty(query.shape)
    keys, values = (_with_context(states, prepared) for states in (key, value))
    log_weights = _log_weights(prepared, query.dtype)
    with without_autocast(query.device.type):
        for tile in query_tiles(prepared):
            tile_key, tile_value, mask = keys.of(tile), values.of(tile), _mask(tile, log_weights)
            if dropout == 0.0:
                queries = slice(*tile.queries)
                output[queries] = _attend(query[queries], tile_key, tile_value, mask, scale)
                continue
            tile_key, tile_value = _heads_first(tile_key), _heads_first(tile_value)
            for queries, part_mask in _query_parts(tile, mask):
                probabilities = _probabilities(_heads_first(query[queries]), tile_key, part_mask, scale)
                probabilities *= _dropout_factors(probabilities, dropout, generator)
                output[queries] = (probabilities @ tile_value).transpose(0, 1)
    return output, None


def tiled_strip_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prepared: PreparedGrid, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-local attention of one strip, tile by tile.

    Args:
        query: (G + S, heads, head_dim) of the global tokens and the strip's own patch tokens.
        key, value: (M, heads, head_dim) of all tokens of the strip.
        prepared: where they are, see `prepare_tiles`.
        scale: factor on the logits.

    Returns:
        (G + S, heads, head_dim), and the log-sum-exp of the global tokens' logits, (heads, G).
    """
    output = query.new_empty(query.shape)
    keys, values = _Keys(key, None), _Keys(value, None)
    log_weights = _log_weights(prepared, query.dtype)
    num_globals = prepared.numbers[0]
    with without_autocast(query.device.type):
        tiles = query_tiles(prepared)
        tile = next(tiles)  # the global tokens
        global_states = (_heads_first(query[:num_globals]), _heads_first(keys.of(tile)))
        logits = _logits(*global_states, _mask(tile, log_weights), scale)
        logsumexp = logits.logsumexp(dim=-1)  # (heads, G)
        probabilities = logits.sub_(logsumexp[..., None]).exp_()
        output[:num_globals] = (probabilities @ _heads_first(values.of(tile))).transpose(0, 1)
        position = num_globals
        for tile in tiles:
            queries = slice(position, position + tile.queries[1] - tile.queries[0])
            tile_key, tile_value, mask = keys.of(tile), values.of(tile), _mask(tile, log_weights)
            output[queries] = _attend(query[queries], tile_key, tile_value, mask, scale)
            position = queries.stop
    return output, logsumexp


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
    keys, values = (_with_context(states, prepared) for states in (key, value))
    grad_keys, grad_values = (_zeros_like(states) for states in (keys, values))
    log_weights = _log_weights(prepared, query.dtype)
    with without_autocast(query.device.type):
        for tile in query_tiles(prepared):
            tile_key, tile_value = (_heads_first(states.of(tile)).contiguous() for states in (keys, values))
            tile_grad_key, tile_grad_value = torch.zeros_like(tile_key), torch.zeros_like(tile_value)
            for queries, mask in _query_parts(tile, _mask(tile, log_weights)):
                tile_query, tile_grad = _heads_first(query[queries]), _heads_first(grad_output[queries])
                probabilities = _probabilities(tile_query, tile_key, mask, scale)  # (heads, queries, keys)
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
            grad_keys.add(tile, tile_grad_key)
            grad_values.add(tile, tile_grad_value)
    grad_key, grad_value = (_joined(gradient, prepared) for gradient in (grad_keys, grad_values))
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _zeros_like(keys: _Keys) -> _Keys:
    """Zeros of the same shapes, in at least float32."""
    dtype = torch.promote_types(keys.packed.dtype, torch.float32)
    return _Keys(*(None if states is None else torch.zeros_like(states, dtype=dtype) for states in keys))


def _joined(gradients: _Keys, prepared: PreparedGrid) -> torch.Tensor:
    """(M, heads, head_dim): what context tokens received goes to the packed tokens that they are."""
    weights = key_weights(prepared)
    if weights is None:
        return gradients.packed
    # Each token is at most one context token; those of empty cells share a place and received nothing.
    return gradients.packed.index_add_(0, weights.context, gradients.context)


SDPA_TILES = AttentionBackend(
    name="sdpa_tiles",
    description="tiles of SDPA calls",
    missing=lambda device: None,
    unwanted=lambda device: None,
    check_query=lambda query: None,
    prepare=prepare_tiles,
    forward=tiled_block_attention,
    backward=tiled_block_attention_backward,
    forward_strip=tiled_strip_attention,
    has_dropout=True,
    takes_key_weights=True,
    returns_logsumexp=False,
)
