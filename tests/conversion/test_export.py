# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import importlib.util

import numpy as np
import pytest
import torch
from small_models import random_pixels, small_model

from sparsepath_vit import SparsePathViTModel
from sparsepath_vit.conversion import export_onnx, export_program
from sparsepath_vit.conversion.export import ExportableEncoder, ExportedOutput, bicubic_weights
from sparsepath_vit.model.embeddings import resampling_weights

# (batch, rows, columns); the stored position grid of the small models is 6 x 6.
SIZES = [(2, 8, 12), (1, 6, 6), (3, 16, 3), (1, 2, 9)]
PRUNED = {"prune_ratio": 0.5, "pooling": "cls_mean", "num_hidden_layers": 2, "prune_after_layer": 1}
MODELS = [
    pytest.param({}, id="block-local"),
    pytest.param(PRUNED, id="pruned"),
    pytest.param({"prune_ratio": 0.4, "prune_score": "attention_value"}, id="score of values"),
    pytest.param({"prune_ratio": 0.4, "prune_score": "cls_attention"}, id="score of the CLS token"),
    pytest.param(
        {"window_size": None, "position_interpolation_offset": 0.1, "position_antialias": False}, id="dense, DINOv2"
    ),
    pytest.param({"num_prefix_position_embeddings": 1, "use_layerscale": False, "mlp_type": "gelu"}, id="other parts"),
]


def assert_agrees(outputs, model, pixels):
    with torch.no_grad():
        expected = model(pixels)
    for name, value in zip(ExportedOutput._fields, outputs, strict=True):
        assert np.allclose(np.asarray(value), getattr(expected, name).numpy(), atol=3e-5), name


@pytest.mark.parametrize("overrides", MODELS)
def test_the_exportable_form_computes_what_the_model_computes(overrides):
    model = small_model(SparsePathViTModel, **overrides)
    for batch, rows, columns in SIZES:
        pixels = random_pixels(batch, rows, columns)
        with torch.no_grad():
            assert_agrees(ExportableEncoder(model)(pixels), model, pixels)


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("number", [2, 5, 6, 7, 19])
def test_positions_are_resampled_as_torch_does(number, offset, antialias):
    found = bicubic_weights(torch.tensor(float(number)), number, 6, torch.tensor(offset), antialias)
    assert torch.allclose(found, resampling_weights(number, 6, found, antialias, offset), atol=1e-5)


def test_a_program_of_torch_export_takes_any_batch_and_sides():
    model = small_model(SparsePathViTModel, **PRUNED)
    program = export_program(model).module()
    for batch, rows, columns in SIZES:
        pixels = random_pixels(batch, rows, columns)
        assert_agrees([output.detach() for output in program(pixels)], model, pixels)


@pytest.mark.parametrize(
    ("num_context_tokens", "sizes"), [(0, [(8, 12), (6, 6), (6, 17), (33, 2)]), (30, [(8, 12), (6, 17), (33, 2)])]
)
def test_the_model_itself_is_exported_with_open_sides(num_context_tokens, sizes):
    """As docs/interop.md says; (6, 6) is the size of the stored positions, and all in one neighbourhood."""
    model = small_model(SparsePathViTModel, num_context_tokens=num_context_tokens, **PRUNED)
    rows, columns = (torch.export.Dim(name, min=2, max=4096) for name in ("rows", "columns"))
    sides = {"pixel_values": {2: 4 * rows, 3: 4 * columns}}
    with torch.no_grad():
        pixels = {"pixel_values": random_pixels(2, 9, 7)}
        program = torch.export.export(model, (), pixels, dynamic_shapes=sides, strict=True).module()
        for size in sizes:
            pixels = random_pixels(2, *size)
            expected, outputs = model(pixels), program(pixel_values=pixels)
            for name in ("pooler_output", "last_hidden_state", "patch_positions"):
                assert torch.allclose(outputs[name], expected[name], atol=3e-5), (size, name)


def test_onnx_takes_any_batch_and_sides_in_onnxruntime(tmp_path):
    for name in ("onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    import onnxruntime

    model = small_model(SparsePathViTModel, **PRUNED)
    path = export_onnx(model, tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    session = onnxruntime.InferenceSession(path)
    assert [output.name for output in session.get_outputs()] == list(ExportedOutput._fields)
    for batch, rows, columns in SIZES:
        pixels = random_pixels(batch, rows, columns)
        assert_agrees(session.run(None, {"pixel_values": pixels.numpy()}), model, pixels)


def test_what_draws_tokens_by_the_size_of_an_image_is_refused():
    for overrides in ({"num_context_tokens": 16}, {"prune_ratio": 0.5, "num_representatives": 4}):
        with pytest.raises(ValueError, match="draw tokens by the size of each image"):
            export_program(small_model(SparsePathViTModel, **overrides))


def test_a_package_that_onnx_needs_is_named(monkeypatch, tmp_path):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(ImportError, match="onnxscript is needed to write ONNX"):
        export_onnx(small_model(SparsePathViTModel), tmp_path / "model.onnx")
