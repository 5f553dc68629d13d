# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Context tokens found before the strips of a layer against those of the whole layer, which has all keys."""

import pytest
import torch
from small_models import random_mask, random_pixels, small_model
from torch import nn

from sparsepath_vit import SparsePathViTModel
from sparsepath_vit.model.attention_specification import naive_block_attention
from sparsepath_vit.model.mean_query_correction import mean_queries
from sparsepath_vit.model.streamed_context import strip_contexts
from sparsepath_vit.model.streamed_layers import streams

SIZES = [(76, 36), (60, 28)]


def layer_and_tokens(has_weights, dtype=torch.float64, **settings):
    """The second layer of a small model, packed hidden states, and the grid of two images."""
    model = small_model(SparsePathViTModel, num_context_tokens=30, **settings).to(dtype)
    pixels = random_pixels(2, 19, 9)
    grid = model.token_grid(pixels, patch_mask=random_mask(2, 19, 9, 0.8), image_sizes=SIZES)
    generator = torch.Generator().manual_seed(3)
    if has_weights:
        weights = torch.randint(1, 9, (len(grid.rows),), generator=generator)
        grid = grid.select(torch.arange(len(grid.rows)), grid.counts, weights)
    return model.encoder.layers[1], torch.randn(grid.num_tokens, 32, generator=generator).to(dtype), grid


@torch.no_grad()
@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize("most_tokens", [1, 20, 1000])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_they_are_those_of_the_whole_layer(has_weights, most_tokens, qkv_bias):
    layer, tokens, grid = layer_and_tokens(has_weights, qkv_bias=qkv_bias)
    attention = layer.attention
    states = attention.query_key_value(layer.norm1(tokens).view(*grid.batch_shape, 32))
    expected = attention.context_tokens(*states, grid)
    query, key, value = (one.transpose(1, 2).flatten(0, 1) for one in states)  # (M, heads, head_dim)
    means, start = mean_queries(query, grid), 0
    for image, found in enumerate(strip_contexts(layer, tokens, grid, most_tokens)):
        entries = slice(start, start + expected.counts[image])
        start = entries.stop
        for name in ("weights", "block_rows", "block_columns"):
            assert torch.equal(getattr(found, name), getattr(expected, name)[entries])
        places = expected.tokens[entries]
        torch.testing.assert_close(found.key, key[places], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.value, value[places], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.mean_query, means[image], rtol=1e-12, atol=1e-12)
        # The specification, asked at CLS's place, which sees all tokens.
        asked = query.clone()
        asked[grid.image_offsets[image]] = means[image]
        of_mean = naive_block_attention(asked, key, value, grid, attention.scaling, context=expected)
        torch.testing.assert_close(found.of_mean, of_mean[grid.image_offsets[image]], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_narrow_dtypes_are_as_near_as_they_can_be(dtype, tolerance):
    layer, tokens, grid = layer_and_tokens(False, dtype)
    exact_layer, exact_tokens = layer_and_tokens(False)[0], tokens.double()
    exact_layer.load_state_dict(layer.state_dict())
    for found, wanted in zip(
        strip_contexts(layer, tokens, grid, 50), strip_contexts(exact_layer, exact_tokens, grid, 50), strict=True
    ):
        assert found.key.dtype == found.mean_query.dtype == dtype and found.of_mean.dtype == torch.float32
        for name in ("mean_query", "of_mean"):
            error = (getattr(found, name).double() - getattr(wanted, name)).abs().max()
            assert error <= tolerance * getattr(wanted, name).abs().max(), name


@torch.no_grad()
def test_a_second_run_is_bitwise_the_same():
    layer, tokens, grid = layer_and_tokens(True, torch.float32)
    first, second = (strip_contexts(layer, tokens, grid, 20) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@torch.no_grad()
def test_layers_whose_keys_are_no_product_run_whole():
    """As with an adapter or quantised weights: a logit is not known without the key."""

    class Adapted(nn.Linear):
        def forward(self, states):
            return super().forward(states) + 1

    model = small_model(SparsePathViTModel, num_context_tokens=30, tokens_per_strip=30)
    grid, tokens = model.token_grid(random_pixels(1, 19, 9)), torch.zeros(1, 174, 32)
    model.encoder.layers[1].attention.qkv = Adapted(32, 96)
    assert [streams(layer, tokens, grid) for layer in model.encoder.layers] == [True, False, True, True]
