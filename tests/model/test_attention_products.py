# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Attention by explicit products in bfloat16: as near to float64 as SDPA is, whatever the tile."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from token_batches import Batch, batches

from sparsepath_vit import TokenGrid, block_attention
from sparsepath_vit.model import attention_sdpa_queries, attention_sdpa_tables
from sparsepath_vit.model.attention_backend import prepared_grid
from sparsepath_vit.model.attention_products import MULTIPLE_OF_KEYS, TileProducts, products_are_faster
from sparsepath_vit.model.attention_sdpa_keys import TileKeys
from sparsepath_vit.model.attention_sdpa_tables import query_tiles
from sparsepath_vit.model.attention_sdpa_tiles import SDPA_TILES
from sparsepath_vit.model.attention_specification import naive_block_attention
from sparsepath_vit.model.context_tokens import draw_context_tokens

HEADS, HEAD_DIM = 3, 64
needs_bfloat16 = pytest.mark.skipif(
    not products_are_faster(torch.empty(0, dtype=torch.bfloat16)), reason="this CPU attends by SDPA"
)


def random_states(*shape, size=1.0):
    """Fresh in each run, in bfloat16."""
    return (torch.randn(shape) * size).bfloat16()


def error(output, exact):
    return ((output.double() - exact).norm() / exact.norm()).item()


@pytest.fixture(autouse=True)
def tiles(block_attention_backend):
    """The backend that computes with products."""
    block_attention_backend("sdpa_tiles")


@needs_bfloat16
@pytest.mark.parametrize("size", [0.3, 1.0, 2.6])  # logits up to about 0.5, 5 and 35
@pytest.mark.parametrize(("num_queries", "num_keys"), [(64, 585), (65, 1609), (9, 4100), (36, 203), (1, 1), (320, 400)])
@pytest.mark.parametrize("kind", ["all", "bool", "a number a key", "a number a pair"])
def test_products_are_as_near_to_float64_as_sdpa(size, num_queries, num_keys, kind):
    query = random_states(num_queries, HEADS, HEAD_DIM, size=size)
    key, value = random_states(HEADS, num_keys, HEAD_DIM, size=size), random_states(HEADS, num_keys, HEAD_DIM)
    mask = {
        "all": None,
        "bool": torch.rand(num_queries, num_keys) < 0.7,
        "a number a key": torch.rand(1, num_keys) * 5,
        "a number a pair": torch.where(torch.rand(num_queries, num_keys) < 0.7, torch.rand(num_keys), -torch.inf),
    }[kind]
    if mask is not None and kind != "a number a key":
        mask[:, 0] = 1  # each query sees something
    filled_up = [torch.nn.functional.pad(states, (0, 0, 0, -num_keys % MULTIPLE_OF_KEYS)) for states in (key, value)]
    attended, logsumexp = TileProducts().attend(query, *filled_up, num_keys, mask, 0.125)

    query = query.transpose(0, 1)
    logits = query.double() @ key.double().mT * 0.125
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if kind == "bool" else logits + mask
    exact = logits.softmax(dim=-1) @ value.double()
    by_sdpa = torch.nn.functional.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, scale=0.125
    )[0]
    # Rounding the output costs 0.0017 alone; where few keys count, so does rounding normalised probabilities.
    assert error(attended.transpose(0, 1), exact) <= max(1.3 * error(by_sdpa, exact), 0.0025)
    torch.testing.assert_close(logsumexp.double(), logits.logsumexp(dim=-1), rtol=2**-16, atol=1e-4)


def attend(grid, states, context=None):
    return block_attention(*states, grid, context=context, scale=0.125)


def some_grid(sizes, num_context_tokens=0, is_pruned=False):
    grid = TokenGrid.create(sizes, num_global_tokens=5, window_size=8, num_context_tokens=num_context_tokens)
    if not is_pruned:
        return grid
    generator = torch.Generator().manual_seed(0)
    counts = [int(0.4 * count) for count in grid.counts]
    starts = [sum(grid.counts[:image]) for image in range(len(sizes))]
    kept = [
        torch.randperm(count, generator=generator)[:left].sort().values + start
        for count, left, start in zip(grid.counts, counts, starts, strict=True)
    ]
    return grid.select(torch.cat(kept), counts)


@needs_bfloat16
@pytest.mark.parametrize("is_pruned", [False, True])
@pytest.mark.parametrize("num_context_tokens", [0, 80])
def test_a_grid_by_products_is_as_near_to_float64_as_by_sdpa(is_pruned, num_context_tokens, monkeypatch):
    grid = some_grid([(37, 52)], num_context_tokens, is_pruned)
    context = draw_context_tokens(grid) if num_context_tokens else None
    batch, tokens = grid.batch_shape
    states = [random_states(batch, HEADS, tokens, HEAD_DIM, size=size) for size in (1.5, 1.5, 1.0)]
    packed = (part[0].transpose(0, 1).double() for part in states)
    exact = naive_block_attention(*packed, grid, scale=0.125, context=context).transpose(0, 1)[None]
    by_products = attend(grid, states, context)
    assert torch.equal(by_products, attend(grid, states, context))  # bit by bit, run to run
    monkeypatch.setattr(attention_sdpa_queries, "products_are_faster", lambda query: False)
    by_sdpa = attend(grid, states, context)
    assert not torch.equal(by_products, by_sdpa)
    assert error(by_products, exact) <= 1.3 * error(by_sdpa, exact) < 0.01


@needs_bfloat16
def test_an_image_of_a_batch_gets_what_it_gets_alone_bit_by_bit():
    sizes = [(37, 52), (20, 52), (37, 30)]
    images = [random_states(3, HEADS, 5 + rows * columns, HEAD_DIM) for rows, columns in sizes]
    packed = torch.cat(images, dim=2)
    together = attend(some_grid(sizes), [states[None] for states in packed])
    alone = [
        attend(some_grid([size]), [states[None] for states in image]) for size, image in zip(sizes, images, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone, dim=2))


@given(batches(), st.integers(1, 4))
@example(Batch([(3, 9)], None, 1, 1, 2), 4)
@example(Batch([(2, 9), (5, 11)], None, 1, 2, 1), 1)
def test_keys_that_stay_from_tile_to_tile_are_the_tile_s_keys(batch, multiple):
    grid = batch.grid()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_sdpa_tables, "MIN_QUERIES_PER_TILE", 1)
        tiles = list(query_tiles(prepared_grid(SDPA_TILES, grid)))
    numbers = torch.arange(1, grid.num_tokens + 1)[:, None, None]  # 0 stands for none
    keys = TileKeys([numbers, -numbers], tiles, multiple=multiple)
    for tile in tiles:
        expected = torch.cat([torch.arange(start + 1, end + 1) for start, end in tile.keys])
        kept, negated = (states[0, :, 0] for states in keys.filled_up(tile, in_order=False))
        assert torch.equal(kept, -negated) and len(kept) % multiple == 0
        assert torch.equal(kept[: tile.num_keys].sort().values, expected) and not kept[tile.num_keys :].any()
