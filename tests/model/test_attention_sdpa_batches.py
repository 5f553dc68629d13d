# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Tiles in batches: each tile is in one, with its own queries and keys, and sees no others."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from token_batches import batches

from sparsepath_vit import TokenGrid, block_attention
from sparsepath_vit.model import attention_products, attention_sdpa_batches, attention_sdpa_queries
from sparsepath_vit.model.attention_backend import prepared_grid
from sparsepath_vit.model.attention_products import TileProducts
from sparsepath_vit.model.attention_sdpa_batches import GatheredTiles, tile_batches
from sparsepath_vit.model.attention_sdpa_tables import near_keys, query_tiles, take_runs
from sparsepath_vit.model.attention_sdpa_tiles import SDPA_TILES
from sparsepath_vit.model.attention_specification import naive_block_attention

HEADS, HEAD_DIM = 2, 3


@pytest.fixture(autouse=True)
def tiles(block_attention_backend):
    """The backend that makes batches of tiles."""
    block_attention_backend("sdpa_tiles")


@given(batches(), st.integers(1, 5), st.integers(1, 4))
def test_each_tile_gets_its_own_queries_keys_and_mask(batch, most_tiles, min_tiles_of_a_size):
    grid = batch.grid()
    prepared = prepared_grid(SDPA_TILES, grid)
    tiles = [tile for tile in query_tiles(prepared) if tile.block_row >= 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_sdpa_batches, "MIN_TILES_OF_A_SIZE", min_tiles_of_a_size)
        of_tiles = list(tile_batches(tiles, lambda num_queries, num_keys: most_tiles))
    assert sorted(tile for part in of_tiles for tile in part.tiles) == sorted(tiles)
    if not tiles:
        return
    packed = [torch.randn(grid.num_tokens, HEADS, HEAD_DIM) for _ in range(3)]
    gathered = GatheredTiles(*packed, 0, prepared, of_tiles)
    for part in of_tiles:
        assert len(part.tiles) <= part.count <= most_tiles
        assert len({tile.image for tile in part.tiles}) == 1  # an image's batches do not depend on other images
        *states, mask = gathered.of(part)
        sizes = (part.num_queries, part.num_keys, part.num_keys)
        assert [tuple(of_part.shape) for of_part in states] == [(part.count, HEADS, size, HEAD_DIM) for size in sizes]
        for index, tile in enumerate(part.tiles):
            for of_part, of_all, runs in zip(states, packed, ([tile.queries], tile.keys, tile.keys), strict=True):
                expected = take_runs(of_all, runs).transpose(0, 1)
                torch.testing.assert_close(of_part[index, :, : expected.shape[1]], expected, rtol=0, atol=0)
            _check_mask(tile, part, None if mask is None else mask[index, 0], prepared)


def _check_mask(tile, part, mask, prepared):
    num_queries, num_keys = tile.queries[1] - tile.queries[0], tile.num_keys
    expected = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if tile.joins_blocks:
        expected = near_keys(tile, prepared, has_mean_queries=False)
    if mask is None:
        assert expected.all() and num_keys == part.num_keys
        return
    mask = mask.expand(part.num_queries, -1)[:num_queries]
    if mask.dtype == torch.bool:
        assert torch.equal(mask[:, :num_keys], expected) and not mask[:, num_keys:].any()
        return
    added = torch.where(expected, take_runs(prepared.tensors[2], tile.keys).float().log(), -torch.inf)
    torch.testing.assert_close(mask[:, :num_keys], added)
    assert (mask[:, num_keys:] == -torch.inf).all()


def test_full_blocks_are_computed_together_and_few_sizes_are_left():
    """Inside an image all blocks are alike; sizes that are rare are filled up."""
    prepared = prepared_grid(SDPA_TILES, TokenGrid.create([(72, 68)], num_global_tokens=5, window_size=8))
    tiles = [tile for tile in query_tiles(prepared) if tile.block_row >= 0]
    of_tiles = list(tile_batches(tiles, lambda num_queries, num_keys: 16))
    inside = [part for part in of_tiles if (part.num_queries, part.num_keys) == (64, 9 * 64 + 5)]
    assert [part.count for part in inside] == [16, 16, 4, 4, 1, 1]  # 7 x 6 blocks
    assert {part.count for part in of_tiles} == {16, 4, 1}
    assert len({(part.num_queries, part.num_keys) for part in of_tiles}) < 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("most_features", [1, 2**12, 2**30])
def test_batches_of_any_size_agree_with_the_specification(dtype, most_features, monkeypatch):
    monkeypatch.setattr(attention_sdpa_queries, "MOST_KEY_FEATURES", most_features)
    grid = TokenGrid.create([(21, 18), (9, 26)], num_global_tokens=3, window_size=4)
    keep = torch.rand(sum(grid.counts)) < 0.7
    kept = keep.nonzero()[:, 0]
    first = int(keep[: grid.counts[0]].sum())
    grid = grid.select(kept, [first, len(kept) - first])
    states = [torch.randn(1, HEADS, grid.num_tokens, 8, dtype=dtype) * 2 for _ in range(3)]
    packed = [part[0].transpose(0, 1).double() for part in states]
    expected = naive_block_attention(*packed, grid, scale=0.5).transpose(0, 1)[None]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    actual = block_attention(*states, grid, scale=0.5)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_a_tile_of_more_logits_than_fit_the_cache_is_computed_by_groups_of_heads(monkeypatch):
    query, key, value = (torch.randn(1, 5, size, 16).bfloat16() for size in (32, 64, 64))
    mask = torch.rand(1, 1, 32, 64) < 0.8
    at_once = TileProducts().attend_batch(query, key, value, mask, 0.25)
    monkeypatch.setattr(attention_products, "_MOST_LOGITS", 2 * 32 * 64)
    in_groups = TileProducts().attend_batch(query, key, value, mask, 0.25)
    torch.testing.assert_close(in_groups, at_once, rtol=0, atol=0)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(states.double() for states in (query, key, value)), attn_mask=mask, scale=0.25
    )
    assert (at_once.double() - expected).norm() < 0.004 * expected.norm()


def test_memory_made_at_inference_is_of_use_in_training():
    """What `torch.inference_mode` makes cannot be written to outside; the memory of a thread is kept."""
    states = [torch.randn(1, HEADS, 403, 16).bfloat16() for _ in range(3)]

    def attend(*states):
        return block_attention(*states, TokenGrid.create([(20, 20)], num_global_tokens=3, window_size=4), scale=0.25)

    with torch.inference_mode():
        expected = attend(*states)
    trained = [part.clone().requires_grad_() for part in states]
    output = attend(*trained)
    output.sum().backward()
    torch.testing.assert_close(output.detach(), expected.clone(), rtol=0, atol=0)
    assert all(part.grad.isfinite().all() for part in trained)
