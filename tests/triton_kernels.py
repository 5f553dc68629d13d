# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What the tests of the Triton attention kernels share: how they are run, large random states, tolerances.

A test module that imports the fixtures has them all: the kernels run on a GPU or interpreted, in memory full of NaN.
"""

import inspect
import os

import pytest
import torch
from small_models import random_mask

from sparsepath_vit import block_attention, set_block_attention_backend
from sparsepath_vit.model.attention_specification import naive_block_attention
from sparsepath_vit.model.context_tokens import ContextTokens

pytest.importorskip("triton")

from sparsepath_vit.model import attention_triton_launch as kernel
from sparsepath_vit.model import attention_triton_tables as tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# torch's deterministic algorithms, which poison memory, ask for this before any matrix product on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if DEVICE == "cpu" and not kernel.IS_INTERPRETED:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

# Largest error relative to the largest number, against float64. The interpreter computes bfloat16 wrongly.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
DTYPES = [dtype for dtype in TOLERANCES if dtype != torch.bfloat16 or DEVICE == "cuda"]


@pytest.fixture(autouse=True)
def the_kernel_runs():
    set_block_attention_backend("triton")
    yield
    set_block_attention_backend("auto")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors hold NaN, so that a number the kernels fail to write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def many_splits_and_all_widths(monkeypatch):
    """Splits and tiles of all widths for small images too; large float32 tiles save time in the interpreter."""
    monkeypatch.setattr(kernel, "_TOKENS_PER_SPLIT", 200)
    monkeypatch.setattr(tables, "LEAST_TILES_FOR_NARROW_ONES", 8)
    if kernel.IS_INTERPRETED:
        monkeypatch.setattr(kernel, "_SHAPE_FLOAT32", kernel.LaunchShape(64, 64, 4, 1))


def present_tokens(kept, batch, size):
    """(batch, rows, columns) of the tokens that are kept, or None; images keep different numbers of them."""
    if kept == "all":
        return None
    present = torch.zeros(batch, *size, dtype=torch.bool)
    if kept == "random":
        present = random_mask(batch, *size, 0.4, seed=1)
    elif kept == "clusters":
        for image in range(batch):
            present[image, size[0] // 4 : size[0] * 3 // 4, size[1] // 4 + image : size[1] * 3 // 4 + image] = True
    elif size != (1, 1):
        present[:, 0] = True
        present[:, -(size[0] // 4) :, size[1] // 2 :] = random_mask(batch, size[0] // 4, size[1] - size[1] // 2, 0.7)
    present[:, 0, 0] = True
    return present


def fused_states(grid, head_dim=16, heads=1, dtype=torch.float32, factor=2.0):
    """Query, key and value, (batch, heads, tokens, head_dim) views of one projection with large random numbers."""
    batch, tokens = grid.batch_shape
    fused = factor * torch.randn(batch, tokens, 3, heads, head_dim, dtype=torch.float64)
    return fused.to(DEVICE, dtype).requires_grad_()


def split(fused):
    return fused.permute(2, 0, 3, 1, 4).unbind(0)


def on_device(context):
    return None if context is None else ContextTokens(*(tensor.to(DEVICE) for tensor in context[:-1]), context.counts)


def expected_attention(fused, grid, scale, context=None):
    """Output (batch, heads, tokens, head_dim) of the specification in float64, and the states it depends on."""
    fused = fused.detach().cpu().double().requires_grad_()
    batch, heads, tokens, head_dim = split(fused)[0].shape
    packed = [states.transpose(1, 2).reshape(-1, heads, head_dim) for states in split(fused)]
    output = naive_block_attention(*packed, grid.to("cpu"), scale, context=context)
    return output.view(batch, tokens, heads, head_dim).transpose(1, 2), fused


def check_kernel(grid, fused, scale=None, factor=1.0, context=None):
    """Output and the gradients of query, key and value, of patch and of global tokens; grid and context on the CPU."""
    output = block_attention(*split(fused), grid.to(DEVICE), scale=scale, context=on_device(context))
    expected, expected_fused = expected_attention(fused, grid, scale or fused.shape[-1] ** -0.5, context)
    # A gradient with the strides that the model's transpose leaves.
    weights = torch.randn(expected.transpose(1, 2).shape).to(output).transpose(1, 2)
    (gradient,) = torch.autograd.grad(output, fused, weights)
    (expected_gradient,) = torch.autograd.grad(expected, expected_fused, weights.cpu().double())
    assert output.dtype == gradient.dtype == fused.dtype
    assert_close(output, expected, fused.dtype, factor)
    # (batch, tokens, query key or value, heads, head_dim). Where the softmax is saturated the gradients of query and
    # key are small differences of large numbers.
    least = 0.1 * expected_gradient.abs().max()
    for index in range(3):
        assert_close(gradient[:, :, index], expected_gradient[:, :, index], fused.dtype, 2 * factor, least)


def assert_close(actual, expected, dtype, factor=1.0, least=0.0):
    error = (actual.detach().cpu().double() - expected.detach()).abs().max().item()
    largest = max(expected.abs().max().item(), least)
    assert error <= factor * TOLERANCES[dtype] * largest, f"error {error:.1e} where the largest number is {largest:.1e}"


class Recorder:
    """Stands for a kernel and keeps what Triton compiles anew for: constants, and what it specialises arguments by."""

    NOT_SPECIALISED = (
        *("num_tokens", "first_program", "num_splits", "num_split_programs", "num_entries", "num_images", "most_parts"),
        *("chunks", "global_shift"),
    )

    def __init__(self, function):
        self.names, self.forms = list(inspect.signature(function.fn).parameters), set()

    def __getitem__(self, programs):
        return self.launch

    def launch(self, *arguments, **constants):
        described = []
        for name, value in zip(self.names, arguments, strict=False):
            if value is None:
                described.append(name)
            elif isinstance(value, torch.Tensor):
                described.append((value.dtype, value.data_ptr() % 16 == 0))
            elif isinstance(value, int) and name not in self.NOT_SPECIALISED:
                described.append((name, value == 1, value % 16 == 0))
        self.forms.add((*described, *sorted(constants.items())))


def recorded_kernels(monkeypatch, *modules):
    """{name: recorder} of all kernels that modules launch, none of which runs from now on."""
    recorders = {}
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            recorders[name] = Recorder(getattr(module, name))
            monkeypatch.setattr(module, name, recorders[name])
    return recorders
