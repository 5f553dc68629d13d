# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The fused kernels of a layer against float64: each result is rounded once.

They run interpreted on a CPU, compiled on a GPU.
"""

import pytest
import torch
from small_models import small_model

from sparsepath_vit import SparsePathViTModel
from sparsepath_vit.model import encoder_sparsepath_vit, fused_elementwise

pytest.importorskip("triton")

from sparsepath_vit.model import fused_elementwise_triton
from sparsepath_vit.model.attention_triton_launch import IS_INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not IS_INTERPRETED:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

# The interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
FLOAT32_ERROR = 4e-6  # of a float32 computation, relative to the largest number of a row


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors hold NaN, so that a number the kernels fail to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def kernels(monkeypatch):
    """The kernels run where eager inference would use them, interpreted or not; counts their launches."""
    launches = []
    monkeypatch.setattr(fused_elementwise, "kernels_run_on", lambda device: True)
    for name in ("launch_add_scaled", "launch_gated_silu"):
        launch = getattr(fused_elementwise_triton, name)
        monkeypatch.setattr(
            fused_elementwise_triton, name, lambda *a, launch=launch: launches.append(launch) or launch(*a)
        )
    return launches


def assert_rounded_once(actual, expected):
    """Differs from float64 by half a unit in the last place, and by the error of computing in float32."""
    assert actual.isfinite().all() and actual.shape == expected.shape
    expected = expected.to(actual.device)
    allowed = expected.abs() * torch.finfo(actual.dtype).eps / 2 + torch.finfo(actual.dtype).tiny
    allowed += FLOAT32_ERROR * expected.abs().amax(dim=-1, keepdim=True)
    assert ((actual.double() - expected).abs() <= allowed).all()


def random_numbers(*shape, dtype, offset=0.0):
    return (torch.randn(shape, dtype=torch.float64) + offset).to(DEVICE, dtype)


def random_norm(width, dtype):
    norm = torch.nn.LayerNorm(width, eps=1e-6, dtype=dtype, device=DEVICE)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    return norm


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_scale", [True, False], ids=["scale", "no scale"])
@pytest.mark.parametrize("shape", [(1, 1, 32), (2, 7, 24), (1, 5, 384), (1, 3, 1536), (13, 1000)], ids=str)
def test_sum_and_norm_are_rounded_once(shape, has_scale, dtype, kernels):
    # An offset makes a variance computed from the mean of squares lose its digits.
    residual, branch = random_numbers(*shape, dtype=dtype, offset=30.0), random_numbers(*shape, dtype=dtype)
    scale = random_numbers(shape[-1], dtype=dtype) if has_scale else None
    norm, before = random_norm(shape[-1], dtype), residual.clone()
    expected = residual.double() + branch.double() * (scale.double() if has_scale else 1.0)
    expected_norm = torch.nn.functional.layer_norm(
        expected, shape[-1:], norm.weight.double(), norm.bias.double(), norm.eps
    )

    total, normalised = fused_elementwise.add_scaled_and_normalise(residual, branch, scale, norm)
    assert_rounded_once(total, expected)
    assert_rounded_once(normalised, expected_norm)
    assert torch.equal(residual, before)

    shift = random_numbers(shape[-1], dtype=dtype)
    shifted, normalised_again = fused_elementwise.add_scaled_and_normalise(residual, branch, scale, norm, shift=shift)
    assert_rounded_once(shifted, expected + shift.double())
    assert torch.equal(normalised_again, normalised)

    assert fused_elementwise.add_scaled_(residual, branch, scale) is residual
    assert torch.equal(residual, total)
    assert len(kernels) == 3


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 7, 48), (3, 5000)], ids=str)
def test_gated_silu_is_rounded_once(shape, dtype, kernels):
    packed = random_numbers(*shape, dtype=dtype) * 4.0
    packed[..., 0, 0] = -80.0  # the exponential overflows
    gate, value = packed.double().chunk(2, dim=-1)
    output = fused_elementwise.gated_silu(packed)
    assert_rounded_once(output, gate / (1.0 + (-gate).exp()) * value)
    assert len(kernels) == 1


@torch.no_grad()
@pytest.mark.skipif(DEVICE == "cuda", reason="the torch form runs on the CPU")
def test_the_torch_form_is_the_specification():
    """It rounds after every operation, and is what training computes."""
    residual, branch, scale = (random_numbers(5, 24, dtype=torch.bfloat16) for _ in range(3))
    norm, scale = random_norm(24, torch.bfloat16), scale[0]
    total, normalised = fused_elementwise.add_scaled_and_normalise(residual, branch, scale, norm)
    assert torch.equal(total, residual + branch * scale) and torch.equal(normalised, norm(total))
    assert torch.equal(fused_elementwise.add_scaled_(residual.clone(), branch, scale), total)
    shifted, same = fused_elementwise.add_scaled_and_normalise(residual, branch, scale, norm, shift=scale)
    assert torch.equal(shifted, total + scale) and torch.equal(same, normalised)
    gate, value = branch.chunk(2, dim=-1)
    assert torch.equal(fused_elementwise.gated_silu(branch), torch.nn.functional.silu(gate) * value)


@torch.no_grad()
@pytest.mark.parametrize("tokens_per_strip", [0, 7])
@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
@pytest.mark.parametrize("use_layerscale", [True, False])
def test_a_model_computes_the_same(use_layerscale, mlp_type, tokens_per_strip, kernels, monkeypatch):
    added, add_product_ = [], encoder_sparsepath_vit.add_product_
    monkeypatch.setattr(
        encoder_sparsepath_vit, "add_product_", lambda *arguments: added.append(1) or add_product_(*arguments)
    )
    model = small_model(
        SparsePathViTModel, mlp_type=mlp_type, use_layerscale=use_layerscale, tokens_per_strip=tokens_per_strip
    )
    model = model.to(DEVICE).eval()
    pixels = torch.randn(2, 3, 24, 32, device=DEVICE)
    outputs = model(pixels, output_hidden_states=True)
    # Of each strip once after attention, and once in the MLP or after it. Whole layers have more tokens than an MLP is
    # wide, so that its last product adds to the residual itself.
    fused = len(kernels)
    assert fused >= (1 + (mlp_type == "swiglu")) * len(model.encoder.layers)
    assert len(added) == (0 if tokens_per_strip else len(model.encoder.layers))
    monkeypatch.setattr(fused_elementwise, "kernels_run_on", lambda device: False)
    added.clear()
    expected = model(pixels, output_hidden_states=True)
    assert len(kernels) == fused and not added
    # The roundings of each step grow over the layers: to 1.3e-5 on CPUs without AVX-512.
    for state, expected_state in zip(outputs.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, expected_state, rtol=3e-5, atol=3e-5)
    torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, rtol=3e-5, atol=3e-5)


def test_training_gradients_and_hooks_keep_to_the_modules(kernels):
    model = small_model(SparsePathViTModel).to(DEVICE).eval()
    pixels = torch.randn(1, 3, 16, 16, device=DEVICE)
    model(pixels)
    with torch.no_grad():
        model.train()(pixels)
        assert not [launch for launch in kernels if launch.__name__ == "launch_add_scaled"]
        model.eval()
        called = []
        for layer in model.encoder.layers:
            layer.norm2.register_forward_hook(lambda *_: called.append(1))
        model(pixels)
        assert len(called) == len(model.encoder.layers)
        assert not [launch for launch in kernels if launch.__name__ == "launch_add_scaled"]


def test_wider_weights_strided_states_and_fake_tensors_keep_to_the_torch_form(kernels):
    states = torch.randn(4, 16, dtype=torch.float16, device=DEVICE)
    with torch.no_grad():
        assert fused_elementwise.fuses(states, states)
        assert not fused_elementwise.fuses(states, states.float())
        assert fused_elementwise.fuses(states.float(), states)
        assert not fused_elementwise.fuses(states.t())
        assert not fused_elementwise.fuses(states.double())
        assert not fused_elementwise.fuses(states.to("meta"), states)
    assert not fused_elementwise.fuses(states)
