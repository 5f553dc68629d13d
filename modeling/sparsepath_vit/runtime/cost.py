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

    Each patch token sees G global tokens, the tokens of its neighbourhood and the context tokens outside it; each
    global token sees all.
    """
    return sum(_pairs_exactly(grid)) + _pairs_with_context(grid)


def _pairs_exactly(grid: TokenGrid) -> tuple[int, int]:
    """Pairs of two patch tokens near each other, and pairs with a global token."""
    near = sum(
        round((sizes * seen).sum().item()) for sizes, seen in zip(*_of_blocks(grid, grid.block_offsets), strict=True)
    )
    of_globals = sum(
        count * grid.num_global_tokens + grid.num_global_tokens * (grid.num_global_tokens + count)
        for count in grid.counts
    )
    return near, of_globals


def _pairs_with_context(grid: TokenGrid) -> int:
    """Pairs of a patch token and a context token outside its neighbourhood."""
    context = grid.context_tokens()
    if context is None:
        return 0
    tokens_of_blocks, _ = _of_blocks(grid, grid.block_offsets)
    drawn_of_blocks, drawn_near = _of_blocks(grid, context.offsets)
    pairs = (
        (tokens * (drawn.sum() - near)).sum().item()
        for tokens, drawn, near in zip(tokens_of_blocks, drawn_of_blocks, drawn_near, strict=True)
    )
    return round(sum(pairs))


def _of_blocks(grid: TokenGrid, offsets: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(block rows, block columns) float64 of each image: what lies in each block, and in its neighbourhood.

    `offsets` says where each entry of `TokenGrid.block_offsets` starts.
    """
    sizes_of_images, seen_of_images, first_entry, radius = [], [], 0, grid.neighbor_radius
    for block_rows, block_columns in grid.block_counts:
        entries = offsets[first_entry : first_entry + block_rows * (block_columns + 1)]
        first_entry += len(entries)
        sizes = entries.view(block_rows, block_columns + 1).diff(dim=1).double()
        padded = torch.nn.functional.pad(sizes[None, None], (radius,) * 4)
        sizes_of_images.append(sizes)
        seen_of_images.append(
            torch.nn.functional.avg_pool2d(padded, 2 * radius + 1, stride=1, divisor_override=1)[0, 0]
        )
    return sizes_of_images, seen_of_images


def mean_keys_per_query(grid: TokenGrid) -> float:
    """Keys a query sees on average, global tokens included."""
    return attention_pairs(grid) / grid.num_tokens


def forward_flops(config: SparsePathViTConfig, grid: TokenGrid) -> float:
    """Floating point operations of one forward pass, two per multiply-add.

    Counts patch embedding, linear layers and attention products. After pruning the tokens that are left are taken to be
    spread evenly over the blocks, which the attention products depend on, and with them the number of representatives.

    Args:
        config: of the model.
        grid: the tokens before pruning.
    """
    total = 2.0 * sum(grid.counts) * config.num_channels * config.patch_size**2 * config.hidden_size
    near, of_globals = _pairs_exactly(grid)
    with_context = _pairs_with_context(grid)
    tokens_after = sum(tokens_after_pruning(config, grid)) + grid.batch_size * grid.num_global_tokens
    share = tokens_after / grid.num_tokens
    # Half of the tokens make a quarter of the pairs; but a cell gives one context token, however many it holds.
    pairs_after = (near + of_globals) * share**2 + with_context * share
    layers_after = max(0, config.num_hidden_layers - config.prune_after_layer) if config.prunes else 0
    mlp_weights = config.hidden_size * config.intermediate_size * (3 if config.mlp_type == "swiglu" else 2)
    weights = 4 * config.hidden_size**2 + mlp_weights
    for layers, tokens, pairs in (
        (config.num_hidden_layers - layers_after, grid.num_tokens, near + of_globals + with_context),
        (layers_after, tokens_after, pairs_after),
    ):
        total += layers * (2.0 * tokens * weights + 4.0 * pairs * config.hidden_size)
    return total


def tokens_after_pruning(config: SparsePathViTConfig, grid: TokenGrid) -> list[int]:
    """Patch tokens left of each image: the kept ones, and the representatives expected where pruning strikes evenly.

    Args:
        config: of the model.
        grid: the tokens before pruning.
    """
    kept = [num_kept(count, config.prune_ratio) for count in grid.counts]
    if not config.leaves_representatives:
        return kept
    cells, num_cells = grid.cells(config.num_representatives)
    of_cells = torch.bincount(cells, minlength=num_cells).double()[cells]  # tokens of each token's cell
    # A cell of n tokens leaves a representative unless it keeps all; each token brings the n-th part of its cell.
    expected = (1.0 - (1.0 - config.prune_ratio) ** of_cells) / of_cells
    return [one + round(part.sum().item()) for one, part in zip(kept, expected.split(grid.counts), strict=True)]


def token_grid_of_size(config: SparsePathViTConfig, height: int, width: int) -> TokenGrid:
    """The full grid of one image of that many pixels, without its pixels."""
    patch_size = config.patch_size
    return token_grid_of_sizes(config, [(math.ceil(height / patch_size), math.ceil(width / patch_size))])
