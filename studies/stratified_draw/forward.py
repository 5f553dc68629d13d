# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A plain forward of one image in which the draw of context tokens can be anything, apart from the library's own.

In a block all queries see the same keys with the same numbers added to their logits: one call of dense attention a
block, with a bias per key. Everything is float32, or whatever the model is.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from sparsepath_vit.model.encoder_sparsepath_vit import SparsePathViTLayer
from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel

from .draws import Drawn, DrawRule, LayerState, Tokens, draw, draw_representatives, num_cells, region_side

_QUERIES_AT_ONCE = 512  # at 1400 px the logits of all would take 2.4 GB


@dataclass(frozen=True)
class Settings:
    """What a run computes.

    Attributes:
        rule: how context tokens are chosen; None for the paper's pattern.
        num_samples: upper bound of context tokens, and of representatives.
        window: tokens per block side; None for dense attention.
        prune_ratio: share of patch tokens removed.
        prune_after_layer: counted from 1.
        has_representatives: whether cells that lost tokens keep a weighted one.
        seed: of all draws.
    """

    rule: DrawRule | None = None
    num_samples: int = 0
    window: int | None = 8
    prune_ratio: float = 0.0
    prune_after_layer: int = 4
    has_representatives: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Features:
    """The outputs of a run, after the final norm.

    Attributes:
        cls: (features,).
        patches: (T, features), in raster order.
        tokens: where they are, and what they stand for.
        keys: mean number of keys of a patch query, over layers; mean queries count with the keys they look at.
    """

    cls: torch.Tensor
    patches: torch.Tensor
    tokens: Tokens
    keys: float


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
    """(heads, queries, head_dim), with a number added to the logits of each key."""
    pieces = []
    for some in query.split(_QUERIES_AT_ONCE, dim=1):
        bias = added.to(query.dtype).expand(1, query.shape[0], some.shape[1], -1)
        pieces.append(scaled_dot_product_attention(some[None], key[None], value[None], attn_mask=bias)[0])
    return torch.cat(pieces, dim=1)


