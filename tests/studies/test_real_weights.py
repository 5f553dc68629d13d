# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json

import numpy as np
import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from sparsepath_vit import SparsePathViTModel
from studies.real_weights.cache import cache_folder, cached_checkpoint

CACHED = cached_checkpoint()
needs_weights = pytest.mark.skipif(
    CACHED is None, reason="the real weights are not in the cache: python -m studies.real_weights fetches them"
)


def test_the_cache_can_be_named(monkeypatch, tmp_path):
    monkeypatch.delenv("SPARSEPATH_REAL_WEIGHTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "sparsepath-vit" / "dinov2-small"
    monkeypatch.setenv("SPARSEPATH_REAL_WEIGHTS", str(tmp_path / "elsewhere"))
    assert cache_folder() == tmp_path / "elsewhere"
    assert cached_checkpoint() is None


@needs_weights
def test_the_real_weights_convert_with_parity():
    report = json.loads((CACHED.parent / "parity.json").read_text())
    assert report["dinov2_against_onnx"]["relative_error"] < 2e-5
    assert all(parity["relative_error"] < 1e-5 for parity in report["sparsepath_vit_against_dinov2"])
    config = SparsePathViTModel.from_pretrained(CACHED).config
    assert (config.num_hidden_layers, config.hidden_size, config.image_size) == (12, 384, 518)


@needs_weights
def test_what_lies_in_the_cache_still_agrees():
    source, converted = (
        Dinov2Model.from_pretrained(CACHED.parent / "dinov2"),
        SparsePathViTModel.from_pretrained(CACHED),
    )
    pixel_values = torch.randn(1, 3, 112, 140, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = source(pixel_values).last_hidden_state, converted(pixel_values).last_hidden_state
    assert (expected - found).abs().max() < 1e-5 * expected.square().mean().sqrt()


def exported(model, path):
    """A graph with the node and tensor names of an exported model; only what is read of it is there."""
    onnx = pytest.importorskip("onnx", reason="the extra 'studies' is not installed")
    from onnx import helper, numpy_helper

    nodes, tensors = [], []
    for number, (name, parameter) in enumerate(model.state_dict().items()):
        array = parameter.numpy()
        if name == "embeddings.mask_token":
            continue
        if name == "embeddings.position_embeddings":
            for part in (array[:, :1], array[:, 1:]):
                tensors.append(numpy_helper.from_array(part, f"onnx::Part_{part.shape[1]}"))
                nodes.append(
                    helper.make_node("Concat", [tensors[-1].name], ["x"], f"/backbone/embeddings/{len(nodes)}", axis=1)
                )
        elif array.ndim == 2:
            tensors.append(numpy_helper.from_array(array.T.copy(), f"onnx::MatMul_{number}"))
            place = name.removesuffix(".weight")
            layer = place.split(".")[2]
            place = place.replace(f"layer.{layer}.", f"layer.{layer}/")
            place = "/".join([*place.split("/")[0].split(".", 1), *place.split("/")[1].split(".")])
            nodes.append(helper.make_node("MatMul", ["h", tensors[-1].name], ["y"], f"/backbone/{place}/MatMul"))
        else:
            tensors.append(numpy_helper.from_array(array, f"backbone.{name}"))
    tensors.append(numpy_helper.from_array(np.ones((2, 2), np.float32), "decoder.weight"))
    nodes.append(helper.make_node("MatMul", ["h", "decoder.weight"], ["z"], "/decoder/MatMul"))
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [], tensors)), path)


def test_a_graph_becomes_the_network_it_was_exported_from(tmp_path):
    config = Dinov2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, image_size=56, mlp_ratio=2)
    torch.manual_seed(0)
    original = Dinov2Model(config).eval()
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter)
    exported(original, tmp_path / "graph.onnx")
    from studies.real_weights.onnx_backbone import dinov2_model, read_backbone

    state = read_backbone(tmp_path / "graph.onnx")
    found = dinov2_model(state)
    pixel_values = torch.randn(1, 3, 56, 84)
    with torch.inference_mode():
        assert torch.equal(found(pixel_values).last_hidden_state, original(pixel_values).last_hidden_state)
    assert (found.embeddings.mask_token == 0).all()
    del state["layernorm.bias"]
    with pytest.raises(ValueError, match=r"missing_keys.*layernorm\.bias"):
        dinov2_model(state)


def test_a_graph_without_positions_is_refused(tmp_path):
    onnx = pytest.importorskip("onnx", reason="the extra 'studies' is not installed")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])), tmp_path / "graph.onnx")
    from studies.real_weights.onnx_backbone import read_backbone

    with pytest.raises(ValueError, match=r"graph\.onnx: position embeddings"):
        read_backbone(tmp_path / "graph.onnx")
