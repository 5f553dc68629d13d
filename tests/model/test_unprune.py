# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`unprune="scatter"`: which features come back, where, and what does not change."""

import pytest
import torch
from small_models import random_mask, random_pixels, small_model

from sparsepath_vit import SparsePathViTForImageClassification, SparsePathViTModel

PRUNED = {"prune_ratio": 0.6, "prune_after_layer": 2}


def pair(**overrides):
    """The same pruning model without and with tokens that come back."""
    return (small_model(SparsePathViTModel, **PRUNED, unprune=unprune, **overrides) for unprune in (None, "scatter"))


@torch.no_grad()
@pytest.mark.parametrize("is_ragged", [False, True], ids=["uniform", "ragged"])
def test_kept_tokens_are_of_the_last_layer_and_removed_ones_of_the_layer_they_left_after(is_ragged):
    pixels = random_pixels(2, 9, 7)
    inputs = {"patch_mask": random_mask(2, 9, 7, 0.7), "image_sizes": [(36, 28), (20, 24)]} if is_ragged else {}
    pruned, unpruned = pair()
    expected, outputs = pruned(pixels, **inputs), unpruned(pixels, **inputs, output_hidden_states=True)
    kept, at_pruning = expected.to_dense_map(fill=torch.nan), small_model(SparsePathViTModel, prune_ratio=0.0)
    before = at_pruning(pixels, **inputs, output_hidden_states=True)
    normed = unpruned.norm(before.hidden_states[2])
    before.last_hidden_state = normed
    everything, base = outputs.to_dense_map(fill=torch.nan), before.to_dense_map(fill=torch.nan)
    is_kept, is_present = ~kept[:, 0].isnan(), ~base[:, 0].isnan()
    assert torch.equal(~everything[:, 0].isnan(), is_present) and is_kept.sum() < 0.5 * is_present.sum()
    everything, base, kept = (one.permute(0, 2, 3, 1) for one in (everything, base, kept))
    torch.testing.assert_close(everything[is_kept], kept[is_kept], rtol=0, atol=0)
    torch.testing.assert_close(everything[is_present & ~is_kept], base[is_present & ~is_kept], rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["cls", "cls_mean"])
def test_global_tokens_pooled_features_and_scores_do_not_change(pooling):
    pruned, unpruned = pair(pooling=pooling)
    expected, outputs = pruned(random_pixels(2, 9, 7)), unpruned(random_pixels(2, 9, 7))
    assert torch.equal(outputs.pooler_output, expected.pooler_output)
    assert torch.equal(outputs.prune_scores, expected.prune_scores)
    assert torch.equal(outputs.last_hidden_state[:, :3], expected.last_hidden_state[:, :3])
    assert outputs.last_hidden_state.shape[1] == 3 + 63 and outputs.patch_positions.shape == (2, 63, 2)
    assert outputs.patch_positions[0].tolist() == [[row, column] for row in range(9) for column in range(7)]


@torch.no_grad()
def test_without_pruning_nothing_changes():
    plain, unprune = (
        small_model(SparsePathViTModel, prune_ratio=0.0, unprune=unprune) for unprune in (None, "scatter")
    )
    assert torch.equal(plain(random_pixels(1, 6, 6))[0], unprune(random_pixels(1, 6, 6))[0])


def test_gradients_reach_kept_and_removed_tokens():
    _, model = pair()
    pixels = random_pixels(1, 6, 6).requires_grad_()
    model(pixels).to_dense_map().square().sum().backward()
    per_patch = pixels.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().amax(dim=(1, 4, 5))
    assert (per_patch > 0).all()


@torch.no_grad()
def test_a_classifier_gives_the_same_logits():
    logits = [
        small_model(SparsePathViTForImageClassification, **PRUNED, unprune=unprune)(random_pixels(1, 9, 7)).logits
        for unprune in (None, "scatter")
    ]
    assert torch.equal(*logits)
