# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The prune score kernel against the specification in float64: interpreted on a CPU, compiled on a GPU."""

import pytest
import torch
from small_models import random_mask

from sparsepath_vit import TokenGrid
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
    """`prune_scores` takes the kernel, interpreted or not, with splits small enough that these images have several."""
    monkeypatch.setattr(prune_score_operator, "kernels_run_on", lambda device: True)
    monkeypatch.setattr(kernel, "_TOKENS_PER_SPLIT", 30)


def states(grid, heads, head_dim, dtype):
    """Query, key and value, (batch, heads, tokens, head_dim) views of one projection with large random numbers."""
    batch, tokens = grid.batch_shape
    fused = 2.0 * torch.randn(batch, tokens, 3, heads, head_dim, dtype=torch.float64)
    return fused.to(DEVICE, dtype).permute(2, 0, 3, 1, 4).unbind(0)


def check_scores(grid, heads, head_dim, dtype, kind):
    query, key, value = states(grid, heads, head_dim, dtype)
    scale = head_dim**-0.5
    scores = token_pruning.prune_scores(query, key, value, grid, scale=scale, kind=kind)
    bounds = zip(grid.image_offsets[:-1], grid.image_offsets[1:], strict=True)
    # (batch, heads, tokens, head_dim) -> (heads, all tokens, head_dim)
    packed = [part.transpose(0, 1).reshape(heads, -1, head_dim).cpu().double() for part in (query, key, value)]
    expected = [
        by_definition(*(part[:, start:end] for part in packed), grid.num_global_tokens, scale, kind)
        for start, end in bounds
    ]
    torch.testing.assert_close(scores.cpu().double(), torch.cat(expected), rtol=TOLERANCE, atol=0.0)
    again = token_pruning.prune_scores(query, key, value, grid, scale=scale, kind=kind)
    assert torch.equal(scores, again)


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
    scores = token_pruning.prune_scores(query, key, value, grid, scale=1.0)
    expected = by_definition(*(part[0].cpu().double() for part in (query, key, value)), 2, 1.0, "attention")
    torch.testing.assert_close(scores.cpu().double(), expected, rtol=2e-2, atol=1e-6)


def test_what_the_kernel_does_not_take_runs_in_torch(monkeypatch):
    monkeypatch.setattr(token_pruning, "kernel_prune_scores", lambda *_: pytest.fail("the kernel was called"))
    for dtype, head_dim, num_globals in [(torch.float64, 16, 1), (torch.float32, 144, 1), (torch.float32, 16, 65)]:
        grid = TokenGrid.create([(2, 3)], num_global_tokens=num_globals, window_size=4, device=DEVICE)
        assert token_pruning.prune_scores(*states(grid, 1, head_dim, dtype), grid, scale=0.1).isfinite().all()


def test_a_score_that_the_kernel_does_not_know_runs_in_torch(monkeypatch):
    """Regression: the kernel computed "attention" for every name that it did not know."""
    monkeypatch.setattr(token_pruning, "kernel_prune_scores", lambda *_: pytest.fail("the kernel was called"))
    grid = TokenGrid.create([(2, 3)], num_global_tokens=1, window_size=4, device=DEVICE)
    token_pruning.prune_scores(*states(grid, 1, 16, torch.float32), grid, scale=0.1, kind="a new score")


def test_the_operator_passes_the_checks_of_torch_library():
    grid = TokenGrid.create([(5, 3)], num_global_tokens=2, window_size=4, device=DEVICE)
    packed = [part.transpose(1, 2).reshape(-1, 2, 16) for part in states(grid, 2, 16, torch.float32)]
    offsets = torch.tensor(grid.image_offsets, device=DEVICE)
    torch.library.opcheck(prune_score_operator._prune_scores, (*packed, offsets, 15, 2, 0.25, "attention_value"))
