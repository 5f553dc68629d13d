# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Attention strip by strip against the specification on the whole image, on every backend."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import random_mask
from token_batches import batches

from sparsepath_vit import TokenGrid, set_block_attention_backend
from sparsepath_vit.model import token_strips
from sparsepath_vit.model.attention_backend import StripContext
from sparsepath_vit.model.attention_backends import BACKENDS
from sparsepath_vit.model.attention_specification import naive_block_attention
from sparsepath_vit.model.attention_strips import MergedAttention, strip_attention
from sparsepath_vit.model.context_tokens import draw_context_tokens, exact_tokens
from sparsepath_vit.model.mean_query_correction import mean_queries
from sparsepath_vit.model.token_strips import strip_ranges, token_strip

HEADS, HEAD_DIM = 2, 16
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def automatic_backend():
    yield
    set_block_attention_backend("auto")


def random_states(grid, dtype=torch.float64, seed=0):
    """Query, key and value, each (M, heads, head_dim), large enough for peaked attention."""
    generator = torch.Generator().manual_seed(seed)
    shape = (grid.num_tokens, HEADS, HEAD_DIM)
    return [(1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(3)]


def contexts_of_strips(query, key, value, grid, context, scale=0.3):
    """The context tokens of each image as its strips take them; what the mean query attends to is written out."""
    means, start, contexts = mean_queries(query, grid), 0, []
    dtype = torch.promote_types(query.dtype, torch.float32)
    for image, count in enumerate(context.counts):
        entries, tokens = slice(start, start + count), slice(*grid.image_offsets[image : image + 2])
        start = entries.stop
        weights = torch.ones(tokens.stop - tokens.start, dtype=dtype)
        if grid.weights is not None:
            weights[grid.num_global_tokens :] = grid.weights.split(grid.counts)[image]
        logits = torch.einsum("hd,nhd->hn", means[image].to(dtype), key[tokens].to(dtype)) * scale + weights.log()
        of_mean = torch.einsum("hn,nhd->hd", logits.softmax(dim=1), value[tokens].to(dtype))
        rows, places = context.tokens[entries], (states[entries] for states in context[1:4])
        contexts.append(StripContext(key[rows], value[rows], *places, means[image], of_mean))
    return contexts


def attended_in_strips(query, key, value, grid, most_tokens, scale=0.3, context=None):
    """(M, heads, head_dim) of packed tokens, put together from the strips of each image."""
    output = torch.full_like(query, torch.nan)
    contexts = [None] * grid.batch_size
    if context is not None:
        contexts = contexts_of_strips(query, key, value, grid, context)
    for image, first in enumerate(grid.image_offsets[:-1]):
        num_globals = grid.num_global_tokens
        global_tokens, attention = torch.arange(first, first + num_globals), MergedAttention()
        for strip_range in strip_ranges(grid, image, most_tokens):
            strip = token_strip(grid, image, strip_range)
            own, around = (torch.arange(*run) + first + num_globals for run in (strip_range.own, strip_range.around))
            queries, keys = torch.cat([global_tokens, own]), torch.cat([global_tokens, around])
            states = (
                states[tokens].transpose(0, 1) for states, tokens in ((query, queries), (key, keys), (value, keys))
            )
            attended, logsumexp = strip_attention(*states, strip, scale=scale, context=contexts[image])
            output[own] = attended[:, num_globals:].transpose(0, 1)
            attention.add(attended[:, :num_globals], logsumexp)
        output[global_tokens] = attention.merged().transpose(0, 1).to(output.dtype)
    return output


def assert_equals_the_specification(grid, most_tokens, dtype=torch.float64, context=None):
    states = random_states(grid, dtype)
    found = attended_in_strips(*states, grid, most_tokens, context=context)
    expected = naive_block_attention(*(state.double() for state in states), grid, 0.3, context=context)
    assert (found.double() - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()
    assert torch.equal(found, attended_in_strips(*states, grid, most_tokens, context=context))


def ragged(grid, share, seed=0):
    """What pruning leaves: a random share of the patch tokens of each image, and at least one."""
    generator, kept, counts, first = torch.Generator().manual_seed(seed), [], [], 0
    for count in grid.counts:
        number = max(1, int(count * share))
        kept.append(first + torch.randperm(count, generator=generator)[:number].sort().values)
        counts.append(number)
        first += count
    return grid.select(torch.cat(kept), counts)


def needs(backend, reason):
    return pytest.mark.skipif(BACKENDS[backend].missing(torch.device("cpu")) is not None, reason=reason)


needs_the_kernel = needs("triton", "the kernels are not interpreted here")
CPU_KERNEL = pytest.param("cpu_kernel", marks=needs("cpu_kernel", "the kernel for CPUs cannot be compiled here"))


def dtype_of(backend):
    """The most exact that a backend itself computes with."""
    return torch.float32 if backend in ("triton", "cpu_kernel") else torch.float64


@pytest.mark.parametrize("backend", ["sdpa_tiles", CPU_KERNEL, "reference"])
@given(batch=batches(), most_tokens=st.sampled_from([1, 5, 12, 10_000]), share=st.sampled_from([None, 0.2, 0.6]))
def test_strips_equal_the_specification(backend, batch, most_tokens, share):
    set_block_attention_backend(backend)
    grid = batch.grid()
    assert_equals_the_specification(grid if share is None else ragged(grid, share), most_tokens, dtype_of(backend))


@pytest.mark.parametrize("backend", ["sdpa_tiles", CPU_KERNEL, "reference"])
@given(batch=batches(max_side=9), most_tokens=st.sampled_from([1, 5, 12]))
def test_strips_cut_anywhere_equal_the_specification(backend, batch, most_tokens):
    """Where the host does not know the ends of block rows: a strip may begin and end within a block."""
    set_block_attention_backend(backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_strips, "block_row_ends", lambda *arguments: None)
        assert_equals_the_specification(ragged(batch.grid(), 0.6), most_tokens, dtype_of(backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["sdpa_tiles", CPU_KERNEL])
def test_narrow_dtypes(dtype, backend):
    set_block_attention_backend(backend)
    grid = TokenGrid.create([(11, 9), (30, 14)], num_global_tokens=3, window_size=4)
    assert_equals_the_specification(ragged(grid, 0.5), 30, dtype)


@pytest.mark.parametrize("backend", ["sdpa_tiles", CPU_KERNEL, "reference"])
@given(
    batch=batches(max_side=9),
    most_tokens=st.sampled_from([1, 12, 10_000]),
    share=st.sampled_from([None, 0.6]),
    num_context_tokens=st.sampled_from([1, 6, 30, 100]),
    is_weighted=st.booleans(),
    cut=st.sampled_from(["block rows", "anywhere"]),
)
def test_context_tokens_are_keys_outside_the_neighbourhood(
    backend, batch, most_tokens, share, num_context_tokens, is_weighted, cut
):
    set_block_attention_backend(backend)
    grid = batch._replace(num_context_tokens=num_context_tokens).grid()
    grid, generator = grid if share is None else ragged(grid, share), torch.Generator().manual_seed(4)
    if is_weighted:
        weights = torch.randint(1, 9, (len(grid.rows),), generator=generator)
        grid = dataclasses.replace(grid, weights=weights)
    context = None
    if grid.has_context:
        context = draw_context_tokens(grid, exact_tokens(torch.rand(len(grid.rows), generator=generator), grid))
    with pytest.MonkeyPatch.context() as patch:
        if cut == "anywhere":
            patch.setattr(token_strips, "block_row_ends", lambda *arguments: None)
        assert_equals_the_specification(grid, most_tokens, dtype_of(backend), context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["sdpa_tiles", CPU_KERNEL])
def test_context_tokens_in_narrow_dtypes(dtype, backend):
    set_block_attention_backend(backend)
    grid = TokenGrid.create([(11, 9), (30, 14)], num_global_tokens=3, window_size=4, num_context_tokens=30)
    assert_equals_the_specification(grid, 30, dtype, draw_context_tokens(grid))


@pytest.mark.parametrize(
    "backend", ["sdpa_tiles", CPU_KERNEL, "reference", pytest.param("triton", marks=needs_the_kernel)]
)
def test_representatives_count_for_what_they_stand_for(backend):
    set_block_attention_backend(backend)
    grid = ragged(TokenGrid.create([(17, 9)], num_global_tokens=2, window_size=3), 0.5)
    weights = torch.randint(1, 9, (len(grid.rows),), generator=torch.Generator().manual_seed(1))
    assert_equals_the_specification(dataclasses.replace(grid, weights=weights), 20, dtype_of(backend))


CASES = [  # each grid cut anywhere, and by turns whole or pruned between block rows: the interpreter is slow
    (*settings, kept, cut)
    for index, settings in enumerate(
        [
            *(((20, 9), 8, 1, 5), ((20, 9), 8, 0, 1), ((11, 5), 2, 2, 9)),
            *(((25, 7), 16, 1, 3), ((16, 5), 5, 1, 2), ((9, 9), None, 1, 4)),
        ]
    )
    for kept, cut in [("pruned", "anywhere"), (("all", "pruned")[index % 2], "block rows")]
]


@pytest.mark.parametrize("size, window, radius, num_globals, kept, cut", CASES)
@needs_the_kernel
def test_the_kernel_equals_the_specification(size, window, radius, num_globals, kept, cut, monkeypatch):
    set_block_attention_backend("triton")
    grid = TokenGrid.create([size], num_global_tokens=num_globals, window_size=window, neighbor_radius=radius)
    if cut == "anywhere":
        monkeypatch.setattr(token_strips, "block_row_ends", lambda *arguments: None)
    assert_equals_the_specification(grid if kept == "all" else ragged(grid, 0.4), 40, torch.float32)


# Rows of the mean query and slots of context tokens that are not written must not be read: memory is full of NaN.
@pytest.mark.parametrize(
    ("size", "window", "radius", "num_context_tokens", "share", "is_weighted", "cut"),
    [
        ((14, 9), 4, 1, 20, None, False, "block rows"),
        ((13, 7), 3, 0, 9, 0.6, True, "block rows"),
        ((10, 5), 2, 2, 8, 0.5, False, "anywhere"),
        ((25, 6), 8, 1, 100, 0.7, True, "anywhere"),
        ((11, 9), 4, 0, 1, None, True, "block rows"),
    ],
)
@needs_the_kernel
def test_the_kernel_shows_context_tokens_to_strips(
    size, window, radius, num_context_tokens, share, is_weighted, cut, monkeypatch
):
    set_block_attention_backend("triton")
    settings = {"window_size": window, "neighbor_radius": radius, "num_context_tokens": num_context_tokens}
    grid = TokenGrid.create([size], num_global_tokens=3, **settings)
    grid, generator = grid if share is None else ragged(grid, share), torch.Generator().manual_seed(4)
    if is_weighted:
        grid = dataclasses.replace(grid, weights=torch.randint(1, 9, (len(grid.rows),), generator=generator))
    assert grid.has_context
    context = draw_context_tokens(grid, exact_tokens(torch.rand(len(grid.rows), generator=generator), grid))
    if cut == "anywhere":
        monkeypatch.setattr(token_strips, "block_row_ends", lambda *arguments: None)
    torch.use_deterministic_algorithms(True)
    try:
        assert_equals_the_specification(grid, 30, torch.float32, context)
    finally:
        torch.use_deterministic_algorithms(False)


def test_errors_say_what_a_strip_takes():
    grid = TokenGrid.create([(12, 8)], num_global_tokens=2, window_size=4)
    strip = token_strip(grid, 0, strip_ranges(grid, 0, 32)[1])
    query, key = torch.zeros(2, 2 + 32, 16), torch.zeros(2, 2 + 96, 16)
    with pytest.raises(ValueError, match=r"key has shape .*of this strip it takes \(2, 98, 16\)"):
        strip_attention(query, query, query, strip)
    with pytest.raises(ValueError, match=r"query has shape .*takes \(heads, G \+ S, head_dim\)"):
        strip_attention(query[None], key, key, strip)
    with pytest.raises(ValueError, match=r"value is torch.float64"):
        strip_attention(query, key, key.double(), strip)
    assert strip_attention(query, key, key, strip)[1].shape == (2, 2)


class TestRanges:
    def own(self, grid, most_tokens, image=0):
        return [strip.own for strip in strip_ranges(grid, image, most_tokens)]

    def test_strips_are_whole_block_rows_with_the_rows_around(self):
        grid = TokenGrid.create([(14, 5)], num_global_tokens=1, window_size=4)
        assert strip_ranges(grid, 0, 19) == strip_ranges(grid, 0, 20) == strip_ranges(grid, 0, 1)
        assert self.own(grid, 20) == [(0, 20), (20, 40), (40, 60), (60, 70)]
        assert self.own(grid, 40) == [(0, 40), (40, 70)]
        assert [strip.around for strip in strip_ranges(grid, 0, 20)] == [(0, 40), (0, 60), (20, 70), (40, 70)]
        assert [strip.token_rows for strip in strip_ranges(grid, 0, 20)] == [4, 4, 4, 2]
        assert strip_ranges(grid, 0, 70) == [((0, 70), (0, 70), 14)]

    @given(batch=batches(max_side=12), most_tokens=st.integers(1, 60))
    def test_every_token_is_in_one_strip_between_all_it_sees(self, batch, most_tokens):
        grid = ragged(batch.grid(), 0.5)
        window = max(grid.canvas_size) if grid.window_size is None else grid.window_size
        for image, rows in enumerate(grid.rows.split(grid.counts)):
            strips, block_rows, end = strip_ranges(grid, image, most_tokens), rows // window, 0
            for strip in strips:
                assert strip.own[0] == end < strip.own[1]
                end = strip.own[1]
                own = block_rows[slice(*strip.own)]
                is_single_row = own[0] == own[-1]
                assert len(own) <= most_tokens or is_single_row
                near = (block_rows >= own[0] - grid.neighbor_radius) & (block_rows <= own[-1] + grid.neighbor_radius)
                assert near.nonzero()[[0, -1], 0].tolist() >= [strip.around[0], 0]
                assert strip.around[0] <= near.nonzero()[0] and strip.around[1] > near.nonzero()[-1]
            assert end == grid.counts[image]

    def test_empty_block_rows_belong_to_a_strip_beside_them(self):
        present = random_mask(1, 20, 6, 0.9)
        present[:, 4:12] = False
        present[:, 16:] = False
        grid = TokenGrid.create([(20, 6)], num_global_tokens=1, window_size=4, present=present)
        first, last = int(present[0, :4].sum()), int(present[0, 12:].sum())
        assert self.own(grid, 1) == [(0, first), (first, first + last)]

    def test_what_only_the_device_knows_is_not_asked(self, monkeypatch):
        grid = TokenGrid.create([(40, 10)], num_global_tokens=1, window_size=4)
        monkeypatch.setattr(TokenGrid, "device", torch.device("cuda"))
        assert self.own(grid, 80) == [(0, 80), (80, 160), (160, 240), (240, 320), (320, 400)]
        pruned = grid.select(torch.arange(0, 400, 2), [200])
        assert strip_ranges(pruned, 0, 80) == [
            ((0, 80), (0, 160), 40),
            ((80, 160), (0, 200), 40),
            ((160, 200), (80, 200), 40),
        ]
