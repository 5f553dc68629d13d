# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a layer moves through a GPU's memory beside its matrix products and attention, counted at UNI2-h's shape.

The tensors are on the meta device, so nothing is computed; each operation counts what it reads and what it writes.
"""

import json

import pytest
import torch
from places import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsepath_vit import SparsePathViTConfig, TokenGrid
from sparsepath_vit.model import attention_backends, fused_elementwise
from sparsepath_vit.model.attention_registration import ATTENTION_NAME
from sparsepath_vit.model.encoder_sparsepath_vit import SparsePathViTLayer
from sparsepath_vit.model.streamed_layers import run_in_strips, tokens_per_strip

pytest.importorskip("triton")

from sparsepath_vit.model import fused_elementwise_triton

MOST_BYTES = 3.0e9
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
MOVE_NOTHING = ("_unsafe_view", "empty", "empty_like", "new_empty", "promote_types")


class BytesMoved(TorchDispatchMode):
    """Adds up, by operation, what is read and written beside matrix products and attention; views move nothing."""

    def __init__(self):
        super().__init__()
        self.of, self.products = {}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__.rstrip("_")
        if name in PRODUCTS:
            self.products.append(tuple(args[-2].shape))
        elif function.namespace != "sparsepath_vit" and not function.is_view and name not in MOVE_NOTHING:
            # What copy_ writes over, and what `out` names, is not read.
            read = tree_leaves(args[1:] if name == "copy" else (args, kwargs_read(kwargs)))
            self.add(name, *read, *tree_leaves(result))
        return result

    def add(self, name, *tensors):
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))
        self.of[name] = self.of.get(name, 0) + moved

    def total(self):
        return sum(self.of.values())


def kwargs_read(kwargs):
    return {name: value for name, value in (kwargs or {}).items() if name != "out"}


@pytest.fixture
def moved(monkeypatch):
    """Counts the launches of kernels that do not run here."""
    counted = BytesMoved()
    for name in ("_missing", "_unwanted"):
        monkeypatch.setattr(attention_backends, name, lambda name, device: None)
    monkeypatch.setattr(fused_elementwise, "kernels_run_on", lambda device: True)

    def add_scaled(residual, branch, scale, total, norm=None, shift=None):
        normalised = None if norm is None else torch.empty_like(residual)
        counted.add("add_scaled", residual, branch, total, normalised)
        return normalised

    def gated_silu(packed):
        output = packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)
        counted.add("gated_silu", packed, output)
        return output

    monkeypatch.setattr(fused_elementwise_triton, "launch_add_scaled", add_scaled)
    monkeypatch.setattr(fused_elementwise_triton, "launch_gated_silu", gated_silu)
    return counted


def uni2_h_at_3430_px():
    """A layer, its input and the grid: 245 x 245 patch tokens and 9 global tokens in bfloat16."""
    config = json.loads((ROOT / "configuration" / "architectures" / "uni2-h.json").read_text())["config"]
    config = SparsePathViTConfig(**config, window_size=8, attn_implementation=ATTENTION_NAME)
    with torch.device("meta"):
        layer = SparsePathViTLayer(config, drop_path=0.0).to(torch.bfloat16).eval()
        grid = TokenGrid.create([(245, 245)], num_global_tokens=9, window_size=8, device="meta")
        return layer, torch.empty(1, grid.num_tokens, config.hidden_size, dtype=torch.bfloat16), grid


@torch.no_grad()
def test_a_whole_layer_moves_less_than_three_gigabytes(moved):
    layer, hidden_states, grid = uni2_h_at_3430_px()
    with moved:
        layer(hidden_states, grid)
    assert moved.total() <= MOST_BYTES, moved.of
    # Norm 2, sum and norm 4, SwiGLU 8 times the hidden states; the weights of the last product are scaled.
    expected = 14 * hidden_states.nbytes + 2 * layer.mlp.fc2.weight.nbytes
    assert moved.total() == pytest.approx(expected, rel=2e-3)


@torch.no_grad()
def test_a_layer_in_strips_moves_less_than_three_gigabytes(moved):
    layer, hidden_states, grid = uni2_h_at_3430_px()
    layer.config.tokens_per_strip = tokens_per_strip(layer.config, torch.device("cuda"))
    with moved:
        run_in_strips(layer, hidden_states, grid, overwrites=True)
    assert moved.total() <= MOST_BYTES, moved.of
    # Beside the global tokens, no product of the MLP is smaller than a strip, of which the last is what is left.
    of_mlp = [tokens for tokens, features in moved.products if features == layer.config.intermediate_size]
    assert of_mlp == [15_680, 15_680, 15_680, 12_985, 9]
