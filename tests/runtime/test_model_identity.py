# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Two models are the same exactly where they compute the same numbers."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import SMALL, random_pixels, small_config, small_model
from transformers import PreTrainedConfig

from sparsepath_vit import SparsePathViTConfig, SparsePathViTImageProcessor, SparsePathViTModel
from sparsepath_vit.runtime.load_model import load_model
from sparsepath_vit.runtime.model_identity import (
    HARMLESS_CONFIG_FIELDS,
    HARMLESS_PROCESSOR_FIELDS,
    identity_digest,
    model_identity,
)

# Another value that each field may have; a field that is added needs one here, and counts or is listed as harmless.
OTHER_CONFIG_VALUES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 44,
    "mlp_type": "gelu",
    "qkv_bias": False,
    "use_layerscale": False,
    "layerscale_value": 0.5,
    "layer_norm_eps": 1e-5,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.2, 0.2, 0.2],
    "num_register_tokens": 3,
    "patch_size": 8,
    "image_size": 32,
    "num_channels": 4,
    "num_prefix_position_embeddings": 1,
    "position_antialias": False,
    "position_interpolation_offset": 0.1,
    "pooling": "cls_mean",
    "window_size": None,
    "neighbor_radius": 2,
    "prune_after_layer": 1,
    "prune_ratio": 0.5,
    "prune_score": "cls_attention",
    "unprune": "scatter",
    "num_context_tokens": 16,
    "num_representatives": 16,
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
    "drop_path_rate": 0.1,
    "initializer_range": 0.1,
    "tokens_per_strip": 16,
    "apply_layernorm": False,
    "reshape_hidden_states": False,
}
OTHER_PROCESSOR_VALUES = {
    "patch_size": 8,
    "do_resize": True,
    "size": {"height": 64, "width": 64},
    "resample": 2,
    "do_rescale": False,
    "rescale_factor": 1.0,
    "do_normalize": False,
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
    "min_patch_coverage": 0.25,
    "mask_background": True,
    "background_fraction": 0.5,
    "target_mpp": 0.5,
    "max_pixels": 2**20,
}
# Transformers knows these of every image processor; ours takes one value of each, or says nothing of them.
WITHOUT_A_CHOICE = {
    *("do_convert_rgb", "do_pad", "do_center_crop", "crop_size", "pad_size", "data_format", "default_to_square"),
    *("mpp", "image_seq_length"),
}


def identity_of(config):
    """The identity with weights held fixed, so that only the configuration can tell models apart."""
    weights = torch.nn.Linear(2, 2)
    weights.load_state_dict({name: torch.zeros_like(value) for name, value in weights.state_dict().items()})
    model = SimpleNamespace(
        config=config, dtype=torch.float32, device=torch.device("cpu"), state_dict=weights.state_dict
    )
    return model_identity(model)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SparsePathViTConfig)])
def test_each_field_of_the_config_counts_or_is_harmless(field):
    if field in {other.name for other in dataclasses.fields(PreTrainedConfig)} - set(OTHER_CONFIG_VALUES):
        pytest.skip("a field that Transformers gives every configuration")
    if field in ("_out_features", "_out_indices"):
        before, after = small_config(out_indices=[4]), small_config(out_indices=[2])
    else:
        before, after = small_config(), small_config(**{field: OTHER_CONFIG_VALUES[field]})
    assert (identity_of(before) != identity_of(after)) != (field in HARMLESS_CONFIG_FIELDS)


@pytest.mark.parametrize("field", sorted(SparsePathViTImageProcessor.valid_kwargs.__annotations__))
def test_each_setting_of_the_processor_counts_or_is_harmless(field):
    if field in WITHOUT_A_CHOICE:
        pytest.skip("one value only")
    model = small_model(SparsePathViTModel)
    if field in OTHER_PROCESSOR_VALUES:
        processors = (
            SparsePathViTImageProcessor(),
            SparsePathViTImageProcessor(**{field: OTHER_PROCESSOR_VALUES[field]}),
        )
        identities = [model_identity(model, processor) for processor in processors]
        assert (identities[0] != identities[1]) != (field in HARMLESS_PROCESSOR_FIELDS)
    else:
        assert field in HARMLESS_PROCESSOR_FIELDS


@pytest.mark.parametrize("field", sorted(HARMLESS_CONFIG_FIELDS & set(OTHER_CONFIG_VALUES)))
def test_a_harmless_field_changes_no_output(field):
    model = small_model(SparsePathViTModel, prune_ratio=0.5)
    other = SparsePathViTModel(small_config(prune_ratio=0.5, **{field: OTHER_CONFIG_VALUES[field]})).eval()
    other.load_state_dict(model.state_dict())
    pixels = random_pixels(1, 9, 7)
    with torch.no_grad():
        expected, found = (network(pixels).last_hidden_state for network in (model, other))
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_harmless_setting_changes_no_pixel():
    image = np.random.default_rng(0).integers(0, 256, (30, 22, 3), dtype=np.uint8)
    harmless = {name: OTHER_PROCESSOR_VALUES[name] for name in HARMLESS_PROCESSOR_FIELDS & set(OTHER_PROCESSOR_VALUES)}
    batches = [SparsePathViTImageProcessor(**settings)(image, return_tensors="pt") for settings in ({}, harmless)]
    assert harmless and all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_a_field_that_nobody_listed_counts():
    config = small_config()
    before = identity_of(config)
    config.num_context_samples = 64  # kept by Transformers as an attribute, as a field of a later version would be
    assert identity_of(config) != before


def test_one_changed_weight_of_many_counts():
    model = small_model(SparsePathViTModel)
    before = model_identity(model)
    with torch.no_grad():
        model.encoder.layers[1].mlp.fc1.weight[3, 5] += 1e-3
    assert {name for name, value in model_identity(model).items() if value != before[name]} == {"weights"}


def test_dtype_and_attention_count_and_names_do_not():
    model = small_model(SparsePathViTModel)
    digests = [identity_digest(model_identity(model))]
    model.set_attn_implementation("eager")
    digests.append(identity_digest(model_identity(model)))
    for dtype in (torch.bfloat16, torch.float16):
        digests.append(identity_digest(model_identity(model.to(dtype))))
    assert len(set(digests)) == 4
    model.config.id2label, model.config._name_or_path = {0: "benign"}, "elsewhere"
    assert identity_digest(model_identity(model)) == digests[-1]


def test_the_device_counts_in_sixteen_bits_and_reduced_matrix_products_in_float32():
    model = small_model(SparsePathViTModel)
    assert model_identity(model)["device"] is None and model_identity(model)["float32_precision"] == "ieee"
    assert model_identity(model.bfloat16())["device"] == "cpu"
    model.float()
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert model_identity(model)["float32_precision"] == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saving_and_loading_changes_nothing(tmp_path, dtype):
    model = small_model(SparsePathViTModel, prune_ratio=0.3, position_interpolation_offset=0.1).to(dtype)
    processor = SparsePathViTImageProcessor(patch_size=SMALL["patch_size"], image_mean=(0.7, 0.5, 0.7))
    before = model_identity(model, processor)
    assert json.loads(json.dumps(before)) == before
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert model_identity(*load_model(tmp_path, "cpu", dtype)) == before
