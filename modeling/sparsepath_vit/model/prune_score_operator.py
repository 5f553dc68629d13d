# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The prune score kernel as an operator: where it runs, and what torch.compile sees of it.

This file does without Triton. The kernel is imported when it is first launched, since that takes a second.
"""

import torch

from .fused_elementwise import kernels_run_on
from .operator_names import operator_name
from .token_grid import TokenGrid, per_image

_KINDS = ("attention", "cls_attention", "attention_value")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Up to here the compiler spills no registers for sm_80 and sm_90, but for float32 with more than 16 global queries and
# head_dim above 64.
_MOST_HEAD_DIM, _MOST_QUERIES = 128, 64


def has_prune_score_kernel(query: torch.Tensor, grid: TokenGrid, kind: str) -> bool:
    """Whether `kernel_prune_scores` takes queries, (batch, heads, tokens, head_dim), of a grid, and knows the score."""
    return kind in _KINDS and _takes(query, grid.num_global_tokens)


def has_prune_logits_kernel(query: torch.Tensor) -> bool:
    """Whether `write_prune_logits` takes global queries, (heads, queries, head_dim)."""
    return _takes(query, query.shape[1])


def _takes(query: torch.Tensor, num_queries: int) -> bool:
    is_taken = query.dtype in _DTYPES and query.shape[-1] <= _MOST_HEAD_DIM and num_queries <= _MOST_QUERIES
    return is_taken and kernels_run_on(query.device)


def kernel_prune_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    logsumexp: torch.Tensor,
    grid: TokenGrid,
    scale: float,
    kind: str,
) -> torch.Tensor:
    """What `token_pruning.prune_scores` specifies, for all images in one launch where torch takes seven a head.

    The arguments are those of `prune_scores`. Bitwise reproducible on the same machine.
    """
    heads, head_dim = query.shape[1], query.shape[3]
    # (batch, heads, tokens, head_dim) -> (batch * tokens, heads, head_dim): a view of a fused projection
    packed = [states.transpose(1, 2).reshape(-1, heads, head_dim) for states in (query, key, value)]
    image_offsets = per_image(grid.image_offsets, query.device)
    return _prune_scores(*packed, logsumexp, image_offsets, max(grid.counts), grid.num_global_tokens, scale, kind)


@torch.library.custom_op(operator_name("prune_scores"), mutates_args=())
def _prune_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    logsumexp: torch.Tensor,
    image_offsets: torch.Tensor,
    most_patch_tokens: int,
    num_global_tokens: int,
    scale: float,
    kind: str,
) -> torch.Tensor:
    from .prune_score_triton import launch_prune_scores

    return launch_prune_scores(
        query, key, value, logsumexp, image_offsets, most_patch_tokens, num_global_tokens, scale, kind
    )


@_prune_scores.register_fake
def _prune_scores_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    logsumexp: torch.Tensor,
    image_offsets: torch.Tensor,
    most_patch_tokens: int,
    num_global_tokens: int,
    scale: float,
    kind: str,
) -> torch.Tensor:
    num_scored = query.shape[0] - (image_offsets.shape[0] - 1) * num_global_tokens
    return query.new_empty(num_scored, dtype=torch.float32)


@torch.library.custom_op(operator_name("write_prune_logits"), mutates_args=("logits",))
def write_prune_logits(query: torch.Tensor, key: torch.Tensor, logits: torch.Tensor, first: int, scale: float) -> None:
    """The logits of global queries and some keys, in one launch where torch takes four a head.

    Args:
        query: (heads, queries, head_dim).
        key: (heads, keys, head_dim), a view of a fused projection or not.
        logits: (heads, queries, columns) float32, contiguous; those from column `first` on are written.
        first: see there.
        scale: factor on the logits.
    """
    from .prune_score_triton import launch_prune_logits

    launch_prune_logits(query, key, logits, first, scale)


@write_prune_logits.register_fake
def _write_prune_logits_fake(
    query: torch.Tensor, key: torch.Tensor, logits: torch.Tensor, first: int, scale: float
) -> None:
    return None
