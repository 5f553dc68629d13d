# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Stratified attention of every backend and implementation against a loop that follows its definition."""

import dataclasses
import logging
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import random_mask
from stratified_definition import (
    attention_by_loop,
    biased_attention,
    context_with,
    contexts_of,
    grid_with,
    ones,
    random_scores,
    random_weights,
)
from token_batches import Batch, batches, in_grid_order, in_raster_order, raster_tokens
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsepath_vit import TokenGrid, block_attention, set_block_attention_backend
from sparsepath_vit.model import attention_backends, attention_sdpa_probabilities, attention_sdpa_tables
from sparsepath_vit.model.attention_backend import LayerContext, prepared_grid
from sparsepath_vit.model.attention_dense import dense_stratified_attention, eager_attention_forward
from sparsepath_vit.model.attention_registration import ATTENTION_NAME
from sparsepath_vit.model.attention_sdpa_keys import TileKeys, TileMasks
from sparsepath_vit.model.attention_sdpa_tables import query_tiles
from sparsepath_vit.model.attention_sdpa_tiles import SDPA_TILES
from sparsepath_vit.model.attention_specification import attention_bias, attention_pattern
from sparsepath_vit.model.context_tokens import draw_context_tokens, num_exact_tokens

HEADS, HEAD_DIM = 2, 4
BACKENDS = ("sdpa_tiles", "reference")
# Largest error relative to the largest number of the output.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
NUMBERS = st.sampled_from([0, 1, 3, 5, 9, 20, 1000])  # with these sizes: cells above, equal to and below the block

# Several blocks beyond the neighbourhood on all sides; "below" has cells smaller than a block, "above" larger ones.
FIXED = {
    "ragged, below": Batch([(11, 9), (6, 13)], random_mask(2, 11, 13, 0.7), 2, 1, 3, 200),
    "uniform, equal": Batch([(12, 15), (12, 15)], None, 3, 1, 2, 20),
    "radius 0, above": Batch([(12, 12)], None, 2, 0, 1, 9),
    "radius 2, below": Batch([(14, 16)], None, 2, 2, 1, 1000),
}


@pytest.fixture(autouse=True)
def automatic_backend():
    yield
    set_block_attention_backend("auto")


@st.composite
def weighted_batches(draw, max_side=7, max_images=3):
    """A batch with context tokens, the weights of its tokens and its grid; some weigh nothing but 1."""
    batch = draw(batches(max_side, max_images))._replace(num_context_tokens=draw(NUMBERS))
    if draw(st.booleans()):
        return batch, ones(batch), batch.grid()
    weights = random_weights(batch, draw(st.integers(0, 99)))
    return batch, weights, grid_with(batch, weights)


