# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The prune score kernel against the specification in float64: interpreted on a CPU, compiled on a GPU."""

import math

import pytest
import torch
from small_models import random_mask, random_pixels, small_model

from sparsepath_vit import SparsePathViTModel, TokenGrid, set_block_attention_backend
from sparsepath_vit.model import prune_score_operator, token_pruning

pytest.importorskip("triton")

from sparsepath_vit.model import prune_score_triton as kernel
from sparsepath_vit.model.attention_triton_launch import IS_INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not IS_INTERPRETED:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

# Largest error relative to each score: products of 16-bit states are exact in float32. The interpreter computes
# bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
TOLERANCE = 2e-5
KINDS = ("attention", "cls_attention", "attention_value")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """New tensors hold NaN, so that a number the kernels fail to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def kernel_runs(monkeypatch):
    """`prune_scores` takes the kernel, interpreted or not."""
    monkeypatch.setattr(prune_score_operator, "kernels_run_on", lambda device: True)


class Counted:
    """Stands for a kernel, which it launches, and keeps the grids of programs."""

    def __init__(self, kernel, launches):
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, programs):
        self._launches.append(programs)
        return self._kernel[programs]


def states(grid, heads, head_dim, dtype):
    """Query, key and value, (batch, heads, tokens, head_dim) views of one projection with large random numbers."""
    batch, tokens = grid.batch_shape
    fused = 2.0 * torch.randn(batch, tokens, 3, heads, head_dim, dtype=torch.float64)
    return fused.to(DEVICE, dtype).permute(2, 0, 3, 1, 4).unbind(0)


def packed_images(states, grid):
    """Of each image (heads, tokens, head_dim) float64, from (batch, heads, tokens, head_dim)."""
    packed = states.transpose(0, 1).flatten(1, 2).cpu().double()
    bounds = zip(grid.image_offsets[:-1], grid.image_offsets[1:], strict=True)
    return [packed[:, start:end] for start, end in bounds]


def logsumexp_by_definition(query, key, grid, scale):
    """(heads, all tokens) as the attention kernel leaves them; of patch tokens, which are not read, NaN."""
    found = torch.full((query.shape[1], grid.num_tokens), torch.nan, dtype=torch.float64)
    images = zip(packed_images(query, grid), packed_images(key, grid), grid.image_offsets[:-1], strict=True)
    for queries, keys, start in images:
        logits = queries[:, : grid.num_global_tokens] @ keys.mT * scale
        found[:, start : start + grid.num_global_tokens] = logits.logsumexp(dim=-1) / math.log(2)
    return found.to(DEVICE, torch.float32)


def check_scores(grid, heads, head_dim, dtype, kind):
    query, key, value = states(grid, heads, head_dim, dtype)
    scale = head_dim**-0.5
    settings = {"scale": scale, "kind": kind, "logsumexp": logsumexp_by_definition(query, key, grid, scale)}
    scores = token_pruning.prune_scores(query, key, value, grid, **settings)
    images = zip(*(packed_images(part, grid) for part in (query, key, value)), strict=True)
    expected = [by_definition(*image, grid.num_global_tokens, scale, kind) for image in images]
    torch.testing.assert_close(scores.cpu().double(), torch.cat(expected), rtol=TOLERANCE, atol=0.0)
    assert torch.equal(scores, token_pruning.prune_scores(query, key, value, grid, **settings))


def by_definition(query, key, value, num_global_tokens, scale, kind):
    """(patch tokens,) of one image, all in float64."""
    queries = query[:, : 1 if kind == "cls_attention" else num_global_tokens]
    received = (queries @ key.transpose(1, 2) * scale).softmax(dim=-1)[:, :, num_global_tokens:]
    if kind == "attention_value":
        received = received * value[:, None, num_global_tokens:].norm(dim=-1)
    return received.mean(dim=(0, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_globals, head_dim", [(1, 16), (9, 64), (17, 80)])
def test_equals_the_specification(num_globals, head_dim, batch, kind, dtype):
    grid = TokenGrid.create([(9, 11)] * batch, num_global_tokens=num_globals, window_size=4, device=DEVICE)
    check_scores(grid, 2, head_dim, dtype, kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_images_down_to_one_token(kind, dtype):
    present = random_mask(3, 13, 17, 0.6, seed=3)
    present[1] = False
    present[1, 5, 5] = True
    grid = TokenGrid.create(
        [(13, 17), (13, 9), (7, 17)], num_global_tokens=3, window_size=4, present=present, device=DEVICE
    )
    assert min(grid.counts) == 1 < kernel.score_block(dtype) < max(grid.counts)
    check_scores(grid, 3, 16, dtype, kind)


def test_large_logits_do_not_overflow():
    grid = TokenGrid.create([(8, 8)], num_global_tokens=2, window_size=4, device=DEVICE)
    query, key, value = states(grid, 1, 16, torch.float32)
    query = query * 60.0
    logsumexp = logsumexp_by_definition(query, key, grid, 1.0)
    scores = token_pruning.prune_scores(query, key, value, grid, scale=1.0, logsumexp=logsumexp)
    expected = by_definition(*(part[0].cpu().double() for part in (query, key, value)), 2, 1.0, "attention")
    torch.testing.assert_close(scores.cpu().double(), expected, rtol=2e-2, atol=1e-6)


def test_what_the_kernel_does_not_take_runs_in_torch(monkeypatch):
    monkeypatch.setattr(token_pruning, "kernel_prune_scores", lambda *_: pytest.fail("the kernel was called"))
    for dtype, head_dim, num_globals in [(torch.float64, 16, 1), (torch.float32, 144, 1), (torch.float32, 16, 65)]:
        grid = TokenGrid.create([(2, 3)], num_global_tokens=num_globals, window_size=4, device=DEVICE)
        settings = {"scale": 0.1, "logsumexp": torch.zeros(1, grid.num_tokens, device=DEVICE)}
        assert token_pruning.prune_scores(*states(grid, 1, head_dim, dtype), grid, **settings).isfinite().all()
    # Another attention leaves no log-sum-exps.
    assert token_pruning.prune_scores(*states(grid, 1, 16, torch.float32), grid, scale=0.1).isfinite().all()


def test_a_score_that_the_kernel_does_not_know_runs_in_torch(monkeypatch):
    """Regression: the kernel computed "attention" for every name that it did not know."""
    monkeypatch.setattr(token_pruning, "kernel_prune_scores", lambda *_: pytest.fail("the kernel was called"))
    grid = TokenGrid.create([(2, 3)], num_global_tokens=1, window_size=4, device=DEVICE)
    settings = {"scale": 0.1, "kind": "a new score", "logsumexp": torch.zeros(1, grid.num_tokens, device=DEVICE)}
    token_pruning.prune_scores(*states(grid, 1, 16, torch.float32), grid, **settings)


@torch.no_grad()
def test_a_model_takes_the_log_sum_exps_of_its_attention_and_launches_one_kernel(monkeypatch):
    model = small_model(SparsePathViTModel, prune_ratio=0.5, tokens_per_strip=0).to(DEVICE)
    pixels, launches, launch = random_pixels(2, 7, 5).to(DEVICE), [], kernel.prune_score_kernel
    expected = model(pixels).prune_scores
    monkeypatch.setattr(kernel, "prune_score_kernel", Counted(launch, launches))
    set_block_attention_backend("triton")
    try:
        scores = model(pixels).prune_scores
    finally:
        set_block_attention_backend("auto")
    assert len(launches) == 1
    torch.testing.assert_close(scores, expected, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_queries, head_dim", [(1, 16), (9, 80), (17, 64)])
def test_logits_of_a_strip(num_queries, head_dim, dtype):
    """They go where they are wanted, and nowhere else."""
    fused = 2.0 * torch.randn(150, 3, 2, head_dim, dtype=torch.float64)
    fused = fused.to(DEVICE, dtype).permute(1, 2, 0, 3)  # (3, heads, tokens, head_dim)
    query, key = fused[0, :, :num_queries], fused[1]
    logits = torch.full((2, num_queries, 160), torch.nan, device=DEVICE)
    prune_score_operator.write_prune_logits(query, key, logits, 7, 0.3)
    expected = query.cpu().double() @ key.cpu().double().mT * 0.3
    torch.testing.assert_close(logits[:, :, 7:157].cpu().double(), expected, rtol=1e-5, atol=2e-5)
    assert logits[:, :, :7].isnan().all() and logits[:, :, 157:].isnan().all()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_strips_launch_one_kernel_each(kind, monkeypatch):
    settings = {"prune_ratio": 0.5, "prune_score": kind, "tokens_per_strip": 28}
    model, pixels, launches = small_model(SparsePathViTModel, **settings), random_pixels(1, 12, 7), []
    model, pixels, launch = model.to(DEVICE), pixels.to(DEVICE), kernel.prune_logits_kernel
    monkeypatch.setattr(kernel, "prune_logits_kernel", Counted(launch, launches))
    scores = model(pixels).prune_scores
    assert len(launches) == 3 + 3 + 1  # for what probabilities are divided by, global tokens apart; and for the scores
    monkeypatch.setattr(prune_score_operator, "kernels_run_on", lambda device: False)
    torch.testing.assert_close(scores, model(pixels).prune_scores, rtol=2e-5, atol=1e-8)
    assert len(launches) == 7


def test_the_operator_passes_the_checks_of_torch_library():
    grid = TokenGrid.create([(5, 3)], num_global_tokens=2, window_size=4, device=DEVICE)
    packed = [part.transpose(1, 2).reshape(-1, 2, 16) for part in states(grid, 2, 16, torch.float32)]
    offsets = torch.tensor(grid.image_offsets, device=DEVICE)
    logsumexp = torch.ones(2, grid.num_tokens, device=DEVICE)
    arguments = (*packed, logsumexp, offsets, 15, 2, 0.25, "attention_value")
    torch.library.opcheck(prune_score_operator._prune_scores, arguments)
    query, key = packed[0].transpose(0, 1)[:, :2], packed[1].transpose(0, 1)
    logits = torch.zeros(2, 2, key.shape[1] + 3, device=DEVICE)
    torch.library.opcheck(prune_score_operator.write_prune_logits, (query, key, logits, 3, 0.25))
