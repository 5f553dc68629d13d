# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Arithmetic of a forward pass, counted from the token grid: keys per query and floating point operations."""

import math

import torch

from ..model.configuration_sparsepath_vit import SparsePathViTConfig
from ..model.context_tokens import draw_context_tokens, exact_tokens
from ..model.embeddings import token_grid_of_sizes
from ..model.token_grid import TokenGrid
from ..model.token_pruning import num_kept


def attention_pairs(grid: TokenGrid) -> int:
    """Query-key pairs of the pattern, over all images of the grid.

    Each patch token sees G global tokens, the tokens of its neighbourhood and the context tokens outside it; each
    global token sees all. With context tokens the mean query sees what each block sees, and once all. Which patch
    tokens are exact is known in a layer only; here they are taken to be spread evenly.
    """
    return sum(_pairs_exactly(grid)) + _pairs_with_context(grid)


def _pairs_exactly(grid: TokenGrid) -> tuple[int, int]:
    """Pairs of two patch tokens near each other, and pairs with a global token."""
    near = sum(round((sizes * seen).sum().item()) for sizes, seen in zip(*_of_blocks(grid), strict=True))
    of_globals = sum(
        count * grid.num_global_tokens + grid.num_global_tokens * (grid.num_global_tokens + count)
        for count in grid.counts
    )
    return near, of_globals


def _pairs_with_context(grid: TokenGrid) -> int:
    """Pairs of a patch token and a context token outside its neighbourhood, and all pairs of the mean query."""
    if not grid.has_context:
        return 0
    context, pairs = draw_context_tokens(grid, exact_tokens(_evenly_high(grid), grid)), 0.0
    is_drawn = context.weights > 0
    images = zip(
        *_of_blocks(grid),
        *(part.split(context.counts) for part in (is_drawn, context.block_rows, context.block_columns)),
        strict=True,
    )
    for tokens, seen, drawn, rows, columns in images:
        if max(tokens.shape) - 1 <= grid.neighbor_radius:
            continue
        of_blocks = torch.zeros_like(tokens).index_put((rows[drawn], columns[drawn]), tokens.new_ones(()), True)
        far = of_blocks.sum() - _around(of_blocks, grid.neighbor_radius)
        keys_of_mean = ((grid.num_global_tokens + seen + far) * (tokens > 0)).sum()
        pairs += (tokens * far).sum().item() + keys_of_mean.item() + tokens.sum().item() + grid.num_global_tokens
    return round(pairs)


def _evenly_high(grid: TokenGrid) -> torch.Tensor:
    """(T,) scores of which the highest are spread evenly over each image: multiples of the golden ratio, modulo 1."""
    return torch.cat([torch.arange(count, dtype=torch.float64) * 0.6180339887498949 % 1 for count in grid.counts])


def _of_blocks(grid: TokenGrid) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(block rows, block columns) float64 of each image: patch tokens of each block, and of its neighbourhood."""
    sizes_of_images, seen_of_images, first_entry = [], [], 0
    for block_rows, block_columns in grid.block_counts:
        entries = grid.block_offsets[first_entry : first_entry + block_rows * (block_columns + 1)]
        first_entry += len(entries)
        sizes = entries.view(block_rows, block_columns + 1).diff(dim=1).double()
        sizes_of_images.append(sizes)
        seen_of_images.append(_around(sizes, grid.neighbor_radius))
    return sizes_of_images, seen_of_images


def _around(values: torch.Tensor, radius: int) -> torch.Tensor:
    """(block rows, block columns), the sum over the neighbourhood of each block."""
    padded = torch.nn.functional.pad(values[None, None], (radius,) * 4)
    return torch.nn.functional.avg_pool2d(padded, 2 * radius + 1, stride=1, divisor_override=1)[0, 0]


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
    of_cells = torch.bincount(cells, minlength=sum(num_cells)).double()[cells]  # tokens of each token's cell
    # A cell of n tokens leaves a representative unless it keeps all; each token brings the n-th part of its cell.
    expected = (1.0 - (1.0 - config.prune_ratio) ** of_cells) / of_cells
    return [one + round(part.sum().item()) for one, part in zip(kept, expected.split(grid.counts), strict=True)]


def token_grid_of_size(config: SparsePathViTConfig, height: int, width: int) -> TokenGrid:
    """The full grid of one image of that many pixels, without its pixels."""
    patch_size = config.patch_size
    return token_grid_of_sizes(config, [(math.ceil(height / patch_size), math.ceil(width / patch_size))])