def random_states(batch, seed=0, dtype=torch.float64, head_dim=HEAD_DIM):
    """Query, key and value, each (heads, M, head_dim) in raster order, large enough for peaked attention."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(len(raster_tokens(batch, image)) for image in range(len(batch.sizes)))
    return [
        (2.0 * torch.randn(HEADS, tokens, head_dim, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(3)
    ]


def attend(states, batch, grid, scores=None, draw_number=0, **arguments):
    """`block_attention` of (heads, M, head_dim) states in raster order, likewise; exact tokens have high scores."""
    context = context_with(batch, grid, random_scores(batch) if scores is None else scores, draw_number)
    states = [in_grid_order(state, batch, grid) for state in states]
    return in_raster_order(block_attention(*states, grid, context=context, **arguments), batch, grid)


def contexts(batch, weights, draw_number=0):
    """Those that `attend` uses, by definition."""
    return contexts_of(batch, weights, random_scores(batch), draw_number)


def assert_close(actual, expected, dtype=torch.float64, factor=1.0):
    error = (actual.double() - expected.double()).abs().max()
    assert error <= factor * TOLERANCES[dtype] * expected.abs().max(), f"error {error:.1e}"


@settings(max_examples=60)
@given(weighted_batches(), st.integers(0, 99), st.sampled_from([1, 8, 32]))
def test_sdpa_tiles_and_reference_follow_the_definition(case, seed, queries_per_tile):
    batch, weights, grid = case
    states, draw_number = random_states(batch, seed), seed % 3
    of_images = contexts(batch, weights, draw_number)
    expected = attention_by_loop(*states, batch, weights, of_images, 0.5)
    assert_close(biased_attention(*states, batch, weights, of_images, 0.5), expected)
    for backend in BACKENDS:
        set_block_attention_backend(backend)
        with mock.patch.object(attention_sdpa_tables, "MIN_QUERIES_PER_TILE", queries_per_tile):
            grid.prepared.clear()
            assert_close(attend(states, batch, grid, draw_number=draw_number, scale=0.5), expected)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("queries_per_tile", [1, 32])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", FIXED.values(), ids=FIXED)
def test_larger_grids_follow_the_definition_forward_and_backward(batch, backend, queries_per_tile, is_weighted):
    weights = random_weights(batch, 1) if is_weighted else ones(batch)
    grid = grid_with(batch, weights) if is_weighted else batch.grid()
    states = [state.requires_grad_() for state in random_states(batch)]
    factors = torch.randn_like(states[0])
    expected = biased_attention(*states, batch, weights, contexts(batch, weights), 0.5)
    expected_gradients = torch.autograd.grad((expected * factors).sum(), states)
    set_block_attention_backend(backend)
    with mock.patch.object(attention_sdpa_tables, "MIN_QUERIES_PER_TILE", queries_per_tile):
        output = attend(states, batch, grid, scale=0.5)
    assert_close(output, expected)
    for gradient, wanted in zip(torch.autograd.grad((output * factors).sum(), states), expected_gradients, strict=True):
        assert_close(gradient, wanted)


@settings(max_examples=20)
@given(weighted_batches(max_side=6), st.integers(0, 99), st.sampled_from([3, 128]))
def test_gradients_are_those_of_the_definition(case, seed, queries_at_once):
    batch, weights, grid = case
    states = [state.requires_grad_() for state in random_states(batch, seed)]
    factors = torch.randn_like(states[0])
    expected = biased_attention(*states, batch, weights, contexts(batch, weights), 0.5)
    expected = torch.autograd.grad((expected * factors).sum(), states)
    for backend in BACKENDS:
        set_block_attention_backend(backend)
        output = attend(states, batch, grid, scale=0.5)
        with mock.patch.object(attention_sdpa_probabilities, "MAX_QUERIES_AT_ONCE", queries_at_once):
            gradients = torch.autograd.grad((output * factors).sum(), states)
        scale = max(gradient.abs().max() for gradient in expected)
        for gradient, wanted in zip(gradients, expected, strict=True):
            assert (gradient - wanted).abs().max() <= 1e-12 * scale


@settings(max_examples=30)
@given(weighted_batches(), st.sampled_from([1, 3, 32]))
def test_tiles_hold_each_query_once_and_add_what_the_specification_adds(case, queries_per_tile):
    batch, _, grid = case
    with mock.patch.object(attention_sdpa_tables, "MIN_QUERIES_PER_TILE", queries_per_tile):
        prepared = prepared_grid(SDPA_TILES, grid)
    context = context_with(batch, grid, random_scores(batch))
    bias = attention_bias(grid, torch.float64, context)
    assert torch.equal(attention_pattern(grid, context), bias > -torch.inf)
    if context is not None:
        context = LayerContext(*context, torch.zeros(len(batch.sizes), HEADS, HEAD_DIM))
    added = torch.full((grid.num_tokens, grid.num_tokens), -torch.inf, dtype=torch.float64)
    occurrences = torch.zeros(grid.num_tokens, dtype=torch.int64)
    tiles = list(query_tiles(prepared))
    masks = TileMasks(prepared, tiles, context, torch.float64)
    indices = TileKeys([torch.arange(grid.num_tokens)[:, None, None]], tiles, context)
    for tile in tiles:
        keys, mask = indices.of(tile)[0][0, :, 0], masks.of(tile)
        shape = (tile.queries[1] - tile.queries[0], len(keys))
        if mask is None or mask.dtype == torch.bool:
            mask = torch.zeros(1, len(keys), dtype=torch.float64) if mask is None else mask.double().log()
        rows = added[slice(*tile.queries)]
        # A context token inside the neighbourhood is there twice, once with -inf; rows of mean queries come last.
        rows.scatter_reduce_(1, keys.expand(shape), mask[: shape[0]].expand(shape), "amax")
        occurrences[slice(*tile.queries)] += 1
    assert (occurrences == 1).all()
    expected = torch.full_like(added, -torch.inf)
    for image, (start, end) in enumerate(zip(grid.image_offsets[:-1], grid.image_offsets[1:], strict=True)):
        part = bias[image] if grid.is_uniform else bias[0, start:end, start:end]
        expected[start:end, start:end] = part
    torch.testing.assert_close(added, expected, rtol=0, atol=1e-12)


def test_tiles_of_one_block_have_no_mask_over_queries():
    grid = TokenGrid.create([(48, 48)], num_global_tokens=2, window_size=8, num_context_tokens=144 + 63)
    prepared, context = prepared_grid(SDPA_TILES, grid), draw_context_tokens(grid)
    context = LayerContext(*context, torch.zeros(1, HEADS, HEAD_DIM))
    tiles = list(query_tiles(prepared))
    of_tiles = TileMasks(prepared, tiles, context, torch.float32)
    masks = [of_tiles.of(tile) for tile in tiles]
    assert len(tiles) == 37 and masks[0] is None and all(len(mask) == 1 for mask in masks[1:])
    places = [(tile.block_row, *tile.block_columns) for tile in tiles]
    inner = masks[places.index((2, 2, 2))]
    assert context.counts == (144,) and (inner[0, :144] > -torch.inf).sum() == 144 - 9 * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_context_token_for_every_patch_token_is_dense_attention(backend):
    grid = TokenGrid.create([(21, 17)] * 2, num_global_tokens=3, window_size=4, num_context_tokens=21 * 17)
    assert not grid.is_dense
    states = [torch.randn(2, 3, 3 + 21 * 17, 8, dtype=torch.float64) for _ in range(3)]
    set_block_attention_backend(backend)
    assert num_exact_tokens(grid) == (0, 0)
    output = block_attention(*states, grid, context=draw_context_tokens(grid))
    assert_close(output, nn.functional.scaled_dot_product_attention(*states))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", FIXED.values(), ids=FIXED)
def test_a_query_that_equals_the_mean_query_gets_what_all_tokens_give(batch, backend):
    """However bad the sample is; the weights of the tokens do not matter to the mean of equal queries."""
    grid = grid_with(batch, random_weights(batch, 1))
    query, key, value = (in_grid_order(state, batch, grid) for state in random_states(batch))
    query = query[:, :, :1].expand_as(query).contiguous()
    dense = dataclasses.replace(grid, neighbor_radius=100)  # every block is near
    set_block_attention_backend(backend)
    output = block_attention(query, key, value, grid, context=context_with(batch, grid, random_scores(batch)))
    assert_close(output, block_attention(query, key, value, dense))
    local = block_attention(query, key, value, dataclasses.replace(grid, num_context_tokens=0))
    assert (output - local).abs().max() > 0.1


@settings(max_examples=20)
@given(weighted_batches(), st.integers(0, 99))
def test_images_of_a_batch_give_what_they_give_alone(case, seed):
    batch, weights, grid = case
    states = random_states(batch, seed)
    scores = random_scores(batch, seed)
    output, start = attend(states, batch, grid, scores), 0
    for image, size in enumerate(batch.sizes):
        end = start + len(raster_tokens(batch, image))
        present = None if batch.present is None else batch.present[image : image + 1]
        alone = batch._replace(sizes=[size], present=present)
        alone_grid = grid_with(alone, weights[image : image + 1])
        alone_states = [state[:, start:end] for state in states]
        assert_close(output[:, start:end], attend(alone_states, alone, alone_grid, scores[image : image + 1]))
        start = end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", list(FIXED.values())[:2], ids=list(FIXED)[:2])
def test_lower_precision_stays_close_forward_and_backward(batch, backend, dtype):
    weights = random_weights(batch, 2, largest=50)
    grid = grid_with(batch, weights)
    states = [state.requires_grad_() for state in random_states(batch, dtype=dtype, head_dim=16)]
    factors = torch.randn(states[0].shape).to(dtype)
    expected = biased_attention(*states, batch, weights, contexts(batch, weights), 0.25)
    expected_gradients = torch.autograd.grad((expected * factors).sum(), states)
    set_block_attention_backend(backend)
    output = attend(states, batch, grid, scale=0.25)
    assert output.dtype == dtype
    assert_close(output, expected, dtype)
    gradients = torch.autograd.grad((output * factors).sum(), states)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient, wanted, dtype, factor=4)


def test_a_second_run_is_bitwise_the_same():
    batch = FIXED["ragged, below"]
    states = [state.requires_grad_() for state in random_states(batch, dtype=torch.float32)]

    def run():
        output = attend(states, batch, batch.grid())
        return [output, *torch.autograd.grad(output.square().sum(), states)]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention", ATTENTION_NAME])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", list(FIXED.values())[:2], ids=list(FIXED)[:2])
def test_every_implementation_follows_the_definition(name, dtype, batch):
    weights = random_weights(batch, 4)
    grid = grid_with(batch, weights)
    states = random_states(batch, dtype=dtype, head_dim=16)
    grid_states = [in_grid_order(state, batch, grid) for state in states]
    function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    context = context_with(batch, grid, random_scores(batch))
    module = nn.Module().eval()
    module.is_causal = False
    # Compiling flex_attention takes a minute and a half on a CPU; uncompiled it computes the same.
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        if name == ATTENTION_NAME:
            numbers = {"scaling": 0.25, "dropout": 0.0}
            output, _ = function(module, *grid_states, None, **numbers, token_grid=grid, context_tokens=context)
        else:
            output, _ = dense_stratified_attention(name, function, module, *grid_states, grid, context, 0.25, 0.0)
    expected = biased_attention(*states, batch, weights, contexts(batch, weights), 0.25)
    assert_close(in_raster_order(output.transpose(1, 2), batch, grid), expected, dtype)


class TestDropout:
    @pytest.mark.parametrize("batch", list(FIXED.values())[:2], ids=list(FIXED)[:2])
    @pytest.mark.parametrize("queries_per_tile", [1, 32])
    def test_the_backward_draws_what_the_forward_drew(self, batch, queries_per_tile):
        """With the same probabilities dropped the output is linear in the values, so <grad_v, v> = <out, grad>."""
        grid = grid_with(batch, random_weights(batch, 5))
        states = [state.requires_grad_() for state in random_states(batch)]
        with mock.patch.object(attention_sdpa_tables, "MIN_QUERIES_PER_TILE", queries_per_tile):
            output = attend(states, batch, grid, dropout=0.4)
        factors = torch.randn_like(output)
        (grad_value,) = torch.autograd.grad((output * factors).sum(), states[2:])
        torch.testing.assert_close((grad_value * states[2]).sum(), (output * factors).sum(), rtol=1e-10, atol=0)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_its_mean_is_the_attention_without(self, backend):
        set_block_attention_backend(backend)
        image = Batch([(8, 6)], None, 2, 0, 2, 12)
        weights = random_weights(image, 6)
        copies = image._replace(sizes=image.sizes * 100)
        states = random_states(image)
        scores = random_scores(image)
        expected = attend(states, image, grid_with(image, weights), scores)
        repeated = [state.repeat(1, 100, 1) for state in states]
        drawn = attend(repeated, copies, grid_with(copies, weights * 100), scores * 100, dropout=0.3)
        drawn = drawn.view(HEADS, 100, -1, HEAD_DIM).transpose(0, 1)
        assert (drawn.std(dim=0) > 0.01).float().mean() > 0.9
        deviation = (drawn.mean(dim=0) - expected) / (drawn.std(dim=0) / 100**0.5)
        assert deviation.abs().max() < 6
        assert 0.8 < deviation.std() < 1.2

    def test_gradients_are_finite_differences(self):
        batch = Batch([(7, 5)], None, 2, 0, 2, 12)
        grid = grid_with(batch, random_weights(batch, 7))

        def function(*states):
            torch.manual_seed(5)
            return attend(states, batch, grid, dropout=0.4)

        states = [state.requires_grad_() for state in random_states(batch)]
        torch.autograd.gradcheck(function, states, fast_mode=True, atol=1e-6, rtol=1e-6)


class TestBackends:
    def test_where_a_backend_takes_no_weighted_keys_the_tiles_run_and_say_so(self, monkeypatch, caplog):
        without = dataclasses.replace(attention_backends.TRITON, takes_key_weights=False)
        backends = {"triton": without, "sdpa_tiles": SDPA_TILES}  # a dict of its own: the order decides
        monkeypatch.setattr(attention_backends, "BACKENDS", backends)
        monkeypatch.setattr(attention_backends, "_missing", lambda name, device: None)
        monkeypatch.setattr(attention_backends, "_unwanted", lambda name, device: None)
        attention_backends._log_once.cache_clear()
        grid = TokenGrid.create([(12, 12)], num_global_tokens=1, window_size=2, num_context_tokens=9)
        query = torch.randn(1, 2, 145, 16)
        assert attention_backends.backend_for(query, 0.0, False) == "triton"
        with caplog.at_level(logging.WARNING):
            assert attention_backends.backend_for(query, 0.0, grid.weighs_keys) == "sdpa_tiles"
            context = draw_context_tokens(grid)
            assert torch.isfinite(block_attention(query, query, query, grid, context=context)).all()
        said = [record.getMessage() for record in caplog.records if "weighted keys" in record.getMessage()]
        assert said == [
            "block_sparse: the Triton kernel has no weighted keys (num_context_tokens, num_representatives); left to "
            "the tiles of SDPA calls."
        ]

    @pytest.mark.parametrize("is_weighted", [False, True])
    def test_the_operator_passes_the_checks_of_torch(self, is_weighted):
        from sparsepath_vit.model.attention_operator import _block_attention

        batch = FIXED["ragged, below"]
        grid = grid_with(batch, random_weights(batch, 1)) if is_weighted else batch.grid()
        states = [torch.randn(grid.num_tokens, 2, 16, requires_grad=True) for _ in range(3)]
        prepared = prepared_grid(SDPA_TILES, grid)
        context = context_with(batch, grid, random_scores(batch))
        mean_query = torch.randn(2, 2, 16, requires_grad=True)
        layer_context = (list(context[:-1]), list(context.counts), mean_query)
        torch.library.opcheck(_block_attention, (*states, *prepared, *layer_context, 0.25, 0.0, None, "sdpa_tiles"))
        block_counts = [count for counts in grid.block_counts for count in counts]
        numbers = (block_counts, list(grid.image_offsets), grid.num_global_tokens, grid.neighbor_radius, 32)
        torch.library.opcheck(attention_sdpa_tables._tile_table, (grid.block_offsets, *numbers))

    def test_a_grid_that_asks_for_context_tokens_gets_them(self):
        grid = TokenGrid.create([(12, 12)] * 2, num_global_tokens=1, window_size=2, num_context_tokens=9)
        states = [torch.randn(2, 2, 145, 16)] * 3
        with pytest.raises(ValueError, match="context is None, but the grid asks for num_context_tokens=9: pass draw_"):
            block_attention(*states, grid)
        other = TokenGrid.create([(12, 12)], num_global_tokens=1, window_size=2, num_context_tokens=9)
        with pytest.raises(ValueError, match=r"context has 4 entries, \(4,\) of the images, and the grid 2 images"):
            block_attention(*states, grid, context=draw_context_tokens(other))