@torch.inference_mode()
def run(model: SparsePathViTModel, pixel_values: torch.Tensor, settings: Settings) -> Features:
    """One image through all layers.

    Args:
        model: in evaluation mode, with one global token (CLS) and `window_size=None`, so that tokens are in raster
            order.
        pixel_values: (1, 3, height, width).
        settings: what is computed.

    Raises:
        ValueError: the model has register tokens or a window.
    """
    if model.config.num_global_tokens != 1 or model.config.window_size is not None:
        raise ValueError("the prototype takes a model without register tokens, set to window_size=None.")
    grid = model.token_grid(pixel_values)
    hidden_states = model.embeddings(pixel_values, grid)[0]  # (1 + T, features)
    tokens, mass, keys = Tokens.full(grid.canvas_size), None, []
    for number, layer in enumerate(model.encoder.layers):
        query, key, value = (states[0] for states in layer.attention.query_key_value(layer.norm1(hidden_states)[None]))
        attended, mass_here, num_keys = _attention(query, key, value, tokens, settings, number, mass)
        hidden_states, mass = finish_layer(layer, hidden_states, attended), mass_here
        keys.append(num_keys)
        if settings.prune_ratio and number + 1 == settings.prune_after_layer:
            kept, tokens = _prune(tokens, mass, settings)
            hidden_states = torch.cat([hidden_states[:1], hidden_states[1:][kept]])
            mass = mass[kept]
    hidden_states = model.norm(hidden_states)
    return Features(hidden_states[0], hidden_states[1:], tokens, sum(keys) / len(keys))


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tokens: Tokens,
    settings: Settings,
    layer: int,
    mass: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(heads, 1 + T, head_dim), the attention mass of the patch tokens from CLS, and the keys of a patch query."""
    added = torch.cat([torch.zeros(1), tokens.weights.log().float()])  # (1 + T,)
    scale = query.shape[-1] ** -0.5
    probabilities = (query[:, :1] @ key.transpose(-1, -2) * scale + added).softmax(dim=-1)  # (heads, 1, 1 + T)
    mass_here = probabilities[:, 0, 1:].mean(dim=0)
    if settings.window is None:
        return attend(query, key, value, added), mass_here, float(len(added))
    drawn = None
    if settings.rule is not None:
        _, mean_query = mean_queries(query[:, 1:], tokens, 1, max(tokens.grid_size))
        mass_of_mean = (mean_query @ key.transpose(-1, -2) * scale + added).softmax(dim=-1)[:, 0, 1:].mean(dim=0)
        state = LayerState(layer, mass_here, mass, key[:, 1:], value[:, 1:], mass_of_mean)
        drawn = draw(tokens, state, settings.rule, settings.num_samples, settings.window, settings.seed)
    patches, num_keys = block_attention(query, key, value, added, tokens, drawn, settings)
    return torch.cat([probabilities @ value, patches], dim=1), mass_here, num_keys


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    added: torch.Tensor,
    tokens: Tokens,
    drawn: Drawn | None,
    settings: Settings,
) -> tuple[torch.Tensor, float]:
    """(heads, T, head_dim) of the patch queries, and the mean number of their keys."""
    window, rule = settings.window, settings.rule
    attended, num_keys, num_references = torch.empty_like(query[:, 1:]), 0, 0
    if rule is not None and rule.references:
        regions, mean_query = mean_queries(query[:, 1:], tokens, rule.references, window)
        exact = attend(mean_query, key, value, added)  # (heads, regions, head_dim)
        num_references = mean_query.shape[1]
    block_rows, block_columns = tokens.rows // window, tokens.columns // window
    for block in torch.unique(torch.stack([block_rows, block_columns]), dim=1).T:
        is_near = ((block_rows - block[0]).abs() <= 1) & ((block_columns - block[1]).abs() <= 1)
        own = ((block_rows == block[0]) & (block_columns == block[1])).nonzero()[:, 0]
        near = torch.cat([torch.zeros(1, dtype=torch.int64), is_near.nonzero()[:, 0] + 1])
        keys, values, biases = key[:, near], value[:, near], added[near]
        if drawn is not None:
            is_far = ~is_near[drawn.tokens]
            far = drawn.tokens[is_far] + 1
            keys = torch.cat([keys, key[:, far]], dim=1)
            far_values = value[:, far] if drawn.value is None else drawn.value[:, is_far]
            values, biases = torch.cat([values, far_values], dim=1), torch.cat([biases, drawn.log_weights[is_far]])
        num_keys += keys.shape[1] * len(own)
        queries = query[:, own + 1]
        if num_references:
            region = int(regions[own[0]])
            # What the mean query of the region gets from these keys, against what it gets from all.
            both = attend(torch.cat([queries, mean_query[:, region, None]], dim=1), keys, values, biases)
            attended[:, own] = both[:, :-1] + (exact[:, region, None] - both[:, -1:])
        else:
            attended[:, own] = attend(queries, keys, values, biases)
    return attended, num_keys / len(tokens.rows) + num_references


def mean_queries(
    query: torch.Tensor, tokens: Tokens, num_regions: int, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The region of each patch token, (T,), and the weighted mean query of each, (heads, regions, head_dim)."""
    side = region_side(tokens.grid_size, num_regions, window)
    regions, weights = tokens.cells(side), tokens.weights.float()
    number = num_cells(tokens.grid_size, side)
    totals = torch.zeros(number).scatter_add(0, regions, weights).clamp_min(1e-9)  # 0 in a region without tokens
    sums = query.new_zeros(query.shape[0], number, query.shape[2]).index_add(1, regions, query * weights[:, None])
    return regions, sums / totals[:, None]


def finish_layer(layer: SparsePathViTLayer, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Projection, residual and MLP."""
    # (heads, 1 + T, head_dim) -> (1 + T, features)
    branch = layer.attention.projection(attended.transpose(0, 1).flatten(1))
    if layer.config.use_layerscale:
        branch = layer.layer_scale1(branch)
    hidden_states = hidden_states + branch
    branch = layer.mlp(layer.norm2(hidden_states))
    return hidden_states + (layer.layer_scale2(branch) if layer.config.use_layerscale else branch)


def _prune(tokens: Tokens, mass: torch.Tensor, settings: Settings) -> tuple[torch.Tensor, Tokens]:
    """The tokens that stay, as indices in raster order, and where they are."""
    num_kept = len(mass) - math.floor(settings.prune_ratio * len(mass))
    order = mass.sort(descending=True, stable=True).indices
    kept, weights = order[:num_kept], tokens.weights[order[:num_kept]]
    if settings.has_representatives:
        removed = order[num_kept:].sort().values
        drawn = draw_representatives(tokens, removed, settings.num_samples, settings.window or 1, settings.seed)
        kept = torch.cat([kept, drawn.tokens])
        weights = torch.cat([weights, drawn.log_weights.double().exp()])
    ascending = kept.argsort()
    return kept[ascending], tokens.select(kept[ascending], weights[ascending])
