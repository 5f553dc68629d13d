# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The compiled CPU kernel against the naive specification in float64, with every kind of instruction it has."""

import ctypes
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import random_pixels, small_model
from token_batches import batches

from sparsepath_vit import SparsePathViTModel, TokenGrid, block_attention, set_block_attention_backend
from sparsepath_vit.model import attention_cpu, host_compiler
from sparsepath_vit.model.attention_cpu_source import CALL_FIELDS
from sparsepath_vit.model.attention_specification import attention_pattern, naive_block_attention
from sparsepath_vit.model.context_tokens import draw_context_tokens, exact_tokens

REASON = attention_cpu.CPU_KERNEL.missing(torch.device("cpu"))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
TAKES_BFLOAT16 = REASON is None and attention_cpu.takes(torch.empty(1, 16, dtype=torch.bfloat16))
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not TAKES_BFLOAT16, reason="this CPU has no bfloat16")),
]


@pytest.fixture(autouse=True)
def kernel():
    set_block_attention_backend("cpu_kernel")
    yield
    set_block_attention_backend("auto")


def random_states(grid, dtype, heads=2, head_dim=16, size=1.5):
    """Fresh in each run, (batch, heads, tokens, head_dim), as views of a fused projection."""
    fused = (size * torch.randn(*grid.batch_shape, 3, heads, head_dim)).to(dtype)
    return fused.permute(2, 0, 3, 1, 4).unbind(0)


def exact(states, grid, context, scale=0.3):
    """By the specification, in float64."""
    packed = [state.double().transpose(1, 2).flatten(0, 1) for state in states]
    output = naive_block_attention(*packed, grid, scale, context=context)
    return output.unflatten(0, grid.batch_shape).transpose(1, 2)


def attend(states, grid, context, backend="cpu_kernel"):
    set_block_attention_backend(backend)
    return block_attention(*states, grid, context=context, scale=0.3)


def assert_exact(states, grid, context=None):
    """As near to float64 as the type allows, or, where logits are large, as near as the tiles of SDPA calls."""
    output, expected = attend(states, grid, context), exact(states, grid, context)
    assert torch.equal(output, attend(states, grid, context))

    def error(output):
        return (output.double() - expected).norm() / expected.norm()

    # In bfloat16 rounding the output costs 0.0017 alone, and rounding probabilities 0.001.
    bound = 0.0025 if output.dtype == torch.bfloat16 else 2e-6
    if error(output) > bound:
        assert error(output) <= 1.3 * error(attend(states, grid, context, "sdpa_tiles"))


def pruned(grid, share=0.5):
    """What pruning leaves of each image: a random share, and at least one patch token."""
    kept, counts, first = [], [], 0
    for count in grid.counts:
        kept.append(first + torch.randperm(count)[: max(1, int(share * count))].sort().values)
        counts.append(len(kept[-1]))
        first += count
    return grid.select(torch.cat(kept), counts)


def with_weights(grid):
    return dataclasses.replace(grid, weights=torch.randint(1, 9, (len(grid.rows),)))


def drawn(grid):
    return draw_context_tokens(grid, exact_tokens(torch.rand(len(grid.rows)), grid)) if grid.has_context else None


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=60)
@given(
    batch=batches(max_side=12),
    num_context_tokens=st.sampled_from([0, 0, 5, 40, 1000]),
    is_pruned=st.booleans(),
    is_weighted=st.booleans(),
    head_dim=st.sampled_from([4, 16, 80, 128]),
)
def test_it_follows_the_specification(batch, dtype, num_context_tokens, is_pruned, is_weighted, head_dim):
    grid = batch._replace(num_context_tokens=num_context_tokens).grid()
    grid = pruned(grid) if is_pruned else grid
    grid = with_weights(grid) if is_weighted else grid
    assert_exact(random_states(grid, dtype, head_dim=head_dim), grid, drawn(grid))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])  # logits up to about 1, 10 and 90
