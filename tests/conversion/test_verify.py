# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from safetensors.torch import load_file, save_file
from source_networks import SMALL_TIMM, SMALL_TRANSFORMERS, dinov2_state, randomize, timm_network, transformers_network

from sparsepath_vit.conversion import convert_checkpoint, verify_conversion

SIZES = [(224, 224), (196, 350)]


def test_timm_source(small_file, tmp_path):
    convert_checkpoint(small_file, tmp_path / "out", num_attention_heads=4, prune_ratio=0.6, prune_after_layer=2)
    results = verify_conversion(small_file, tmp_path / "out")
    shown = [(result.height, result.width, result.pattern) for result in results]
    assert shown == [(224, 224, "dense"), (224, 224, "w = 8"), (448, 448, "dense"), (196, 350, "dense")]
    assert all(result.relative_error <= 2e-5 and result.peer == "timm" and result.note == "" for result in results)
    assert str(results[0]).startswith("224 x 224 px, dense: ")


def test_dinov2_source_with_registers(tmp_path):
    torch.save(dinov2_state(randomize(timm_network("openmidnight", **SMALL_TIMM))), tmp_path / "teacher.pth")
    convert_checkpoint(tmp_path / "teacher.pth", tmp_path / "out", num_attention_heads=4)
    results = verify_conversion(tmp_path / "teacher.pth", tmp_path / "out", sizes=SIZES)
    assert all(result.relative_error <= 2e-5 and result.note == "" for result in results)


def test_dinov2_source_without_registers_says_why_it_differs_from_timm(tmp_path):
    torch.save(dinov2_state(randomize(timm_network("gpfm", **SMALL_TIMM))), tmp_path / "teacher.pth")
    convert_checkpoint(tmp_path / "teacher.pth", tmp_path / "out", num_attention_heads=4)
    native, _, other = verify_conversion(tmp_path / "teacher.pth", tmp_path / "out", sizes=SIZES)
    assert native.relative_error <= 2e-5 and native.note == ""
    assert 1e-3 < other.relative_error < 0.2
    assert "resampled without antialiasing here, with in the peer and with an offset of 0.1 here" in str(other)


@pytest.mark.parametrize("name", ["phikon", "phikon-v2", "hibou-b"])
def test_transformers_source(tmp_path, name):
    randomize(transformers_network(name, **SMALL_TRANSFORMERS)).save_pretrained(tmp_path / "in")
    convert_checkpoint(tmp_path / "in", tmp_path / "out")
    patch = 14 if name == "hibou-b" else 16
    results = verify_conversion(tmp_path / "in", tmp_path / "out", sizes=[(224, 224), (20 * patch, 25 * patch)])
    assert [result.pattern for result in results] == ["dense", "w = 8", "dense"]
    assert all(result.relative_error <= 2e-5 and result.note == "" for result in results)


def test_a_wrong_conversion_shows(small_file, tmp_path):
    convert_checkpoint(small_file, tmp_path / "out", num_attention_heads=4)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["encoder.layers.1.attention.qkv.bias"][:96] += 0.05
    save_file(weights, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    (result, *_) = verify_conversion(small_file, tmp_path / "out", sizes=[(224, 224)])
    assert result.relative_error > 1e-3


def test_sizes_must_be_multiples_of_the_patch(small_file, tmp_path):
    convert_checkpoint(small_file, tmp_path / "out", num_attention_heads=4)
    with pytest.raises(ValueError, match=r"sizes: 225 x 224 px are no multiples of the patch size 14"):
        verify_conversion(small_file, tmp_path / "out", sizes=[(225, 224)])


def test_form_that_timm_does_not_have(small_state, tmp_path):
    for name in [name for name in small_state if ".mlp.fc1." in name]:
        gate, value = small_state.pop(name).chunk(2)
        small_state |= {name.replace("fc1", "w1"): gate.clone(), name.replace("fc1", "w2"): value.clone()}
    for name in [name for name in small_state if ".mlp.fc2." in name]:
        small_state[name.replace("fc2", "w3")] = small_state.pop(name)
    save_file(small_state, tmp_path / "separate.safetensors")
    convert_checkpoint(tmp_path / "separate.safetensors", tmp_path / "out", num_attention_heads=4)
    with pytest.raises(ValueError, match=r"timm has no network of this form.*blocks.0.mlp.fc1.bias"):
        verify_conversion(tmp_path / "separate.safetensors", tmp_path / "out", sizes=[(224, 224)])
