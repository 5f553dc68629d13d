# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import pytest
from source_networks import SMALL_TIMM, SMALL_TRANSFORMERS, dinov2_state, randomize, timm_network, transformers_network

from sparsepath_vit import SparsePathViTConfig
from sparsepath_vit.conversion.mapping import check_parameters, infer_structure, plan_mapping

LAYER = "encoder.layers.0"


def shapes_of(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.fixture
def shapes(small_state):
    return shapes_of(small_state)


def check(shapes):
    plan = plan_mapping(shapes)
    config = SparsePathViTConfig(num_attention_heads=4, **infer_structure(plan))
    check_parameters(plan, config)
    return plan, config


def test_timm_names(shapes):
    plan, config = check(shapes)
    assert plan.style == "timm" and plan.prefix == "" and plan.ignored == {}
    assert sorted(name for names in plan.sources.values() for name in names) == sorted(shapes)
    assert plan.sources[f"{LAYER}.mlp.fc1.weight"] == ("blocks.0.mlp.fc1.weight",)
    assert (config.num_register_tokens, config.num_prefix_position_embeddings, config.image_size) == (8, 0, 224)
    assert (config.mlp_type, config.intermediate_size, config.num_hidden_layers) == ("swiglu", 256, 3)


@pytest.mark.parametrize("prefix", ["module.", "backbone.", "model.", "teacher.backbone.", "_orig_mod.module."])
def test_prefixes_are_unwrapped(shapes, prefix):
    plan, _ = check({prefix + name: shape for name, shape in shapes.items()})
    assert plan.prefix == prefix
    assert plan.sources["norm.weight"] == (f"{prefix}norm.weight",)


def test_teacher_is_taken_and_the_student_reported(shapes):
    both = {f"{network}.backbone.{name}": shape for network in ("student", "teacher") for name, shape in shapes.items()}
    plan, _ = check({**both, "teacher.dino_head.mlp.0.weight": (3, 3)})
    assert plan.prefix == "teacher.backbone."
    assert plan.ignored["student.backbone.pos_embed"] == "the student beside the teacher"
    assert plan.ignored["teacher.dino_head.mlp.0.weight"] == "head or loss of self-supervised training"


def test_a_network_inside_another_is_named_by_its_prefix(shapes):
    with pytest.raises(ValueError, match=r"holds a vision transformer under 'visual.trunk.'.*without this prefix"):
        plan_mapping({f"visual.trunk.{name}": shape for name, shape in shapes.items()} | {"text.bias": (3,)})


def test_two_networks_are_refused(shapes):
    both = {prefix + name: shape for prefix in ("model.", "backbone.") for name, shape in shapes.items()}
    with pytest.raises(ValueError, match=r"several networks, at 'model.', 'backbone.'"):
        plan_mapping(both)


def test_dinov2_names_chunks_and_heads():
    network = randomize(timm_network("openmidnight", **SMALL_TIMM))
    plan, config = check(shapes_of(dinov2_state(network)["teacher"]))
    assert plan.sources[f"{LAYER}.mlp.fc1.weight"] == ("backbone.blocks.0.0.mlp.w12.weight",)
    assert plan.sources["encoder.layers.2.norm1.bias"] == ("backbone.blocks.1.2.norm1.bias",)
    assert (config.num_register_tokens, config.num_prefix_position_embeddings) == (4, 1)
    assert set(plan.ignored) == {"backbone.mask_token", "dino_head.mlp.0.weight"}


@pytest.mark.parametrize(("gate", "up", "down"), [("w1", "w2", "w3"), ("fc1_g", "fc1_x", "fc2")])
def test_separate_gate_and_value(shapes, gate, up, down):
    for name in [name for name in shapes if ".mlp." in name]:
        shape = shapes.pop(name)
        if ".fc1." in name:
            half = (shape[0] // 2, *shape[1:])
            shapes |= {name.replace("fc1", up): half, name.replace("fc1", gate): half}
        else:
            shapes[name.replace("fc2", down)] = shape
    plan, config = check(shapes)
    assert plan.sources[f"{LAYER}.mlp.fc1.bias"] == (f"blocks.0.mlp.{gate}.bias", f"blocks.0.mlp.{up}.bias")
    assert (config.mlp_type, config.intermediate_size) == ("swiglu", 256)


@pytest.mark.parametrize("name", ["phikon", "phikon-v2", "hibou-b"])
def test_names_inside_the_installed_transformers(name):
    plan, config = check(shapes_of(transformers_network(name, **SMALL_TRANSFORMERS).state_dict()))
    assert plan.style == "transformers"
    query, key, value = plan.sources[f"{LAYER}.attention.qkv.weight"]
    assert ("q" in query) and ("k" in key) and ("v" in value)
    assert config.use_layerscale == (name != "phikon")


def test_prefixed_transformers_classifier():
    shapes = shapes_of(transformers_network("phikon", **SMALL_TRANSFORMERS).state_dict())
    prefixed = {f"vit.{name}": shape for name, shape in shapes.items()}
    plan, _ = check({**prefixed, "classifier.weight": (2, 96), "classifier.bias": (2,), "vit.pooler.dense.bias": (96,)})
    assert plan.ignored == {
        "classifier.weight": "classification head",
        "classifier.bias": "classification head",
        "vit.pooler.dense.bias": "Transformers' ViT pooler (a dense layer on CLS)",
    }


def test_no_bias_on_query_key_value(shapes):
    plan, config = check({name: shape for name, shape in shapes.items() if not name.endswith("qkv.bias")})
    assert config.qkv_bias is False
    assert f"{LAYER}.attention.qkv.bias" not in plan.sources


def test_missing_tensors_are_listed(shapes):
    del shapes["blocks.1.norm2.bias"], shapes["blocks.2.ls1.gamma"]
    with pytest.raises(ValueError, match=r"2 parameters that no tensor sets: .*1.norm2.bias, .*2.layer_scale1"):
        check(shapes)


def test_a_missing_layer_is_listed(shapes):
    remaining = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.1.")}
    with pytest.raises(ValueError, match=r"14 parameters that no tensor sets: encoder.layers.1\."):
        check(remaining)


@pytest.mark.parametrize(
    "extra", ["blocks.0.attn.q_norm.weight", "fc_norm.weight", "dist_token", "norm_pre.bias", "blocks.0.ls3.gamma"]
)
def test_tensors_without_a_home_are_listed(shapes, extra):
    with pytest.raises(ValueError, match=rf"1 tensors without a home in a plain vision transformer: {extra}\b"):
        check({**shapes, extra: (96,)})


def test_misshapen_tensors_are_listed_with_both_shapes(shapes):
    shapes["blocks.1.attn.proj.weight"] = (96, 95)
    with pytest.raises(ValueError, match=r"blocks.1.attn.proj.weight\): \(96, 95\), wanted \(96, 96\)"):
        check(shapes)


def test_layerscale_in_some_layers_only(shapes):
    del shapes["blocks.0.ls1.gamma"]
    with pytest.raises(ValueError, match=r"tensors for parameters that the model lacks: .*ls2.gamma"):
        check(shapes)


def test_chunked_and_plain_names_for_one_parameter(shapes):
    with pytest.raises(ValueError, match=r"want the same home: blocks.0.1.norm1.bias and blocks.1.norm1.bias"):
        check({**shapes, "blocks.0.1.norm1.bias": (96,)})


def test_incomplete_query_key_value():
    shapes = shapes_of(transformers_network("phikon-v2", **SMALL_TRANSFORMERS).state_dict())
    key = next(name for name in shapes if "layer.1." in name and ("k_proj.bias" in name or "key.bias" in name))
    del shapes[key]
    with pytest.raises(ValueError, match=r"1 parameters that lack a part: encoder.layers.1.attention.qkv.bias"):
        check(shapes)


def test_unequal_query_key_value():
    shapes = shapes_of(transformers_network("phikon-v2", **SMALL_TRANSFORMERS).state_dict())
    names = [name for name in shapes if "layer.1.attention" in name and name.endswith("weight")][:2]
    shapes[names[0]], shapes[names[1]] = (120, 96), (72, 96)  # the same number of rows, but not a plain ViT's
    with pytest.raises(ValueError, match=r"parts differ in shape: encoder.layers.1.attention.qkv.weight"):
        check(shapes)


def test_position_grid_that_is_not_square(shapes):
    shapes["pos_embed"] = (1, 15 * 16, 96)
    with pytest.raises(ValueError, match="240 position embeddings are not a square grid plus 0 or 1 or 9"):
        check(shapes)


def test_position_grid_that_can_be_read_in_two_ways(shapes):
    """25 positions with 8 registers: a 5 x 5 grid, or 9 global tokens and a 4 x 4 grid."""
    shapes["pos_embed"] = (1, 25, 96)
    plan = plan_mapping(shapes)
    with pytest.raises(ValueError, match=r"several ways.*Pass num_prefix_position_embeddings"):
        infer_structure(plan)
    assert infer_structure(plan, num_prefix_position_embeddings=9)["image_size"] == 4 * 14
    assert infer_structure(plan, num_prefix_position_embeddings=0)["image_size"] == 5 * 14


def test_gated_neither_nor(shapes):
    shapes["blocks.0.mlp.fc2.weight"] = (96, 100)
    with pytest.raises(ValueError, match=r"fc1 has 512 rows, fc2 100 columns"):
        check(shapes)


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match=r"no vision transformer in a known naming.*conv1.weight"):
        plan_mapping({"conv1.weight": (64, 3, 7, 7), "fc.bias": (10,)})


def test_patch_embedding_that_is_no_square_convolution(shapes):
    shapes["patch_embed.proj.weight"] = (96, 3, 14, 16)
    with pytest.raises(ValueError, match="square patches"):
        check(shapes)
