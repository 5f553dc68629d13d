# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The routes of Transformers, PEFT and datasets into which a model of theirs would be put."""

import numpy as np
import pytest
import torch
from small_models import large_weights_, random_pixels, small_config, small_model
from transformers import (
    DPTConfig,
    DPTForDepthEstimation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from sparsepath_vit import SparsePathViTBackbone, SparsePathViTModel, tiny_checkpoint
from sparsepath_vit.plugins import FeatureExtractor

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def upernet():
    backbone = small_config(out_features=STAGES)
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=16, use_auxiliary_head=False, num_labels=3, pool_scales=[1, 2]
    )
    return UperNetForSemanticSegmentation(config), lambda outputs: outputs.logits


def dpt():
    backbone = small_config(out_features=STAGES, reshape_hidden_states=False)
    config = DPTConfig(
        backbone_config=backbone, is_hybrid=False, hidden_size=32, neck_hidden_sizes=[8] * 4, fusion_hidden_size=8,
        neck_ignore_stages=[], readout_type="project",
    )  # fmt: skip
    return DPTForDepthEstimation(config), lambda outputs: outputs.predicted_depth


def mask2former():
    backbone = small_config(out_features=STAGES)
    sizes = dict.fromkeys(("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim"), 32)
    config = Mask2FormerConfig(
        backbone_config=backbone, **sizes, dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_queries=5,
        num_attention_heads=2, num_labels=3,
    )  # fmt: skip
    return Mask2FormerForUniversalSegmentation(config), lambda outputs: outputs.masks_queries_logits


@pytest.mark.parametrize("make", [upernet, dpt, mask2former])
def test_stock_heads_run_on_our_backbone_and_load_again(make, tmp_path):
    model, result = make()
    large_weights_(model).eval()
    pixels = random_pixels(2, 8, 12)
    with torch.no_grad():
        expected = result(model(pixels))
        scale = expected.abs().max()
        assert (expected - result(model(pixels.flip(3)))).abs().max() > 1e-2 * scale > 0  # it sees the pixels
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        assert (result(again(pixels)) - expected).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("overrides", [{}, {"prune_ratio": 0.5}, {"apply_layernorm": False}])
def test_sequences_of_the_backbone_are_its_maps_behind_the_cls_token(overrides):
    pixels = random_pixels(2, 6, 9)
    maps = small_model(SparsePathViTBackbone, out_features=STAGES, **overrides)
    sequences = small_model(SparsePathViTBackbone, out_features=STAGES, reshape_hidden_states=False, **overrides)
    with torch.no_grad():
        expected, found = maps(pixels).feature_maps, sequences(pixels).feature_maps
        last = small_model(SparsePathViTModel, **overrides)(pixels).last_hidden_state
    for feature_map, sequence in zip(expected, found, strict=True):
        assert sequence.shape == (2, 1 + 6 * 9, 32)
        assert torch.equal(sequence[:, 1:], feature_map.flatten(2).transpose(1, 2))
    if "apply_layernorm" not in overrides:
        assert torch.allclose(found[-1][:, 0], last[:, 0], atol=1e-5)


@pytest.mark.parametrize("names", [["query", "value"], ["q_proj", "v_proj"]])
def test_names_of_other_models_are_answered_with_ours(names):
    peft = pytest.importorskip("peft")
    model = small_model(SparsePathViTModel)
    with pytest.raises(ValueError, match=rf"names '{names[0]}', '{names[1]}': query, key and value are one layer"):
        model.add_adapter(peft.LoraConfig(target_modules=names))
    with pytest.raises(ValueError, match=r"Target modules .* not found"):  # PEFT's own words
        peft.get_peft_model(model, peft.LoraConfig(target_modules=names))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv"]))
    assert any("qkv.lora_A" in name for name, _ in adapted.named_parameters())


def test_datasets_maps_in_several_processes():
    datasets = pytest.importorskip("datasets")
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 255, (60, 50, 3), dtype=np.uint8) for _ in range(4)]
    extractor = FeatureExtractor(tiny_checkpoint())
    from PIL import Image

    dataset = datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in images]})

    def features(batch):
        return {"features": extractor(torch.stack([extractor.transform(image) for image in batch["image"]])).numpy()}

    found = dataset.map(features, batched=True, batch_size=2, num_proc=2).with_format("numpy")["features"][:]
    expected = extractor(torch.stack([extractor.transform(image) for image in images])).numpy()
    assert np.allclose(found, expected, atol=1e-5)
