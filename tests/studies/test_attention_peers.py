# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import types

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sparsepath_vit import TokenGrid
from sparsepath_vit.model.attention_specification import attention_pattern
from sparsepath_vit.runtime.cost import attention_pairs
from studies.benchmarks import attention_peers
from studies.benchmarks.attention_peers import DoesNotApplyError, attention_peer, block_pattern


def pruned_grid(side=9, window_size=4, radius=1):
    grid = TokenGrid.create([(side, side)], num_global_tokens=3, window_size=window_size, neighbor_radius=radius)
    kept = torch.randperm(side * side)[: side * side // 2].sort().values
    return grid.select(kept, [len(kept)])


def full_grid(side, window_size, radius=1):
    return TokenGrid.create([(side, side)], num_global_tokens=3, window_size=window_size, neighbor_radius=radius)


def dense_with(pattern, states):
    return scaled_dot_product_attention(*states, attn_mask=pattern)


@pytest.mark.parametrize("radius", [0, 1, 2])
@pytest.mark.parametrize("window_size", [2, 4, None])
def test_the_rows_of_the_pattern_are_those_of_the_specification(window_size, radius):
    grid = pruned_grid(window_size=window_size, radius=radius)
    chosen = torch.randperm(grid.num_tokens)[:11]
    assert torch.equal(block_pattern(grid, chosen), attention_pattern(grid)[0, chosen])


@pytest.mark.parametrize("name", ["block_sparse", "sdpa_dense", "flex_attention", "reference"])
def test_peers_attend_over_the_pattern_they_name(name, monkeypatch):
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: function
    )  # compiling takes longer than all else here
    grid = pruned_grid()
    states = torch.randn(3, 1, 2, grid.num_tokens, 16)
    peer = attention_peer(name, grid)
    pattern = peer.pattern(torch.arange(grid.num_tokens))
    torch.testing.assert_close(peer.attend(*states), dense_with(pattern, states))
    assert peer.pairs == pattern.sum()


class TestNatten:
    """NATTEN's own results were compared with this pattern by hand; here a stand-in computes them."""

    @pytest.fixture
    def natten(self, monkeypatch):
        def na2d(query, key, value, kernel_size, stride, additional_keys, additional_values, backend):
            """NATTEN's definition: groups of `stride` queries share the window around their middle one."""
            size = query.shape[1]
            middle = (torch.arange(size) // stride * stride + stride // 2).clamp(max=size - 1)
            start = (middle - kernel_size // 2).clamp(0, size - kernel_size)
            keys = torch.arange(size)
            near = (keys >= start[:, None]) & (keys < start[:, None] + kernel_size)  # (queries, keys) of one axis
            near = (near[:, None, :, None] & near[None, :, None, :]).reshape(size**2, size**2)
            near = torch.nn.functional.pad(near, (additional_keys.shape[1], 0), value=True)
            key = torch.cat([additional_keys, key.flatten(1, 2)], dim=1)
            value = torch.cat([additional_values, value.flatten(1, 2)], dim=1)
            states = [states.transpose(1, 2) for states in (query.flatten(1, 2), key, value)]
            return dense_with(near, states).transpose(1, 2).unflatten(1, (size, size))

        monkeypatch.setattr(attention_peers, "natten", types.SimpleNamespace(na2d=na2d, HAS_LIBNATTEN=True))

    @pytest.mark.parametrize("name", ["natten", "natten_sliding"])
    @pytest.mark.parametrize("side, window_size, radius", [(6, 2, 1), (9, 3, 1), (15, 4, 1), (24, 8, 1), (13, 2, 2)])
    def test_it_attends_over_the_pattern_it_names(self, side, window_size, radius, name, natten):
        grid = full_grid(side, window_size, radius)
        states = torch.randn(3, 1, 2, grid.num_tokens, 16)
        peer = attention_peer(name, grid)
        pattern = peer.pattern(torch.arange(grid.num_tokens))
        torch.testing.assert_close(peer.attend(*states), dense_with(pattern, states))
        assert peer.pairs == pattern.sum() >= attention_pairs(grid)

    @pytest.mark.parametrize("radius", [1, 2])
    def test_away_from_the_border_its_pattern_is_ours(self, radius, natten):
        grid = full_grid(24, 4, radius)
        border = 4 * radius
        inner = (torch.stack([grid.rows, grid.columns]) >= border).all(0)
        inner &= (torch.stack([grid.rows, grid.columns]) < 24 - border).all(0)
        # NATTEN's tokens are in raster order, ours block by block.
        raster = 3 + (grid.rows * 24 + grid.columns)
        order = torch.cat([torch.arange(3), raster])
        queries = 3 + inner.nonzero()[:, 0]
        pattern = attention_peer("natten", grid).pattern(raster[inner])
        assert torch.equal(pattern[:, order], block_pattern(grid, queries))

    def test_a_window_that_slides_lies_around_each_query(self, natten):
        grid = full_grid(12, 2)
        pattern = attention_peer("natten_sliding", grid).pattern(torch.tensor([3 + 5 * 12 + 7]))[0, 3:].view(12, 12)
        assert pattern[2:8, 4:10].all() and pattern.sum() == 36

    def test_where_it_does_not_apply(self, natten):
        with pytest.raises(DoesNotApplyError, match="no form for absent tokens"):
            attention_peer("natten", pruned_grid(side=12, window_size=4))
        with pytest.raises(DoesNotApplyError, match="an image of 3 x 3 blocks or more"):
            attention_peer("natten", full_grid(8, 4))

    def test_where_it_is_not_installed(self, monkeypatch):
        monkeypatch.setattr(attention_peers, "natten", None)
        with pytest.raises(DoesNotApplyError, match="NATTEN is not installed"):
            attention_peer("natten", full_grid(12, 4))
