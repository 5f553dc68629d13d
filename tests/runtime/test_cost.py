# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparsepath_vit import SparsePathViTConfig, SparsePathViTModel, TokenGrid
from sparsepath_vit.model.attention_specification import attention_pattern
from sparsepath_vit.model.context_tokens import draw_context_tokens, exact_tokens
from sparsepath_vit.model.token_pruning import EncodedTokens, prune
from sparsepath_vit.runtime.cost import (
    _evenly_high,
    attention_pairs,
    forward_flops,
    mean_keys_per_query,
    token_grid_of_size,
    tokens_after_pruning,
)


@pytest.mark.parametrize("window_size", [None, 1, 3, 8])
@pytest.mark.parametrize("neighbor_radius", [0, 1, 2])
def test_pairs_are_the_true_entries_of_the_pattern(window_size, neighbor_radius):
    present = torch.rand(2, 11, 13) < 0.6
    grid = TokenGrid.create(
        [(11, 13), (7, 9)],
        num_global_tokens=3,
        window_size=window_size,
        neighbor_radius=neighbor_radius,
        present=present,
    )
    assert attention_pairs(grid) == attention_pattern(grid).sum()


def test_flops_are_those_that_torch_counts():
    config = SparsePathViTConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96, window_size=None
    )
    pixel_values = torch.randn(1, 3, 140, 196)
    model = SparsePathViTModel(config).eval()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values)
    grid = token_grid_of_size(config, 140, 196)
    # torch also counts the resampling of the 16 x 16 positions to 10 x 14, along the rows and then the columns.
    resampling = 2 * 64 * (10 * 16 * 16 + 10 * 14 * 16)
    assert forward_flops(config, grid) + resampling == counter.get_total_flops()


@pytest.mark.parametrize(
    ("window_size", "prune_ratio", "tflop"), [(None, 0.0, 613), (8, 0.0, 86.6), (8, 0.6, 42.3), (64, 0.0, 298)]
)
def test_uni2_h_at_3430_px_costs_what_the_method_says(window_size, prune_ratio, tflop):
    config = SparsePathViTConfig(window_size=window_size, prune_ratio=prune_ratio)
    grid = token_grid_of_size(config, 3430, 3430)
    assert forward_flops(config, grid) / 1e12 == pytest.approx(tflop, rel=0.005)


def test_mean_keys_per_query_of_one_neighbourhood_is_every_token():
    config = SparsePathViTConfig(window_size=8)
    grid = token_grid_of_size(config, 224, 224)
    assert mean_keys_per_query(grid) == grid.num_tokens


@pytest.mark.parametrize("number", [4, 30, 500])
@pytest.mark.parametrize("window_size, neighbor_radius", [(1, 0), (2, 1), (3, 2), (8, 1)])
def test_context_tokens_outside_the_neighbourhood_count_as_keys(window_size, neighbor_radius, number):
    present = torch.rand(2, 11, 13, generator=torch.Generator().manual_seed(0)) < 0.6
    grid = TokenGrid.create(
        [(11, 13), (7, 9)],
        num_global_tokens=3,
        window_size=window_size,
        neighbor_radius=neighbor_radius,
        present=present,
        num_context_tokens=number,
    )
    if not grid.has_context:
        assert attention_pairs(grid) == attention_pattern(grid).sum()
        return
    exact = exact_tokens(_evenly_high(grid), grid)
    pattern = attention_pattern(grid, draw_context_tokens(grid, exact))[0].sum(dim=1)  # ragged: keys of each query
    pairs, counts = int(pattern.sum()), pattern[grid.patch_indices()]
    for image, block_counts in enumerate(grid.block_counts):
        if max(block_counts) - 1 > neighbor_radius:  # the mean query sees what each block sees, and once all
            own = grid.images() == image
            blocks = dict(zip(grid.blocks[own].tolist(), counts[own].tolist(), strict=True))
            pairs += sum(blocks.values()) + grid.counts[image] + grid.num_global_tokens
    assert attention_pairs(grid) == pairs


def test_context_tokens_cost_uni2_h_at_3430_px_a_tenth_more():
    flops = []
    for number in (0, 1024):
        config = SparsePathViTConfig(num_context_tokens=number)
        flops.append(forward_flops(config, token_grid_of_size(config, 3430, 3430)) / 1e12)
    # 961 cells of 8 x 8 tokens and 63 exact ones; each layer multiplies with at most that many more keys a query,
    # twice, and with those of the mean query, one for each of 961 blocks.
    assert 0 < flops[1] - flops[0] < 24 * 4 * (60025 * 1024 + 961 * 2000) * 1536 / 1e12
    assert flops[1] == pytest.approx(95.9, abs=0.5) and flops[1] < 1.12 * flops[0]


def test_tokens_after_pruning_count_representatives():
    config = SparsePathViTConfig(prune_ratio=0.6, num_representatives=400)
    grid = token_grid_of_size(config, 1400, 1400)
    pruned = prune(EncodedTokens(torch.zeros(*grid.batch_shape, 1), grid), torch.rand(10_000), 0.6, False, 400)
    assert tokens_after_pruning(config, grid) == pytest.approx(pruned.grid.counts, rel=0.005)
    config.num_representatives = 0
    assert tokens_after_pruning(config, grid) == [4000]
