# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`token_grid`, `encode`, `finish` and `feature_map`: the steps of a forward, for code that needs one in between."""

import pytest
import torch
from small_models import random_mask, random_pixels, small_model

from sparsepath_vit import SparsePathViTBackbone, SparsePathViTForImageClassification, SparsePathViTModel

PRUNED = {"prune_ratio": 0.5, "prune_after_layer": 2}
NAMES = ("last_hidden_state", "pooler_output", "patch_positions", "grid_sizes", "prune_scores")


@torch.no_grad()
@pytest.mark.parametrize("unprune", [None, "scatter"])
@pytest.mark.parametrize("pooling", ["cls", "cls_mean"])
def test_an_image_in_strips_gives_the_outputs_of_the_image(unprune, pooling):
    model = small_model(SparsePathViTModel, **PRUNED, unprune=unprune, pooling=pooling)
    pixels, mask = random_pixels(1, 11, 9), random_mask(1, 11, 9, 0.6)
    expected = model(pixels, mask)
    outputs = model.finish(model.encode(iter(pixels.split(4 * 4, dim=2)), model.token_grid_of_image(mask[0])))
    num_tokens = int(mask.sum())
    left = num_tokens if unprune else num_tokens - num_tokens // 2
    assert outputs.last_hidden_state.shape == (1, 3 + left, 32)
    for name in NAMES:
        torch.testing.assert_close(outputs[name], expected[name], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_something_can_be_done_after_each_layer():
    model = small_model(SparsePathViTModel, **PRUNED)
    pixels, seen = random_pixels(2, 6, 5), []

    def after_layer(number, tokens):
        seen.append((number, tokens.grid.counts, tokens.pruning is None))
        return tokens._replace(hidden_states=tokens.hidden_states * (1 + (number == 3)))

    changed = model.encode(pixels, model.token_grid(pixels), after_layer=after_layer)
    assert seen == [(number, (30, 30), True) for number in (0, 1, 2)] + [(3, (15, 15), False), (4, (15, 15), False)]
    layer = model.encoder.layers[3]
    before = model.encode(pixels, model.token_grid(pixels), output_hidden_states=True).states[3]
    expected = layer(2 * before.hidden_states, before.grid)[0]
    torch.testing.assert_close(changed.last.hidden_states, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_pruning_removed_is_kept_only_where_it_comes_back():
    pixels = random_pixels(1, 6, 5)
    for unprune, keeps_states, is_kept in [(None, False, False), (None, True, True), ("scatter", False, True)]:
        model = small_model(SparsePathViTModel, **PRUNED, unprune=unprune)
        last = model.encode(pixels, model.token_grid(pixels), output_hidden_states=keeps_states).last
        assert (last.pruning.hidden_states is not None) == is_kept
        assert last.to_map().abs().amax(dim=1).count_nonzero() == (30 if is_kept else 15)
    assert model.encode(pixels, model.token_grid(pixels), may_prune=False).last.pruning is None


@torch.no_grad()
def test_restored_tokens_are_the_kept_ones_among_those_before():
    model = small_model(SparsePathViTModel, **PRUNED, unprune="scatter")
    pixels, mask = random_pixels(2, 6, 5), random_mask(2, 6, 5, 0.7)
    encoded = model.encode(pixels, model.token_grid(pixels, mask), output_hidden_states=True)
    before, last = encoded.states[2], encoded.last
    restored = last.restored()
    assert restored.pruning is None and restored.grid is before.grid
    flat = restored.hidden_states.reshape(before.grid.num_tokens, -1)
    own = torch.cat([before.grid.global_indices(), before.grid.patch_indices()[last.pruning.kept]]).sort().values
    is_own = torch.zeros(len(flat), dtype=torch.bool)
    is_own[own] = True
    assert torch.equal(flat[is_own], last.hidden_states.reshape(last.grid.num_tokens, -1))
    assert torch.equal(flat[~is_own], before.hidden_states.reshape(before.grid.num_tokens, -1)[~is_own])
    assert torch.equal(restored.to_map(), last.to_map())


@torch.no_grad()
@pytest.mark.parametrize("apply_layernorm", [True, False])
def test_the_bare_model_makes_the_maps_of_the_backbone(apply_layernorm):
    settings = {**PRUNED, "apply_layernorm": apply_layernorm}
    backbone = small_model(SparsePathViTBackbone, **settings, out_indices=[0, 2, 3, 4])
    model = small_model(SparsePathViTModel, **settings)
    pixels, mask = random_pixels(2, 6, 5), random_mask(2, 6, 5, 0.7)
    encoded = model.encode(pixels, model.token_grid(pixels, mask), output_hidden_states=True)
    for layer, expected in zip([0, 2, 3, 4], backbone(pixels, mask).feature_maps, strict=True):
        assert torch.equal(model.feature_map(encoded, layer), expected)


@torch.no_grad()
def test_a_classifier_encodes_as_its_encoder():
    classifier = small_model(SparsePathViTForImageClassification, **PRUNED)
    pixels = random_pixels(2, 6, 5)
    encoded = classifier.encode(pixels, classifier.token_grid(pixels))
    pooled = classifier.base_model.finish(encoded).pooler_output
    assert torch.equal(classifier.classifier(pooled), classifier(pixels).logits)


class TestBadInput:
    @pytest.mark.parametrize("shape", [(1, 6, 5), (2, 5, 5), (2, 6, 4)])
    def test_a_grid_of_other_images(self, shape):
        model = small_model(SparsePathViTModel)
        grid = model.token_grid(random_pixels(2, 6, 5))
        with pytest.raises(ValueError, match=r"grid holds 2 images of up to \(6, 5\) tokens.*makes the grid that fits"):
            model.encode(random_pixels(*shape), grid)

    def test_strips_of_several_images(self):
        model = small_model(SparsePathViTModel)
        pixels = random_pixels(2, 6, 5)
        with pytest.raises(ValueError, match="strips are those of one image"):
            model.encode([pixels], model.token_grid(pixels))

    def test_a_mask_of_a_batch_for_one_image(self):
        with pytest.raises(ValueError, match=r"present has shape \(2, 6, 5\): it takes \(rows, columns\)"):
            small_model(SparsePathViTModel).token_grid_of_image(random_mask(2, 6, 5, 0.5))

    @pytest.mark.parametrize("layer, keeps_states", [(5, True), (-1, True), (4, False)])
    def test_a_map_of_a_layer_whose_tokens_were_not_kept(self, layer, keeps_states):
        model, pixels = small_model(SparsePathViTModel), random_pixels(1, 6, 5)
        encoded = model.encode(pixels, model.token_grid(pixels), output_hidden_states=keeps_states)
        with pytest.raises(ValueError, match=rf"layer={layer} is not among .*output_hidden_states=True.*from 0 to 4"):
            model.feature_map(encoded, layer)

    def test_unprune_set_after_encoding(self):
        model, pixels = small_model(SparsePathViTModel, **PRUNED), random_pixels(1, 6, 5)
        encoded = model.encode(pixels, model.token_grid(pixels))
        model.config.unprune = "scatter"
        with pytest.raises(ValueError, match=r"set config\.unprune='scatter' before encoding"):
            model.finish(encoded)
