# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Context tokens and representatives in whole models: what they equal, what they weigh, and what stays as it was."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import random_mask, random_pixels, small_config, small_model
from stratified_definition import (
    cell_side,
    context_with,
    grid_with,
    left_after_pruning,
    ones,
    random_weights,
    scores_by_definition,
)
from token_batches import Batch, batches, in_grid_order, raster_tokens

from sparsepath_vit import (
    SparsePathViTBackbone,
    SparsePathViTConfig,
    SparsePathViTForImageClassification,
    SparsePathViTModel,
    set_block_attention_backend,
)
from sparsepath_vit.model.token_pruning import EncodedTokens, kept_tokens, prune, prune_scores

STRATIFIED = {"num_context_tokens": 30, "prune_ratio": 0.6, "num_representatives": 12, "pooling": "cls_mean"}
RAGGED = {"patch_mask": random_mask(2, 23, 18, 0.7), "image_sizes": [(92, 72), (60, 50)]}


@settings(max_examples=60)
@given(
    batches(), st.integers(0, 99), st.sampled_from([0.25, 0.6, 0.9]), st.sampled_from([1, 4, 9, 1000]), st.booleans()
)
def test_pruning_leaves_the_kept_tokens_and_a_removed_one_a_cell(batch, seed, prune_ratio, number, is_weighted):
    weights = random_weights(batch, seed) if is_weighted else ones(batch)
    grid = grid_with(batch, weights) if is_weighted else batch.grid()
    scores = torch.rand(sum(grid.counts), generator=torch.Generator().manual_seed(seed))
    tokens = EncodedTokens(torch.randn(*grid.batch_shape, 3), grid)
    pruned = prune(tokens, scores, prune_ratio, keeps_removed=False, num_representatives=number)
    kept, counts = kept_tokens(scores, grid, prune_ratio)
    left, expected = pruned.grid, {}
    places = list(zip(*(part[kept].tolist() for part in (grid.images(), grid.rows, grid.columns)), strict=True))
    for image in range(len(batch.sizes)):
        side = cell_side(*batch.sizes[image], number)
        chosen = {(row, column) for one, row, column in places if one == image}
        assert len(chosen) == counts[image]
        for token, weight in left_after_pruning(weights[image], chosen, side).items():
            expected[image, *token] = weight
    left_places = zip(left.images().tolist(), left.rows.tolist(), left.columns.tolist(), strict=True)
    left_weights = [1] * len(expected) if left.weights is None else left.weights.tolist()
    assert dict(zip(left_places, left_weights, strict=True)) == expected
    assert sum(expected.values()) == sum(sum(image.values()) for image in weights)
    # The features are those of the tokens that are left, at their places.
    all_features = tokens.hidden_states.reshape(grid.num_tokens, 3)[grid.patch_indices()[pruned.pruning.kept]]
    features = pruned.hidden_states.reshape(left.num_tokens, 3)[left.patch_indices()]
    assert torch.equal(features, all_features)


@pytest.mark.parametrize("kind", ["attention", "cls_attention", "attention_value"])
@settings(max_examples=20)
@given(batch=batches(), seed=st.integers(0, 99))
def test_scores_count_a_key_as_often_as_its_weight(kind, batch, seed):
    """A softmax over keys of which each is written down as often as it counts."""
    weights = random_weights(batch, seed)
    grid = grid_with(batch, weights)
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(len(raster_tokens(batch, image)) for image in range(len(batch.sizes)))
    states = [2.0 * torch.randn(2, num_tokens, 4, generator=generator) for _ in range(3)]
    scores = prune_scores(*(in_grid_order(one, batch, grid) for one in states), grid, scale=0.5, kind=kind)
    places = zip(grid.images().tolist(), grid.rows.tolist(), grid.columns.tolist(), strict=True)
    actual, start = dict(zip(places, scores.tolist(), strict=True)), 0
    num_queries = 1 if kind == "cls_attention" else batch.num_global_tokens
    for image in range(len(batch.sizes)):
        tokens = raster_tokens(batch, image)
        repeats = torch.tensor([1 if token is None else weights[image][token] for token in tokens])
        query, key, value = (one[:, start : start + len(tokens)].double() for one in states)
        copies = torch.repeat_interleave(torch.arange(len(tokens)), repeats)
        probabilities = (query[:, :num_queries] @ key[:, copies].mT * 0.5).softmax(dim=-1)
        received = torch.zeros(2, num_queries, len(tokens), dtype=torch.float64).index_add(2, copies, probabilities)
        if kind == "attention_value":
            received = received * value.norm(dim=-1)[:, None]
        for token, score in zip(tokens, received.mean(dim=(0, 1)).tolist(), strict=True):
            if token is not None:
                assert actual[image, *token] == pytest.approx(score, rel=1e-5, abs=1e-7)
        start += len(tokens)


