# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The Triton kernels against the naive specification in float64: interpreted on a CPU, compiled on a GPU.

The interpreter is slow, so the full product of grids, windows and masks is thinned to a selection that holds every pair
of values; SPARSEPATH_ALL_KERNEL_CASES=1 runs the product.
"""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import random_mask
from triton_kernels import (  # noqa: F401, fixtures
    DEVICE,
    DTYPES,
    TOLERANCES,
    assert_close,
    check_kernel,
    expected_attention,
    fused_states,
    kernel,
    many_splits_and_all_widths,
    poisoned_memory,
    present_tokens,
    recorded_kernels,
    split,
    the_kernel_runs,
)

from sparsepath_vit import TokenGrid, block_attention
from sparsepath_vit.model.attention_triton import KERNEL_HEAD_DIMS
from sparsepath_vit.model.attention_triton_tables import attention_tiles

AXES = {
    "size": [(1, 1), (7, 5), (16, 16), (33, 17)],
    "window": [2, 3, 8, 16, 40],
    "radius": [0, 1, 2],
    "num_globals": [1, 5, 9],
    "batch": [1, 3],
    "kept": ["all", "random", "clusters", "empty blocks"],
    "dtype": DTYPES,
}


def thinned(axes):
    """Cases that together hold every pair of values of two axes, without those of many small tiles."""
    cases = list(itertools.product(*axes.values()))
    if os.environ.get("SPARSEPATH_ALL_KERNEL_CASES") == "1":
        return cases
    cases = [case for case in cases if math.prod(case[0]) * case[4] / case[1] < 250]

    def pairs(case):
        return set(itertools.combinations(enumerate(case), 2))

    draw, chosen = random.Random(0), []
    missing = set().union(*map(pairs, cases))
    while missing:
        chosen.append(max(draw.sample(cases, 100), key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def case_id(case):
    (rows, columns), window, radius, num_globals, batch, kept, dtype = case
    return f"{batch}x{rows}x{columns}-w{window}-r{radius}-g{num_globals}-{kept.replace(' ', '_')}-{str(dtype)[6:]}"


@pytest.mark.parametrize("case", thinned(AXES), ids=case_id)
def test_output_and_gradients_are_those_of_the_specification(case):
    size, window, radius, num_globals, batch, kept, dtype = case
    grid = TokenGrid.create(
        [size] * batch,
        num_global_tokens=num_globals,
        window_size=window,
        neighbor_radius=radius,
        present=present_tokens(kept, batch, size),
    )
    check_kernel(grid, fused_states(grid, dtype=dtype))


@pytest.mark.parametrize("head_dim", KERNEL_HEAD_DIMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dimensions(head_dim, dtype):
    grid = TokenGrid.create([(6, 5)], num_global_tokens=2, window_size=3)
    check_kernel(grid, fused_states(grid, head_dim, heads=2, dtype=dtype, factor=1.5))


@pytest.mark.parametrize("num_globals", [16, 17, 70])
def test_many_global_tokens(num_globals):
    grid = TokenGrid.create([(5, 5)], num_global_tokens=num_globals, window_size=2)
    check_kernel(grid, fused_states(grid))


def test_images_of_different_sizes_packed_into_one_row():
    grid = TokenGrid.create([(9, 4), (1, 1), (3, 12)], num_global_tokens=2, window_size=4)
    assert grid.batch_shape == (1, 79)
    check_kernel(grid, fused_states(grid))


def test_a_pruned_grid():
    grid = TokenGrid.create([(16, 16)], num_global_tokens=3, window_size=8)
    kept = torch.randperm(256)[:102].sort().values
    check_kernel(grid.select(kept, [102]), fused_states(grid.select(kept, [102])))


def test_dense_attention():
    grid = TokenGrid.create([(9, 17)], num_global_tokens=3, window_size=None)
    check_kernel(grid, fused_states(grid))


def test_the_shapes_that_a_gpu_uses_for_float32(monkeypatch):
    monkeypatch.undo()
    grid = TokenGrid.create([(9, 8)], num_global_tokens=1, window_size=4)
    check_kernel(grid, fused_states(grid))


def test_a_scale_of_its_own():
    grid = TokenGrid.create([(4, 5)], num_global_tokens=1, window_size=2)
    check_kernel(grid, fused_states(grid), scale=0.7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits_stay_finite(dtype):
    """Logits of +-1e4: one key has all the probability, and for some queries it is a global token."""
    grid = TokenGrid.create([(7, 5)], num_global_tokens=2, window_size=3)
    fused = fused_states(grid, dtype=torch.float64).detach()
    query, key, value = split(fused)
    fused[:, :, :2] *= (1e4 / (query @ key.transpose(-1, -2)).abs().max()) ** 0.5
    fused = fused.to(dtype).requires_grad_()
    query, key, value = split(fused)
    output = block_attention(query, key, value, grid.to(DEVICE), scale=1.0)
    output.sum().backward()
    assert output.isfinite().all() and fused.grad.isfinite().all()
    assert_close(output, expected_attention(fused, grid, 1.0)[0], dtype, factor=1e3 if dtype == torch.float32 else 5.0)


def test_two_runs_are_bitwise_equal():
    grid = TokenGrid.create([(16, 16)], num_global_tokens=5, window_size=8, present=random_mask(1, 16, 16, 0.5, 0))
    fused = fused_states(grid, heads=2)
    runs = []
    for _ in range(2):
        output = block_attention(*split(fused), grid.to(DEVICE))
        runs.append((output, *torch.autograd.grad(output.square().sum(), fused)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_a_gradient_that_is_one_number_expanded():
    """The gradient of a sum has stride 0 everywhere."""
    grid = TokenGrid.create([(4, 4)], num_global_tokens=1, window_size=2)
    fused = fused_states(grid)
    block_attention(*split(fused), grid.to(DEVICE)).sum().backward()
    expected, expected_fused = expected_attention(fused, grid, 0.25)
    expected.sum().backward()
    assert_close(fused.grad, expected_fused.grad, fused.dtype, factor=2.0)


def test_a_fused_projection_is_read_in_place(monkeypatch):
    """Copies of query, key and value would cost as much memory as the projection itself."""
    grid = TokenGrid.create([(4, 5)] * 2, num_global_tokens=1, window_size=2)
    fused = fused_states(grid)
    read = []
    launch = kernel.launch_block_attention
    monkeypatch.setattr(
        kernel, "launch_block_attention", lambda *arguments: read.append(arguments[:3]) or launch(*arguments)
    )
    block_attention(*split(fused), grid.to(DEVICE))
    assert [states.data_ptr() for states in read[0]] == [states.data_ptr() for states in split(fused)]


def test_keys_and_values_that_lie_differently():
    """They are copied: one offset serves both."""
    grid = TokenGrid.create([(7, 5)], num_global_tokens=2, window_size=3)
    fused = fused_states(grid, heads=2)

    def attention(key, value):
        output = block_attention(split(fused)[0], key, value, grid.to(DEVICE))
        return output, torch.autograd.grad(output.square().sum(), fused)[0]

    _, key, value = split(fused)
    expected = attention(key, value)
    for states in ((key, value.contiguous()), (key.contiguous(), value)):
        assert states[0].stride() != states[1].stride()
        assert all(torch.equal(one, other) for one, other in zip(attention(*states), expected, strict=True))


def test_images_do_not_see_each_other_even_where_one_holds_infinities():
    grid = TokenGrid.create([(5, 4)] * 2, num_global_tokens=2, window_size=2)
    fused = fused_states(grid).detach()
    alone = block_attention(*split(fused), grid.to(DEVICE))
    fused[1] = float("inf")
    assert torch.equal(block_attention(*split(fused), grid.to(DEVICE))[0], alone[0])


class TestBadInput:
    def test_head_dimension(self):
        grid = TokenGrid.create([(2, 2)], num_global_tokens=1, window_size=2, device=DEVICE)
        with pytest.raises(
            ValueError, match=r"query has head_dim 48: the Triton kernel takes one of \(16, .*'sdpa_tiles'"
        ):
            block_attention(*split(fused_states(grid, head_dim=48)), grid)

    def test_dtype(self):
        grid = TokenGrid.create([(2, 2)], num_global_tokens=1, window_size=2, device=DEVICE)
        with pytest.raises(ValueError, match=r"query is torch.float64: the Triton kernel takes one of .*'sdpa_tiles'"):
            block_attention(*split(fused_states(grid, dtype=torch.float64)), grid)

    def test_grid_of_another_batch(self):
        grid, other = (TokenGrid.create([(2, n)], num_global_tokens=1, window_size=2, device=DEVICE) for n in (2, 3))
        with pytest.raises(ValueError, match=r"grid describes \(batch, tokens\) = \(1, 7\)"):
            block_attention(*split(fused_states(grid)), other)


def test_launch_shapes_part_tiles_evenly():
    for name, head_dim, dtype, tile_size, capability in itertools.product(
        ("forward", "backward_query", "backward_key_value"), KERNEL_HEAD_DIMS, TOLERANCES, (16, 32, 64, 128), (8, 9, 12)
    ):
        shape = kernel.launch_shape(name, head_dim, dtype, tile_size, capability)
        assert tile_size % shape.block_m == 0 and shape.block_n >= 16


def test_kernels_are_compiled_once_for_all_sizes_and_numbers_of_heads(monkeypatch):
    """Regression: the reduction was compiled for each number of splits, both for odd and even numbers of heads."""
    monkeypatch.undo()
    recorders = recorded_kernels(monkeypatch, kernel)
    for heads, side in itertools.product((6, 9), (1, 5, 14, 20, 31, 37, 43, 50, 55, 64)):
        grid = TokenGrid.create([(side, side)], num_global_tokens=3, window_size=8, device=DEVICE)
        block_attention(*split(fused_states(grid, 16, heads)), grid).sum().backward()
    assert len(recorders) == 6
    assert {name: len(recorder.forms) for name, recorder in recorders.items()} == dict.fromkeys(recorders, 1)


def test_empty_tiles_of_an_upper_bound_do_nothing():
    """Masked and pruned grids get as many tiles as they could need at most."""
    grid = TokenGrid.create([(32, 8)], num_global_tokens=1, window_size=8)
    pruned = grid.select(torch.arange(60, 70), [10])
    assert (attention_tiles(pruned).table[:, 0] == attention_tiles(pruned).table[:, 1]).any()
    check_kernel(pruned, fused_states(pruned))


# (kernel, dtype, head_dim, tile size, compute capability): most registers, and most instructions of a step of the loops
# over whole steps, over the rest and over masked keys. With Triton 3.6 and 3.9 the steps have
#     forward 64: 285, 198, 168 and 294, 214, 183; forward 128: 283, 198, 179 and 298, 211, 191
#     backward of queries: 235, 153, 123 and 265, 181, 146; of keys and values: 234, 176, 227 and 219, 165, 186
# and the registers let four programs of the forward share a multiprocessor, of large tiles two, of the backward three.
# What 3.9 takes more are fences between copies and matrix products, and uniform registers that it fills again.
MOST_INSTRUCTIONS = {
    ("forward", "bfloat16", 64, 64, 90): (128, 304, 224, 192),
    ("forward", "bfloat16", 64, 128, 90): (128, 304, 222, 200),
    # A head of 80 is 64 + 16: padded to 128 it took 182 registers and 82 kB of shared memory.
    ("forward", "bfloat16", 80, 64, 90): (176, 360, 277, 225),
    ("backward_query", "bfloat16", 64, 64, 90): (168, 278, 190, 153),
    ("backward_key_value", "bfloat16", 64, 64, 90): (168, 240, 185, 238),
    # With context tokens, whose loop comes last: 337 and 342, of the backward of queries 280 and 300. The others stay.
    # As many programs share a multiprocessor but of the forward, of which shared memory leaves three, and with Triton
    # 3.6 of the backward of queries, whose 170 registers leave two.
    ("forward stratified", "bfloat16", 64, 64, 90): (160, 315, 224, 192, 359),
    ("backward_query stratified", "bfloat16", 64, 64, 90): (168, 278, 190, 153, 315),
    ("backward_key_value stratified", "bfloat16", 64, 64, 90): (168, 240, 197, 258),
}
COMPILED_CASES = [
    *MOST_INSTRUCTIONS,
    ("forward weighted", "bfloat16", 64, 32, 90),
    ("backward_query weighted", "float16", 80, 64, 90),
    ("backward_key_value weighted", "bfloat16", 128, 64, 90),
    ("context_key_value", "bfloat16", 64, 64, 90),
    ("context_key_value", "bfloat16", 128, 64, 80),
    *((f"context_{name}", "bfloat16", 64, 64, 90) for name in ("bias", "gather", "reduce")),
    ("sum_of_images", "bfloat16", 64, 64, 90),
    *((f"mean_{name}", "bfloat16", 64, 64, 90) for name in ("block", "all", "merge", "gradient")),
    ("forward", "bfloat16", 64, 32, 90),
    ("forward", "bfloat16", 64, 16, 90),
    ("backward_query", "float16", 64, 64, 80),
    ("forward", "bfloat16", 80, 64, 80),
    ("backward_key_value", "bfloat16", 80, 64, 90),
    ("forward", "float32", 16, 64, 80),
    ("prune_score", "bfloat16", 64, 0, 90),
    ("prune_score", "bfloat16", 64, 0, 80),
    ("prune_score", "float32", 64, 0, 90),
    ("add_scaled", "bfloat16", 1536, 0, 90),
    ("add_scaled", "bfloat16", 384, 0, 80),
    ("gated_silu", "bfloat16", 4096, 0, 90),
]


@pytest.fixture(scope="module")
def compiled():
    """Reports of kernels compiled for GPUs that are not there, by case; the numbers are what `ptxas -v` says.

    Interpreted kernels may use Python that the compiler does not take.
    """
    program = Path(__file__).with_name("compiled_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(program), json.dumps(COMPILED_CASES)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    return dict(zip(COMPILED_CASES, json.loads(result.stdout), strict=True))


@pytest.mark.parametrize("case", COMPILED_CASES, ids=lambda case: "-".join(map(str, case)))
def test_kernels_compile_for_gpus_that_are_not_there(compiled, case):
    report = compiled[case]
    assert report["spilled_bytes"] == 0
    assert report["shared_bytes"] < 96 * 1024
    uses_matrix_units = report["matrix_products"] > 0 and report["asynchronous_copies"] > 0
    is_attention = case[0].startswith(("forward", "backward", "context_key_value"))
    assert uses_matrix_units or case[1] == "float32" or not is_attention


@pytest.mark.parametrize("case", MOST_INSTRUCTIONS, ids=lambda case: "-".join(map(str, case)))
def test_a_step_takes_few_instructions_and_a_program_few_registers(compiled, case):
    """Regression: a masked step of 64 keys took 917 instructions, and 184 registers left one program of w = 64."""
    registers, *most = MOST_INSTRUCTIONS[case]
    assert compiled[case]["registers"] <= registers
    counts = compiled[case]["instructions"]
    assert all(counts[loop] <= bound for loop, bound in zip(counts, most, strict=True)), counts
