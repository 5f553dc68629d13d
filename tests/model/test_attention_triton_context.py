# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The Triton kernels with context tokens and with weighted keys, against the specification in float64."""

import itertools

import pytest
import torch
from small_models import random_mask
from triton_kernels import (  # noqa: F401, fixtures
    DEVICE,
    DTYPES,
    assert_close,
    check_kernel,
    fused_states,
    kernel,
    many_splits_and_all_widths,
    on_device,
    poisoned_memory,
    present_tokens,
    recorded_kernels,
    split,
    the_kernel_runs,
)

from sparsepath_vit import TokenGrid, block_attention, draw_context_tokens
from sparsepath_vit.model import attention_triton_context
from sparsepath_vit.model.attention_backend import prepared_grid
from sparsepath_vit.model.attention_operator import _block_attention
from sparsepath_vit.model.attention_triton import KERNEL_HEAD_DIMS, TRITON
from sparsepath_vit.model.attention_triton_tables import attention_tiles
from sparsepath_vit.model.context_tokens import exact_tokens


@pytest.fixture(autouse=True)
def several_context_splits(monkeypatch):
    """Small images have several splits of the queries of context tokens, too."""
    monkeypatch.setattr(attention_triton_context, "_QUERIES_PER_CONTEXT_SPLIT", 60)


def context_of(grid):
    """Context tokens of which some are exact; None where there are none to see."""
    if not grid.has_context:
        return None
    scores = torch.rand(sum(grid.counts), generator=torch.Generator().manual_seed(0))
    return draw_context_tokens(grid, exact_tokens(scores, grid))


def weighted(grid, largest=9):
    """The same tokens, of which each stands for up to `largest`."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randint(1, largest + 1, (sum(grid.counts),), generator=generator)
    return grid.select(torch.arange(sum(grid.counts)), grid.counts, weights)


def check(grid, **states):
    check_kernel(grid, fused_states(grid, **states), context=context_of(grid))


# Cells below, equal to and above the block; blocks of more than one step and of more than one tile; few samples and
# nearly all tokens.
@pytest.mark.parametrize(
    ("size", "window", "radius", "number", "kept", "is_weighted"),
    [
        ((12, 14), 4, 1, 20, "all", False),
        ((17, 9), 4, 0, 9, "all", True),
        ((8, 13), 2, 2, 12, "all", False),
        ((9, 10), 3, 1, 80, "all", True),
        ((33, 17), 8, 1, 30, "random", True),
        ((33, 17), 8, 0, 100, "empty blocks", False),
        ((33, 20), 16, 0, 7, "clusters", True),
        ((12, 12), 4, 1, 1, "random", False),
    ],
)
def test_output_and_gradients_are_those_of_the_specification(size, window, radius, number, kept, is_weighted):
    grid = TokenGrid.create(
        [size], num_global_tokens=3, window_size=window, neighbor_radius=radius, num_context_tokens=number,
        present=present_tokens(kept, 1, size),
    )  # fmt: skip
    assert grid.has_context
    check(weighted(grid) if is_weighted else grid)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", KERNEL_HEAD_DIMS)
def test_head_dimensions(head_dim, dtype):
    grid = TokenGrid.create([(7, 9)], num_global_tokens=2, window_size=3, num_context_tokens=12, neighbor_radius=0)
    check(weighted(grid), head_dim=head_dim, dtype=dtype, factor=1.5)


@pytest.mark.parametrize("num_globals", [1, 16, 17, 70])
def test_numbers_of_global_tokens(num_globals):
    check(TokenGrid.create([(5, 8)], num_global_tokens=num_globals, window_size=2, num_context_tokens=10))


def test_keys_with_weights_and_no_context():
    grid = TokenGrid.create([(13, 8)] * 2, num_global_tokens=3, window_size=4, present=random_mask(2, 13, 8, 0.6, 3))
    check(weighted(grid))


BATCHES = {
    "alike": ([(9, 10)] * 2, None),
    "three sizes, one dense": ([(7, 9), (3, 3), (12, 4)], None),
    "masked": ([(10, 9)] * 2, random_mask(2, 10, 9, 0.4, 5)),
}


def batch_grid(name, **settings):
    sizes, present = BATCHES[name]
    settings = {"num_global_tokens": 2, "window_size": 3, "num_context_tokens": 20} | settings
    return TokenGrid.create(sizes, present=present, **settings)


@pytest.mark.parametrize("name", BATCHES)
def test_batches(name):
    check(weighted(batch_grid(name)), heads=2 if name == "alike" else 1)


@pytest.mark.parametrize("name", BATCHES)
def test_each_image_of_a_batch_gives_what_it_gives_alone(name):
    grid = batch_grid(name)
    sizes, present = BATCHES[name]
    fused = torch.randn(grid.num_tokens, 3, 1, 16, device=DEVICE)
    batch = block_attention(
        *split(fused.view(*grid.batch_shape, 3, 1, 16)), grid.to(DEVICE), context=on_device(context_of_images(grid))
    )
    batch = batch.transpose(1, 2).reshape(-1, 1, 16)
    for image, size in enumerate(sizes):
        mask = None if present is None else present[image : image + 1]
        alone = TokenGrid.create([size], num_global_tokens=2, window_size=3, num_context_tokens=20, present=mask)
        tokens = slice(*grid.image_offsets[image : image + 2])
        states = split(fused[tokens][None])
        output = block_attention(*states, alone.to(DEVICE), context=on_device(context_of_images(alone)))
        assert_close(batch[tokens], output.transpose(1, 2)[0], torch.float32)


def context_of_images(grid):
    """Context tokens that do not depend on what else is in the batch."""
    scores = (grid.rows * 37 + grid.columns * 17) % 101
    return draw_context_tokens(grid, exact_tokens(scores.float(), grid)) if grid.has_context else None


def test_images_do_not_see_each_other_even_where_one_holds_infinities():
    """Empty slots of an image's context tokens read some token, which may not be another image's."""
    grid = TokenGrid.create([(7, 9)] * 2, num_global_tokens=2, window_size=3, num_context_tokens=12, neighbor_radius=0)
    fused, context = fused_states(grid).detach(), on_device(context_of(grid))
    alone = block_attention(*split(fused), grid.to(DEVICE), context=context)
    for bad, good in ((0, 1), (1, 0)):
        broken = fused.clone()
        broken[bad] = float("inf")
        assert torch.equal(block_attention(*split(broken), grid.to(DEVICE), context=context)[good], alone[good])


def test_with_a_context_token_for_each_patch_token_it_is_dense_attention():
    grid = TokenGrid.create([(7, 10)], num_global_tokens=2, window_size=3, num_context_tokens=70)
    query, key, value = split(fused_states(grid).detach())
    output = block_attention(query, key, value, grid.to(DEVICE), context=on_device(draw_context_tokens(grid)))
    expected = torch.nn.functional.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert_close(output, expected.cpu(), torch.float32, factor=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits_stay_finite(dtype):
    """Logits of +-1e4: the mean query's probability of all that a block sees may be 0 in float32."""
    grid = TokenGrid.create([(7, 9)], num_global_tokens=2, window_size=3, num_context_tokens=12, neighbor_radius=0)
    fused = fused_states(grid, dtype=torch.float64).detach()
    query, key, _ = split(fused)
    fused[:, :, :2] *= (1e4 / (query @ key.transpose(-1, -2)).abs().max()) ** 0.5
    fused = fused.to(dtype).requires_grad_()
    output = block_attention(*split(fused), grid.to(DEVICE), scale=1.0, context=on_device(context_of(grid)))
    output.sum().backward()
    assert output.isfinite().all() and fused.grad.isfinite().all()


