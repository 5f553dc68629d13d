# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
import torch
from safetensors.torch import save_file
from source_networks import SMALL_TIMM, SMALL_TRANSFORMERS, dinov2_state, randomize, timm_network, transformers_network

from sparsepath_vit import SparsePathViTConfig
from sparsepath_vit.conversion import architecture, convert_checkpoint
from sparsepath_vit.conversion.mapping import plan_mapping
from sparsepath_vit.conversion.source_config import read_resampling


def convert_with(config, small_file, output, **overrides):
    (small_file.parent / "config.json").write_text(json.dumps(config))
    return convert_checkpoint(small_file, output, **overrides).config


def test_heads_from_timm_model_args(small_file, tmp_path):
    config = convert_with({"architecture": "unheard_of", "model_args": {"num_heads": 6}}, small_file, tmp_path / "out")
    assert (config.num_attention_heads, config.layer_norm_eps) == (6, 1e-6)


def test_heads_from_timms_registry(tmp_path):
    network = randomize(timm_network("kaiko-s16", depth=2))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_small_patch16_224", "model_args": {}}))
    assert convert_checkpoint(tmp_path, tmp_path / "out").config.num_attention_heads == 6


@pytest.mark.parametrize("architecture", [None, "no_such_model", "resnet18"])
def test_timm_config_that_does_not_say_the_heads(small_file, tmp_path, architecture):
    with pytest.raises(ValueError, match="head count"):
        convert_with({"architecture": architecture}, small_file, tmp_path / "out")


def test_config_that_says_more_layers_than_there_are(small_file, tmp_path):
    """Regression: a checkpoint that lacks its last layers was converted to a shallower model."""
    wanted = r"num_hidden_layers: the tensors say 3, the config.json of model.safetensors says 24. Tensors are missing"
    with pytest.raises(ValueError, match=wanted):
        convert_with({"model_args": {"num_heads": 4, "depth": 24, "embed_dim": 96}}, small_file, tmp_path / "out")
    assert (
        convert_with({"model_args": {"num_heads": 4, "depth": 3}}, small_file, tmp_path / "out").num_hidden_layers == 3
    )


def test_transformers_config_of_another_model(tmp_path):
    randomize(transformers_network("phikon-v2", **SMALL_TRANSFORMERS)).save_pretrained(tmp_path / "in")
    stated = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps({**stated, "num_hidden_layers": 24}))
    with pytest.raises(ValueError, match=r"num_hidden_layers: the tensors say 3, the config.json of in says 24"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out")


def test_parts_of_a_config_that_are_null_say_nothing(small_file, tmp_path):
    config = {"model_args": None, "pretrained_cfg": None}
    assert convert_with(config, small_file, tmp_path / "out", num_attention_heads=4).num_attention_heads == 4


@pytest.mark.parametrize(
    ("mean", "message"),
    [(0.5, r"The mean beside the weights of model.safetensors is 0.5"), ([0.5], r"has 1 values: give one per RGB")],
)
def test_normalisation_that_is_not_one_number_per_channel(small_file, tmp_path, mean, message):
    with pytest.raises(ValueError, match=message):
        convert_with({"pretrained_cfg": {"mean": mean}}, small_file, tmp_path / "out", num_attention_heads=4)


def test_transformers_config(tmp_path):
    randomize(transformers_network("phikon", **SMALL_TRANSFORMERS, layer_norm_eps=1e-5)).save_pretrained(
        tmp_path / "in"
    )
    config = convert_checkpoint(tmp_path / "in", tmp_path / "out").config
    assert (config.num_attention_heads, config.layer_norm_eps, config.mlp_type) == (4, 1e-5, "gelu")


@pytest.mark.parametrize(("name", "eps"), [("phikon", 1e-12), ("phikon-v2", 1e-6)])
def test_epsilon_of_a_bare_transformers_file_is_the_published_default(tmp_path, name, eps):
    randomize(transformers_network(name, **SMALL_TRANSFORMERS)).save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "config.json").unlink()
    assert convert_checkpoint(tmp_path / "in", tmp_path / "out", num_attention_heads=4).config.layer_norm_eps == eps


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu_pytorch_tanh", "relu"])
def test_other_activations_are_refused(tmp_path, activation):
    network = transformers_network("phikon", **SMALL_TRANSFORMERS, hidden_act=activation)
    randomize(network).save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match=f"activation '{activation}' is not supported in a gelu MLP"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out")


def test_gate_with_gelu_is_refused(small_file, tmp_path):
    """timm's GluMlp with GELU has the very shapes of SwiGLU."""
    with pytest.raises(ValueError, match="activation 'gelu' is not supported in a swiglu MLP"):
        convert_with({"model_args": {"num_heads": 4, "act_layer": "gelu"}}, small_file, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "antialias"),
    [("phikon", False), ("phikon-v2", False), ("midnight-12k", False), ("hibou-b", True)],
)
def test_transformers_antialiases_only_with_registers(tmp_path, name, antialias):
    randomize(transformers_network(name, **SMALL_TRANSFORMERS)).save_pretrained(tmp_path / "in")
    config = convert_checkpoint(tmp_path / "in", tmp_path / "out").config
    assert (config.position_antialias, config.position_interpolation_offset) == (antialias, 0.0)


@pytest.mark.parametrize(("name", "antialias", "offset"), [("gpfm", False, 0.1), ("openmidnight", True, 0.0)])
def test_dinov2_has_an_offset_without_registers_and_antialiases_with_them(tmp_path, name, antialias, offset):
    torch.save(dinov2_state(timm_network(name, **SMALL_TIMM)), tmp_path / "teacher.pth")
    config = convert_checkpoint(tmp_path / "teacher.pth", tmp_path / "out", num_attention_heads=4).config
    assert (config.position_antialias, config.position_interpolation_offset) == (antialias, offset)


@pytest.mark.parametrize("name", ["uni", "uni2-h"])
def test_timm_antialiases(tmp_path, name):
    save_file(timm_network(name, **SMALL_TIMM).state_dict(), tmp_path / "model.safetensors")
    config = convert_checkpoint(tmp_path, tmp_path / "out", num_attention_heads=4).config
    assert (config.position_antialias, config.position_interpolation_offset) == (True, 0.0)


def test_antialiasing_can_be_overridden(small_file, tmp_path):
    report = convert_checkpoint(small_file, tmp_path / "out", num_attention_heads=4, position_antialias=False)
    assert SparsePathViTConfig.from_pretrained(report.output_dir).position_antialias is False


def test_a_known_model_decides_where_the_mask_token_was_dropped():
    plan = plan_mapping({"patch_embed.proj.weight": (1,), "cls_token": (1,)})
    for known in (architecture("uni"), None):
        assert read_resampling(plan, known) == {"position_antialias": True, "position_interpolation_offset": 0.0}
    gpfm = read_resampling(plan, architecture("gpfm"))
    assert gpfm == {"position_antialias": False, "position_interpolation_offset": 0.1}