@torch.no_grad()
@pytest.mark.parametrize("rows, columns", [(23, 18), (40, 33)])
def test_a_sample_of_every_token_is_the_dense_unpruned_model(rows, columns):
    pixels = random_pixels(2, rows, columns)
    dense = small_model(SparsePathViTModel, window_size=None, pooling="cls_mean")(pixels)
    number = rows * columns
    numbers = {"num_context_tokens": number, "num_representatives": number}
    outputs = small_model(SparsePathViTModel, prune_ratio=0.6, pooling="cls_mean", **numbers)(pixels)
    assert outputs.patch_weights is None  # each stands for itself
    torch.testing.assert_close(outputs.last_hidden_state, dense.last_hidden_state, rtol=0, atol=2e-5)
    torch.testing.assert_close(outputs.pooler_output, dense.pooler_output, rtol=0, atol=2e-5)
    local = small_model(SparsePathViTModel, pooling="cls_mean")(pixels)
    assert (local.pooler_output - dense.pooler_output).abs().max() > 0.1


@torch.no_grad()
def test_weights_say_what_stands_for_what_and_the_mean_follows_them():
    pixels = random_pixels(2, 23, 18)
    model = small_model(SparsePathViTModel, **STRATIFIED)
    outputs = model(pixels, **RAGGED)
    mask = RAGGED["patch_mask"].clone()
    mask[1, 15:], mask[1, :, 13:] = False, False
    present = mask.sum(dim=(1, 2))
    weights, positions = outputs.patch_weights, outputs.patch_positions
    assert weights.dtype == torch.int64 and weights.shape == positions.shape[:2]
    assert weights.sum(dim=1).tolist() == present.tolist()
    assert torch.equal(weights > 0, positions[..., 0] >= 0)
    for image in range(2):
        kept = present[image] - math.floor(0.6 * present[image])
        assert kept < (weights[image] > 0).sum() <= kept + 12
        assert (weights[image] == 1).sum() >= kept and weights[image].max() > 1
        features = outputs.last_hidden_state[image, 3 : 3 + len(weights[image])]
        expected = sum(weight * one for weight, one in zip(weights[image], features, strict=True)) / present[image]
        torch.testing.assert_close(outputs.pooler_output[image, 32:], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_without_representatives_nothing_has_weights():
    for overrides in ({}, {"prune_ratio": 0.5}, {"num_context_tokens": 20}, {"num_representatives": 5}):
        assert small_model(SparsePathViTModel, **overrides)(random_pixels(1, 12, 12)).patch_weights is None


@torch.no_grad()
@pytest.mark.parametrize("name", ["block_sparse", "eager", "sdpa", "reference"])
def test_an_image_gives_the_same_alone_in_a_batch_and_on_every_implementation(name):
    pixels = random_pixels(2, 23, 18)
    model = small_model(SparsePathViTModel, **STRATIFIED)
    expected = model(pixels, **RAGGED)
    if name == "reference":
        set_block_attention_backend("reference")
    else:
        model.set_attn_implementation(name)
    try:
        for image, (height, width) in enumerate(RAGGED["image_sizes"]):
            canvas = -(-height // 4) * 4, -(-width // 4) * 4
            alone = model(
                pixels[image : image + 1, :, : canvas[0], : canvas[1]],
                patch_mask=RAGGED["patch_mask"][image : image + 1, : canvas[0] // 4, : canvas[1] // 4],
                image_sizes=[(height, width)],
            )
            number = alone.patch_weights.shape[1]
            assert torch.equal(alone.patch_weights[0], expected.patch_weights[image, :number])
            assert torch.equal(alone.patch_positions[0], expected.patch_positions[image, :number])
            for wanted, found in (
                (expected.last_hidden_state[image, : 3 + number], alone.last_hidden_state[0]),
                (expected.pooler_output[image], alone.pooler_output[0]),
            ):
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    finally:
        set_block_attention_backend("auto")


@torch.no_grad()
def test_a_second_run_is_bitwise_the_same():
    pixels = random_pixels(2, 23, 18)
    model = small_model(SparsePathViTModel, **STRATIFIED)
    first, second = model(pixels, **RAGGED), model(pixels, **RAGGED)
    assert all(torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def test_strips_of_a_slide_give_what_one_image_gives():
    model = small_model(SparsePathViTModel, **STRATIFIED)
    pixels, present = random_pixels(1, 23, 18), random_mask(1, 23, 18, 0.6)
    expected = model(pixels, patch_mask=present)
    strips = model.finish(model.encode(pixels.split(32, dim=2), model.token_grid_of_image(present[0])))
    assert torch.equal(strips.patch_weights, expected.patch_weights)
    torch.testing.assert_close(strips.last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-5)


@torch.no_grad()
def test_removed_tokens_that_come_back_stand_for_themselves():
    pixels = random_pixels(1, 23, 18)
    plain, unpruned = (
        small_model(SparsePathViTModel, **STRATIFIED, unprune=unprune)(pixels) for unprune in (None, "scatter")
    )
    assert torch.equal(plain.pooler_output, unpruned.pooler_output)
    assert unpruned.patch_weights is None and unpruned.patch_positions.shape == (1, 23 * 18, 2)
    restored, left = unpruned.to_dense_map(), plain.to_dense_map(fill=torch.nan)
    is_left = ~left.isnan()
    assert is_left[:, 0].sum() == plain.patch_weights.shape[1]
    assert torch.equal(restored[is_left], left[is_left])


@torch.no_grad()
def test_maps_of_a_backbone_hold_representatives_at_their_places():
    pixels = random_pixels(1, 23, 18)
    model = small_model(SparsePathViTModel, **STRATIFIED)
    backbone = small_model(SparsePathViTBackbone, **STRATIFIED, out_features=["stage4"])
    backbone.load_state_dict(model.state_dict())
    feature_map, outputs = backbone(pixels).feature_maps[0], model(pixels)
    rows, columns = outputs.patch_positions[0].T
    assert torch.equal(feature_map[0, :, rows, columns].T, outputs.last_hidden_state[0, 3:])


@torch.no_grad()
def test_a_classifier_says_the_weights_too():
    outputs = small_model(SparsePathViTForImageClassification, **STRATIFIED)(random_pixels(1, 23, 18))
    assert outputs.patch_weights.sum() == 23 * 18


def test_gradients_reach_every_pixel_that_is_sampled_and_are_those_of_the_dense_mask():
    pixels = random_pixels(1, 23, 18).double().requires_grad_()
    gradients = []
    for name in ("block_sparse", "eager"):
        model = small_model(SparsePathViTModel, **STRATIFIED).double()
        model.set_attn_implementation(name)
        outputs = model(pixels)
        (gradient,) = torch.autograd.grad(outputs.pooler_output.square().sum(), pixels)
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)
    assert gradients[0].abs().max() > 1e-3


def test_gradient_checkpointing_draws_the_same():
    pixels, gradients = random_pixels(1, 23, 18), []
    for checkpointing in (False, True):
        model = small_model(SparsePathViTModel, **STRATIFIED).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(pixels).pooler_output.square().sum().backward()
        gradients.append(model.embeddings.cls_token.grad)
    torch.testing.assert_close(*gradients)


class TestConfig:
    @pytest.mark.parametrize("name", ["num_context_tokens", "num_representatives"])
    def test_negative_numbers_are_refused(self, name):
        with pytest.raises(ValueError, match=rf"{name}=-1 is not possible: it must be at least 0\. 0 \(the default\)"):
            small_config(**{name: -1})

    def test_both_are_saved_and_may_be_set_when_loading(self, tmp_path):
        small_config(num_context_tokens=1024, num_representatives=64).save_pretrained(tmp_path)
        loaded = SparsePathViTConfig.from_pretrained(tmp_path)
        assert (loaded.num_context_tokens, loaded.num_representatives) == (1024, 64)
        assert SparsePathViTConfig.from_pretrained(tmp_path, num_context_tokens=7).num_context_tokens == 7

    def test_the_default_is_the_paper(self):
        assert (SparsePathViTConfig().num_context_tokens, SparsePathViTConfig().num_representatives) == (0, 0)

    @torch.no_grad()
    def test_both_can_be_changed_on_a_loaded_model(self):
        pixels = random_pixels(1, 23, 18)
        model = small_model(SparsePathViTModel, prune_ratio=0.6)
        paper = model(pixels).pooler_output
        model.config.num_context_tokens = 30
        stratified = model(pixels).pooler_output
        model.config.num_representatives = 12
        both = model(pixels).pooler_output
        assert (paper - stratified).abs().max() > 1e-2 and (stratified - both).abs().max() > 1e-2
        model.config.num_context_tokens = model.config.num_representatives = 0
        assert torch.equal(model(pixels).pooler_output, paper)


@torch.no_grad()
@pytest.mark.parametrize("is_ragged", [False, True])
def test_each_layer_takes_exactly_what_cls_and_the_mean_query_attend_to_and_draws_anew(is_ragged):
    batch = Batch([(12, 15), (9, 13)] if is_ragged else [(12, 15)] * 2, None, 3, 1, 3, 30)
    weights = random_weights(batch, 1)
    grid = grid_with(batch, weights)
    layers = small_model(SparsePathViTModel, num_context_tokens=30).encoder.layers
    num_tokens = sum(len(raster_tokens(batch, image)) for image in range(2))
    states = [2.0 * torch.randn(2, num_tokens, 16, dtype=torch.float64) for _ in range(3)]
    scores = scores_by_definition(*states[:2], batch, weights, layers[0].attention.scaling)
    for number, layer in enumerate(layers):
        found = layer.attention.context_tokens(*(in_grid_order(one, batch, grid) for one in states), grid)
        expected = context_with(batch, grid, scores, number)
        assert all(torch.equal(one, other) for one, other in zip(found[:-1], expected[:-1], strict=True))
    assert not torch.equal(found.tokens, context_with(batch, grid, scores, 0).tokens)