def test_two_runs_are_bitwise_equal():
    present = random_mask(1, 12, 9, 0.7, 0)
    grid = TokenGrid.create([(12, 9)], num_global_tokens=5, window_size=4, present=present, num_context_tokens=20)
    grid, fused = weighted(grid), fused_states(grid, heads=2)
    runs = []
    for _ in range(2):
        output = block_attention(*split(fused), grid.to(DEVICE), context=on_device(context_of(grid)))
        runs.append((output, *torch.autograd.grad(output.square().sum(), fused)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_without_context_tokens_it_is_bitwise_what_it_was():
    """Weights of 1 add a logarithm of 0."""
    grid = TokenGrid.create([(16, 16)], num_global_tokens=3, window_size=4)
    states = split(fused_states(grid).detach())
    assert torch.equal(
        block_attention(*states, grid.to(DEVICE)), block_attention(*states, weighted(grid, largest=1).to(DEVICE))
    )


def test_kernels_are_compiled_once_for_all_sizes_and_numbers_of_heads(monkeypatch):
    monkeypatch.undo()
    recorders = recorded_kernels(monkeypatch, kernel, attention_triton_context)
    for heads, side in itertools.product((3, 4), (17, 20, 31, 33, 37, 43, 50, 55, 64, 70)):
        settings = {"num_global_tokens": 3, "window_size": 8, "num_context_tokens": 40, "device": DEVICE}
        grid = TokenGrid.create([(side, side)], **settings)
        fused = fused_states(grid, 16, heads)
        block_attention(*split(fused), grid, context=draw_context_tokens(grid)).sum().backward()
    assert len(recorders) == 15
    forms = {name: len(recorder.forms) for name, recorder in recorders.items()}
    assert forms == dict.fromkeys(recorders, 1) | {"sum_of_images_kernel": 0}  # one image needs none


def test_the_steps_of_an_image_hold_each_of_its_queries_once():
    """Those that hold none come last: a program of context tokens does not look at them."""
    grid = batch_grid("masked", window_size=7, neighbor_radius=0)
    tables = attention_tiles(grid).context
    for image, (first, end) in enumerate(tables.step_bounds.tolist()):
        queries = [token for start, stop, _ in tables.steps[first:end].tolist() for token in range(start, stop)]
        offset = grid.image_offsets[image] + grid.num_global_tokens
        assert sorted(queries) == list(range(offset, offset + grid.counts[image]))
        assert (tables.steps[first:end, 1] - tables.steps[first:end, 0]).min() > 0


def test_tables_are_made_without_reading_the_device():
    grid = batch_grid("three sizes, one dense").to("meta")
    assert attention_tiles(grid).context.steps.device.type == "meta"


def test_torch_library_finds_no_fault():
    settings = {"num_global_tokens": 1, "window_size": 2, "neighbor_radius": 0, "num_context_tokens": 4}
    grid = TokenGrid.create([(3, 2)], **settings, device=DEVICE)
    context = draw_context_tokens(grid)
    states = [torch.randn(grid.num_tokens, 1, 16, device=DEVICE).requires_grad_() for _ in range(3)]
    mean_query = torch.randn(grid.batch_size, 1, 16, device=DEVICE, requires_grad=True)
    layer_context = (list(context[:-1]), list(context.counts), mean_query)
    prepared = prepared_grid(TRITON, grid)
    torch.use_deterministic_algorithms(False)  # what is written as NaN does not equal itself
    torch.library.opcheck(_block_attention, (*states, *prepared, *layer_context, 0.25, 0.0, None, "triton"))
