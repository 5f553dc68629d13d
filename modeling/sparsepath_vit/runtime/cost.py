# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Arithmetic of a forward pass, counted from the token grid: keys per query and floating point operations."""

import math

import torch

from ..model.configuration_sparsepath_vit import SparsePathViTConfig
from ..model.embeddings import token_grid_of_sizes
from ..model.token_grid import TokenGrid
from ..model.token_pruning import num_kept


def attention_pairs(grid: TokenGrid) -> int:
    """Query-key pairs of the pattern, over all images of the grid.

    Each patch token sees G global tokens and the tokens of its neighbourhood; each global token sees all.
    """
    pairs = 0
    first_entry = 0
    radius = grid.neighbor_radius
    for count, (block_rows, block_columns) in zip(grid.counts, grid.block_counts, strict=True):
        entries = grid.block_offsets[first_entry : first_entry + block_rows * (block_columns + 1)]
        first_entry += len(entries)
        sizes = entries.view(block_rows, block_columns + 1).diff(dim=1).double()  # tokens of each block
        padded = torch.nn.functional.pad(sizes[None, None], (radius,) * 4)
        seen = torch.nn.functional.avg_pool2d(padded, 2 * radius + 1, stride=1, divisor_override=1)[0, 0]
        pairs += round((sizes * seen).sum().item())
        pairs += count * grid.num_global_tokens + grid.num_global_tokens * (grid.num_global_tokens + count)
    return pairs


def mean_keys_per_query(grid: TokenGrid) -> float:
    """Keys a query sees on average, global tokens included."""
    return attention_pairs(grid) / grid.num_tokens


def forward_flops(config: SparsePathViTConfig, grid: TokenGrid) -> float:
    """Floating point operations of one forward pass, two per multiply-add.

    Counts patch embedding, linear layers and attention products. After pruning the kept tokens are taken to be spread
    evenly over the blocks, which only the attention products depend on.

    Args:
        config: of the model.
        grid: the tokens before pruning.
    """
    total = 2.0 * sum(grid.counts) * config.num_channels * config.patch_size**2 * config.hidden_size
    pairs_before = attention_pairs(grid)
    kept = [num_kept(count, config.prune_ratio) for count in grid.counts]
    tokens_after = sum(kept) + grid.batch_size * grid.num_global_tokens
    pairs_after = pairs_before * (tokens_after / grid.num_tokens) ** 2
    layers_after = max(0, config.num_hidden_layers - config.prune_after_layer) if config.prunes else 0
    mlp_weights = config.hidden_size * config.intermediate_size * (3 if config.mlp_type == "swiglu" else 2)
    weights = 4 * config.hidden_size**2 + mlp_weights
    for layers, tokens, pairs in (
        (config.num_hidden_layers - layers_after, grid.num_tokens, pairs_before),
        (layers_after, tokens_after, pairs_after),
    ):
        total += layers * (2.0 * tokens * weights + 4.0 * pairs * config.hidden_size)
    return total


def token_grid_of_size(config: SparsePathViTConfig, height: int, width: int) -> TokenGrid:
    """The full grid of one image of that many pixels, without its pixels."""
    patch_size = config.patch_size
    return token_grid_of_sizes(config, [(math.ceil(height / patch_size), math.ceil(width / patch_size))])
