# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Gradients of attention by tiles: each tile's probabilities are computed anew."""

import torch

from .attention_backend import LayerContext, PreparedGrid
from .attention_precision import without_autocast
from .attention_sdpa_correction import MeanQueryCorrection
from .attention_sdpa_keys import KeyGradients, TileKeys, TileMasks
from .attention_sdpa_probabilities import (
    at_least_float32,
    attention_probabilities,
    dropout_factors,
    heads_first,
    query_parts,
    rows_of_mask,
)
from .attention_sdpa_tables import query_tiles


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
    context: LayerContext | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of `tiled_block_attention`; each tile's probabilities are recomputed, `output` and `logsumexp` unused.

    `generator` must be seeded as it was for the forward: the dropout is drawn again in the same order.

    Returns:
        Gradients with respect to query, key and value, each (M, heads, head_dim), and with context tokens with respect
        to the mean queries, (images, heads, head_dim).
    """
    grad_query = query.new_empty(query.shape)
    tiles = list(query_tiles(prepared))
    keys = TileKeys([key, value], tiles, context)
    grad_key, grad_value = (KeyGradients(states, context) for states in (key, value))
    masks, correction = TileMasks(prepared, tiles, context, query.dtype), MeanQueryCorrection(prepared, context)
    grad_means = () if context is None else (torch.zeros_like(context.mean_query, dtype=grad_key.packed.dtype),)
    with without_autocast(query.device.type):
        for tile in tiles:
            gradients, mask = _TileGradients(*keys.of(tile), scale), masks.of(tile)
            for queries, part_mask in query_parts(tile, mask):
                grad_query[queries] = gradients.of(query[queries], grad_output[queries], part_mask, dropout, generator)
            mean_queries = correction.queries(tile)
            if len(mean_queries):
                mean_mask = rows_of_mask(mask, slice(-len(mean_queries), None))
                of_mean = gradients.of(mean_queries, correction.gradient(tile, grad_output), mean_mask, 0.0, None)
                grad_means[0][tile.image] += of_mean.sum(dim=0)
            grad_key.add(tile, gradients.key)
            grad_value.add(tile, gradients.value)
    return grad_query, grad_key.total(), grad_value.total(), *(gradient.to(query.dtype) for gradient in grad_means)


class _TileGradients:
    """Gradients of one tile's keys and values, (heads, keys, head_dim) of at least float32, summed over its queries."""

    def __init__(self, tile_key: torch.Tensor, tile_value: torch.Tensor, scale: float) -> None:
        self.tile_key, self.tile_value = (at_least_float32(states).contiguous() for states in (tile_key, tile_value))
        self.key, self.value = torch.zeros_like(self.tile_key), torch.zeros_like(self.tile_value)
        self.scale = scale

    def of(
        self,
        query: torch.Tensor,
        grad_output: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """(queries, heads, head_dim), the gradient of some queries; adds what they give to keys and values."""
        query, grad_output = heads_first(query), heads_first(grad_output)
        probabilities = attention_probabilities(query, self.tile_key, mask, self.scale)  # (heads, queries, keys)
        grad_logits = grad_output @ self.tile_value.mT  # with respect to the probabilities, so far
        dropped = probabilities
        if dropout > 0.0:
            factors = dropout_factors(probabilities, dropout, generator)
            dropped, grad_logits = probabilities * factors, grad_logits * factors
        self.value.baddbmm_(dropped.mT, grad_output)
        delta = (probabilities * grad_logits).sum(dim=-1, keepdim=True)
        grad_logits.sub_(delta).mul_(probabilities)
        self.key.baddbmm_(grad_logits.mT, query, alpha=self.scale)
        return (grad_logits @ self.tile_key).mul_(self.scale).transpose(0, 1)
