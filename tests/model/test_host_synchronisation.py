# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A forward never waits for the device: it can be captured in a CUDA graph, and launches run ahead of the GPU.

The tensors are fake ones that say they are on CUDA, so no GPU is needed: reading one raises, and so does an operation
whose result has a size that only the device knows.
"""

import pytest
import torch
from small_models import small_config
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsepath_vit import SparsePathViTModel
from sparsepath_vit.model import (
    attention_backends,
    encoder_sparsepath_vit,
    linear_products,
    prune_score_operator,
    streamed_context,
)
from sparsepath_vit.model.streamed_context import strip_contexts


class NoTensorsOfTheHost(TorchDispatchMode):
    """Raises where an operation takes a tensor of the host: a copy from pageable memory waits for the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        assert devices <= {"cuda"} or devices <= {"cpu"}, f"{function} takes tensors of the host to the device"
        return result


def fake_cuda():
    """Makes tensors that say they are on CUDA; the weights of a model on the meta device can become such."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@torch.no_grad()
@pytest.mark.parametrize("tokens_per_strip", [0, 200], ids=["whole layers", "strips"])
@pytest.mark.parametrize("pooling", ["cls", "cls_mean"])
@pytest.mark.parametrize(
    "batch, image_sizes",
    [(1, None), (3, None), (2, [(60, 160), (160, 80)])],
    ids=["one large image, embedded in strips", "batch", "images of two sizes"],
)
def test_a_forward_with_pruning_never_waits_for_the_device(batch, image_sizes, pooling, tokens_per_strip, monkeypatch):
    monkeypatch.setattr(attention_backends, "_missing", lambda name, device: None)
    monkeypatch.setattr(attention_backends, "_unwanted", lambda name, device: None)
    monkeypatch.setattr(prune_score_operator, "kernels_run_on", lambda device: True)
    config = small_config(prune_ratio=0.5, pooling=pooling, tokens_per_strip=tokens_per_strip)
    with torch.device("meta"):
        model = SparsePathViTModel(config).eval()
    streamed, run_in_strips = [], encoder_sparsepath_vit.run_in_strips
    monkeypatch.setattr(
        encoder_sparsepath_vit,
        "run_in_strips",
        lambda *args, **kwargs: streamed.append(1) or run_in_strips(*args, **kwargs),
    )
    with fake_cuda():
        model.to_empty(device="cuda")
        pixel_values = torch.empty(batch, 3, 160, 168, device="cuda")
        with NoTensorsOfTheHost():
            outputs = model(pixel_values, image_sizes=image_sizes)
    assert len(streamed) == (4 if tokens_per_strip else 0)
    assert outputs.last_hidden_state.device.type == "cuda"
    counts = [40 * 42] * batch if image_sizes is None else [15 * 40, 40 * 20]
    assert outputs.patch_positions.shape == (batch, max(counts) // 2, 2)


class NoOtherTensorsOfTheHost(NoTensorsOfTheHost):
    """Lets the operators of this package pass: the tiles read where keys lie on the host, once per grid."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sparsepath_vit":
            return function(*args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)


@torch.no_grad()
@pytest.mark.parametrize("batch, image_sizes", [(1, None), (2, [(60, 160), (160, 80)])], ids=["one", "two sizes"])
def test_context_tokens_are_drawn_without_waiting_for_the_device(batch, image_sizes, monkeypatch):
    monkeypatch.setattr(attention_backends, "_missing", lambda name, device: None)
    monkeypatch.setattr(attention_backends, "_unwanted", lambda name, device: None)
    with torch.device("meta"):
        model = SparsePathViTModel(small_config(prune_ratio=0.5, num_context_tokens=100)).eval()
    with fake_cuda():
        model.to_empty(device="cuda")
        pixel_values = torch.empty(batch, 3, 160, 168, device="cuda")
        with NoOtherTensorsOfTheHost():
            outputs = model(pixel_values, image_sizes=image_sizes)
    assert outputs.last_hidden_state.device.type == "cuda"


@torch.no_grad()
def test_strips_with_context_tokens_never_wait_for_the_device(monkeypatch):
    monkeypatch.setattr(attention_backends, "_missing", lambda name, device: None)
    monkeypatch.setattr(attention_backends, "_unwanted", lambda name, device: None)
    streamed, run_in_strips = [], encoder_sparsepath_vit.run_in_strips
    monkeypatch.setattr(
        encoder_sparsepath_vit,
        "run_in_strips",
        lambda *args, **kwargs: streamed.append(1) or run_in_strips(*args, **kwargs),
    )
    settings = {"num_context_tokens": 100, "prune_ratio": 0.5, "tokens_per_strip": 200}
    with torch.device("meta"):
        model = SparsePathViTModel(small_config(**settings)).eval()
    # A fake weight has the type of a fake tensor, as if it were quantised.
    monkeypatch.setattr(linear_products, "is_plain", lambda linear: type(linear) is torch.nn.Linear)
    monkeypatch.setattr(streamed_context, "is_plain", lambda linear: type(linear) is torch.nn.Linear)
    with fake_cuda():
        model.to_empty(device="cuda")
        pixel_values = torch.empty(2, 3, 160, 168, device="cuda")
        with NoTensorsOfTheHost():
            outputs = model(pixel_values, image_sizes=[(60, 160), (160, 80)])
    assert len(streamed) == 4
    assert outputs.last_hidden_state.device.type == "cuda"


@torch.no_grad()
def test_context_tokens_of_strips_are_drawn_without_waiting_for_the_device():
    with torch.device("meta"):
        model = SparsePathViTModel(small_config(num_context_tokens=100)).eval()
    with fake_cuda():
        model.to_empty(device="cuda")
        pixel_values = torch.empty(2, 3, 160, 168, device="cuda")
        with NoTensorsOfTheHost():
            grid = model.token_grid(pixel_values, image_sizes=[(60, 160), (160, 80)])
            tokens = torch.empty(grid.num_tokens, model.config.hidden_size, device="cuda")
            contexts = strip_contexts(model.encoder.layers[1], tokens, grid, 200)
    assert [context.key.device.type for context in contexts] == ["cuda"] * 2


def test_what_waits_is_found():
    with fake_cuda():
        states = torch.empty(3, device="cuda")
        with pytest.raises(DataDependentOutputException):
            states.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            states[states > 0]
        with pytest.raises(AssertionError, match="takes tensors of the host to the device"), NoTensorsOfTheHost():
            torch.tensor([1, 2], device="cuda")
