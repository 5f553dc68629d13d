# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Products that go where they are wanted, against linear layers in float64."""

import pytest
import torch
from torch import nn

from sparsepath_vit.model import fused_elementwise
from sparsepath_vit.model.fused_elementwise import add_scaled_
from sparsepath_vit.model.linear_products import WrittenProducts, add_product_, adds_product, scaled_weights


def random_layer(inputs, outputs, dtype, bias=True):
    layer = nn.Linear(inputs, outputs, bias=bias).double()
    nn.init.normal_(layer.weight, std=2 * inputs**-0.5)
    return layer.to(dtype).requires_grad_(False)


class Adapted(nn.Module):
    """What an adapter makes of a linear layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.calls = layer, 0

    def forward(self, inputs):
        self.calls += 1
        return self.layer(inputs) + 1


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_and_features_are_written_where_they_are_wanted(dtype, bias):
    layer, inputs = random_layer(24, 30, dtype, bias), torch.randn(7, 24, dtype=torch.float64).to(dtype)
    expected = nn.functional.linear(
        inputs.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double()
    )
    memory = torch.full((9, 20), torch.nan, dtype=dtype)
    WrittenProducts(layer, inputs).write(slice(2, 6), slice(10, 30), memory[3:7])
    error = (memory[3:7].double() - expected[2:6, 10:]).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps * expected.abs().max()
    assert memory[:3].isnan().all() and memory[7:].isnan().all()


@torch.no_grad()
def test_what_is_no_plain_layer_is_called_once():
    adapted, inputs = Adapted(random_layer(6, 4, torch.float32)), torch.randn(5, 6)
    products = WrittenProducts(adapted, inputs)
    memory = products.new_empty(5, 4)
    products.write(slice(0, 5), slice(0, 2), memory[:, :2])
    products.write(slice(0, 5), slice(2, 4), memory[:, 2:])
    assert adapted.calls == 1 and torch.equal(memory, adapted(inputs))


@torch.no_grad()
def test_under_autocast_a_layer_computes_as_it_would():
    layer, inputs = random_layer(6, 4, torch.float32), torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        products = WrittenProducts(layer, inputs)
        memory = products.new_empty(5, 4)
        products.write(slice(0, 5), slice(0, 4), memory)
        assert memory.dtype == torch.bfloat16 and torch.equal(memory, layer(inputs))


@torch.no_grad()
@pytest.mark.parametrize("scale_of", [1.0, 1e-5, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_product_added_is_no_farther_from_float64_than_one_that_is_scaled_and_added(dtype, scale_of):
    """Scaled weights are rounded once more, the product once less."""
    layer, (inputs, total) = random_layer(512, 96, dtype), (torch.randn(300, n, dtype=torch.float64) for n in (512, 96))
    inputs, total = inputs.to(dtype), (30 * total).to(dtype)
    scale = None if scale_of is None else (scale_of * torch.randn(96, dtype=torch.float64)).to(dtype)
    branch = inputs.double() @ layer.weight.double().T + layer.bias.double()
    expected = total.double() + branch * (1.0 if scale is None else scale.double())

    weight, bias = scaled_weights(layer, scale)
    found = add_product_(total + bias, inputs, weight)
    usual = add_scaled_(total.clone(), layer(inputs), scale)
    errors = [(result.double() - expected).square().mean().sqrt() for result in (found, usual)]
    # The bias is added, and rounded, before: where there is nothing to scale that is once more. In float32 a CPU adds
    # the products to the total one by one, and rounds each time.
    assert dtype == torch.float32 or errors[0] <= 1.45 * errors[1]
    assert errors[0] <= 2 * torch.finfo(dtype).eps * expected.square().mean().sqrt()


@torch.no_grad()
def test_a_product_is_added_by_plain_layers_of_many_tokens_only(monkeypatch):
    monkeypatch.setattr(fused_elementwise, "kernels_run_on", lambda device: True)
    layer, total = random_layer(8, 4, torch.float32), torch.zeros(2, 5, 4)
    assert adds_product(total, layer)
    assert not adds_product(total[:, :3].contiguous(), layer)
    assert not adds_product(total, Adapted(layer))
    assert not adds_product(total.bfloat16(), layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert not adds_product(total, layer)
    with torch.enable_grad():
        assert not adds_product(total, layer)
    layer.register_forward_hook(lambda *_: None)
    assert not adds_product(total, layer)