@pytest.mark.parametrize("num_context_tokens", [0, 300])
def test_blocks_of_many_queries_and_keys(dtype, size, num_context_tokens):
    """Several passes over the queries of a tile, several chunks of keys; a window that no vector divides."""
    for window in (8, 11):
        grid = TokenGrid.create(
            [(40, 37)], num_global_tokens=9, window_size=window, num_context_tokens=num_context_tokens
        )
        for one in (grid, with_weights(pruned(grid, 0.4))):
            assert_exact(random_states(one, dtype, head_dim=64, size=size), one, drawn(one))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_image_gets_in_a_batch_and_on_any_number_of_threads_what_it_gets_alone(dtype):
    grid = TokenGrid.create([(21, 18)] * 2, num_global_tokens=3, window_size=4, num_context_tokens=60)
    alone = TokenGrid.create([(21, 18)], num_global_tokens=3, window_size=4, num_context_tokens=60)
    states, num_threads = random_states(grid, dtype), torch.get_num_threads()
    together = block_attention(*states, grid, context=draw_context_tokens(grid))
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            output = block_attention(*(state[1:] for state in states), alone, context=draw_context_tokens(alone))
            assert torch.equal(output[0], together[1])
    finally:
        torch.set_num_threads(num_threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_no_number_stays_where_it_is_seen(dtype, bad):
    """Nothing of it is lost in the softmax, and nothing reaches another image or a block further away."""
    grid = TokenGrid.create([(20, 20)] * 2, num_global_tokens=2, window_size=4)
    query, key, value = (state.clone() for state in random_states(grid, dtype))
    token = 2 + 3  # of the first block of the second image
    key[1, :, token] = bad
    output = block_attention(query, key, value, grid, scale=0.3)
    sees_it = attention_pattern(grid)[:, :, token]  # (images, queries)
    sees_it[0] = False
    assert torch.equal(output.isnan(), sees_it[:, None, :, None].expand_as(output))


def test_every_instruction_set_computes_the_same(monkeypatch):
    """Vectors of 16, 8 and 4 numbers: what other machines compile is compiled here, and run where this one can."""
    abilities = torch.cpu.get_capabilities()
    if abilities.get("architecture") != "x86_64":
        pytest.skip("these are the options of x86")
    levels = {"x86-64": "sse2", "x86-64-v3": "avx2", "x86-64-v4": "avx512_vl"}
    names = [level for level, ability in levels.items() if abilities.get(ability)]
    grid = TokenGrid.create([(19, 15)], num_global_tokens=3, window_size=5, num_context_tokens=40)
    states, context = random_states(grid, torch.float32, head_dim=32), draw_context_tokens(grid)
    for name in names:
        monkeypatch.setattr(host_compiler, "option_for_this_cpu", lambda name=name: f"-march={name}")
        library = host_compiler.compiled_library.__wrapped__("attention", attention_cpu.SOURCE)
        library.attend.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
        monkeypatch.setattr(attention_cpu, "_library", lambda library=library: library)
        assert library.takes_bfloat16() == 0
        assert_exact(states, grid, context)


def test_a_call_has_the_layout_of_the_source():
    """Pointers and integers of eight bytes, so that C puts nothing between them."""
    assert ctypes.sizeof(attention_cpu._Call) == 8 * len(CALL_FIELDS)


@pytest.mark.parametrize(
    ("dtype", "head_dim"), [(torch.float64, 16), (torch.float16, 16), (torch.float32, 6), (torch.float32, 132)]
)
@pytest.mark.parametrize("num_context_tokens", [0, 20])
def test_what_it_does_not_take_the_tiles_compute(dtype, head_dim, num_context_tokens):
    grid = TokenGrid.create([(13, 9)], num_global_tokens=3, window_size=4, num_context_tokens=num_context_tokens)
    states, context = random_states(grid, dtype, head_dim=head_dim), drawn(grid)
    outputs = [attend(states, grid, context, backend) for backend in ("cpu_kernel", "sdpa_tiles")]
    tolerance = {torch.float64: 1e-12, torch.float16: 2e-3, torch.float32: 3e-6}[dtype]
    torch.testing.assert_close(*outputs, rtol=tolerance, atol=tolerance)


def test_gradients_are_those_of_the_tiles():
    grid = TokenGrid.create([(13, 9)], num_global_tokens=3, window_size=4, num_context_tokens=20)
    fused, context, results = torch.randn(3, *grid.batch_shape, 2, 16), draw_context_tokens(grid), []
    for backend in ("cpu_kernel", "sdpa_tiles"):
        states = fused.clone().requires_grad_()
        output = attend([state.transpose(1, 2) for state in states], grid, context, backend)
        results.append(torch.autograd.grad(output.square().sum(), states)[0])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("num_context_tokens", [0, 30])
def test_a_model_runs_on_it_and_nothing_else(num_context_tokens, monkeypatch):
    model = small_model(SparsePathViTModel, prune_ratio=0.5, num_context_tokens=num_context_tokens)
    pixels, outputs = random_pixels(1, 15, 13), []
    for backend in ("cpu_kernel", "reference"):
        if backend == "cpu_kernel":
            for name in ("tiled_block_attention", "tiled_strip_attention"):
                monkeypatch.setattr(attention_cpu, name, lambda *rest: pytest.fail("tiles ran"))
        set_block_attention_backend(backend)
        outputs.append(model(pixels).last_hidden_state)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_memory_that_is_not_there_is_an_error(monkeypatch):
    grid = TokenGrid.create([(5, 4)], num_global_tokens=2, window_size=2)

    class Library:
        def attend(self, *arguments):
            return 1

    monkeypatch.setattr(attention_cpu, "takes", lambda query: True)
    monkeypatch.setattr(attention_cpu, "_library", Library)
    with pytest.raises(MemoryError, match="no memory for its threads"):
        block_attention(*random_states(grid, torch.float32), grid)
