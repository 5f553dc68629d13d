# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The outputs are those of any Transformers vision model, by name, by number and as a tuple; ours follow."""

import dataclasses

import pytest
import torch
from small_models import random_pixels, small_model
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from sparsepath_vit import SparsePathViTForImageClassification, SparsePathViTModel

OURS = ["patch_positions", "grid_sizes", "prune_scores"]


def names_of(output):
    return [field.name for field in dataclasses.fields(output)]


@torch.no_grad()
def test_the_base_output_is_that_of_a_vision_model_and_ours_follow():
    model = small_model(SparsePathViTModel, prune_ratio=0.5)
    outputs = model(random_pixels(2, 6, 5))
    assert isinstance(outputs, BaseModelOutputWithPooling)
    assert names_of(outputs) == [*names_of(BaseModelOutputWithPooling), *OURS, "patch_weights"]
    assert outputs[0] is outputs.last_hidden_state and outputs[1] is outputs.pooler_output
    assert list(outputs.keys()) == ["last_hidden_state", "pooler_output", *OURS]


@torch.no_grad()
def test_states_and_attentions_come_third_and_fourth():
    model = small_model(SparsePathViTModel, prune_ratio=0.5)
    model.set_attn_implementation("eager")
    outputs = model(random_pixels(1, 6, 5), output_hidden_states=True, output_attentions=True)
    assert outputs[2] is outputs.hidden_states and len(outputs[2]) == 5
    assert outputs[3] is outputs.attentions and len(outputs[3]) == 4
    assert outputs[4] is outputs.patch_positions


@torch.no_grad()
@pytest.mark.parametrize("model_class", [SparsePathViTModel, SparsePathViTForImageClassification])
@pytest.mark.parametrize("prune_ratio", [0.0, 0.5])
def test_a_tuple_holds_what_the_output_holds_in_its_order(model_class, prune_ratio):
    model = small_model(model_class, prune_ratio=prune_ratio)
    pixels = random_pixels(2, 6, 5)
    as_tuple, outputs = model(pixels, return_dict=False), model(pixels)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(outputs.to_tuple())
    for one, other in zip(as_tuple, outputs.to_tuple(), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_the_classifier_output_is_that_of_an_image_classifier():
    model = small_model(SparsePathViTForImageClassification, prune_ratio=0.5, num_labels=3)
    outputs = model(random_pixels(2, 6, 5), labels=torch.tensor([0, 2]))
    assert isinstance(outputs, ImageClassifierOutput)
    assert names_of(outputs) == [*names_of(ImageClassifierOutput), *OURS, "patch_weights"]
    assert outputs[0] is outputs.loss and outputs[1] is outputs.logits
    assert model(random_pixels(2, 6, 5))[0].shape == (2, 3)
