# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: ANN001, ANN201, ANN202 (Triton infers types)
"""The prune score on NVIDIA GPUs, in one launch, and its logits of a strip; `prune_score_operator.py` calls them.

The log-sum-exps of the global queries' logits are those of the attention kernel, base 2. So a program walks the heads
for a tile of keys and adds up what these receive: the keys are read once, and nothing as long as they are is written
but the scores. There are no atomics, so that the result is bitwise reproducible.
"""

import math

import torch

from .attention_precision import FP_FUSION

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The prune score kernel needs Triton, which is not installed: pip install triton.") from error

NUM_WARPS = 4


@triton.jit
def _load_rows(states_ptr, tokens, stride, is_token, HEAD_DIM: tl.constexpr):
    """(tokens, head_dim to the next power of two), zero where nothing is; a row offset may exceed 2**31 elements."""
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    pointers = states_ptr + tokens.to(tl.int64)[:, None] * stride + dims[None, :]
    return tl.load(pointers, mask=is_token[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_heads", "num_tokens"])
def prune_score_kernel(
    query_ptr, key_ptr, value_ptr, logsumexp_ptr, image_offset_ptr, score_ptr, query_stride, query_head_stride,
    key_stride, key_head_stride, value_stride, value_head_stride, num_heads, num_tokens, logit_scale,
    NUM_GLOBALS: tl.constexpr, NUM_QUERIES: tl.constexpr, WEIGHS_VALUES: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_N patch tokens of one image; grid (tiles of the longest image, images)."""
    image = tl.program_id(1)
    start, end = tl.load(image_offset_ptr + image), tl.load(image_offset_ptr + image + 1)
    tokens = start + NUM_GLOBALS + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token = tokens < end
    queries = tl.arange(0, BLOCK_G)
    is_query = queries < NUM_QUERIES
    queries += start
    scores = tl.zeros([BLOCK_N], tl.float32)
    for _ in range(num_heads):
        query = _load_rows(query_ptr, queries, query_stride, is_query, HEAD_DIM)
        key = _load_rows(key_ptr, tokens, key_stride, is_token, HEAD_DIM)
        # A query that is not there has probability exp2(-inf) = 0.
        logsumexp = tl.load(logsumexp_ptr + queries, mask=is_query, other=float("inf"))
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * logit_scale
        received = tl.sum(tl.exp2(logits - logsumexp[:, None]), axis=0)
        if WEIGHS_VALUES:
            value = _load_rows(value_ptr, tokens, value_stride, is_token, HEAD_DIM).to(tl.float32)
            received *= tl.sqrt(tl.sum(value * value, axis=1))
        scores += received
        query_ptr += query_head_stride
        key_ptr += key_head_stride
        value_ptr += value_head_stride
        logsumexp_ptr += num_tokens
    # Each image before this one, and this one, has NUM_GLOBALS tokens that are given no score.
    places = tokens - NUM_GLOBALS * (image + 1)
    tl.store(score_ptr + places, scores / (num_heads * NUM_QUERIES), mask=is_token)


@triton.jit(do_not_specialize=["first", "num_keys", "logit_stride"])
def prune_logits_kernel(
    query_ptr, key_ptr, logit_ptr, query_stride, query_head_stride, key_stride, key_head_stride, logit_stride, first,
    num_keys, scale, NUM_QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Logits of BLOCK_N keys, to the columns from `first` on of (heads, queries, columns); grid (tiles, heads)."""
    head = tl.program_id(1).to(tl.int64)
    queries, keys = tl.arange(0, BLOCK_G), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_query, is_key = queries < NUM_QUERIES, keys < num_keys
    query = _load_rows(query_ptr + head * query_head_stride, queries, query_stride, is_query, HEAD_DIM)
    key = _load_rows(key_ptr + head * key_head_stride, keys, key_stride, is_key, HEAD_DIM)
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    logit_ptr += first
    pointers = logit_ptr + (head * NUM_QUERIES + queries)[:, None] * logit_stride + keys[None, :]
    tl.store(pointers, logits, mask=is_query[:, None] & is_key[None, :])


def launch_prune_logits(query: torch.Tensor, key: torch.Tensor, logits: torch.Tensor, first: int, scale: float) -> None:
    """Writes the logits of some keys, read in place.

    Args:
        query: (heads, queries, head_dim), contiguous in the last dimension, as the key.
        key: (heads, keys, head_dim).
        logits: (heads, queries, columns) float32, contiguous; those from column `first` on are written.
        first: see there.
        scale: factor on the logits.
    """
    num_heads, num_queries, head_dim = query.shape
    block_n = score_block(query.dtype)
    with torch.cuda.device_of(query):
        prune_logits_kernel[(triton.cdiv(key.shape[1], block_n), num_heads)](
            *(query, key, logits, query.stride(1), query.stride(0), key.stride(1), key.stride(0), logits.stride(1)),
            first,
            key.shape[1],
            scale,
            NUM_QUERIES=num_queries,
            HEAD_DIM=head_dim,
            BLOCK_G=max(16, triton.next_power_of_2(num_queries)),
            BLOCK_N=block_n,
            num_warps=NUM_WARPS,
            enable_fp_fusion=FP_FUSION,
        )


def launch_prune_scores(
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
    """Prune scores of packed tokens, read in place.

    Args:
        query, key, value: (M, heads, head_dim), views of a fused projection or not; contiguous in the last dimension.
        logsumexp: (heads, M) float32, base 2, of the logits of each query; those of global tokens are read.
        image_offsets: (batch + 1,) integers, packed index of each image's first global token, and the end of the last.
        most_patch_tokens: of an image.
        num_global_tokens: G of each image.
        scale: factor on the logits.
        kind: see `prune_scores`.

    Returns:
        (M - batch * G,) float32.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_images = len(image_offsets) - 1
    num_queries = 1 if kind == "cls_attention" else num_global_tokens
    block_n = score_block(query.dtype)
    scores = query.new_empty(num_tokens - num_images * num_global_tokens, dtype=torch.float32)
    with torch.cuda.device_of(query):
        prune_score_kernel[(triton.cdiv(most_patch_tokens, block_n), num_images)](
            *(query, key, value, logsumexp, image_offsets, scores),
            *[stride for states in (query, key, value) for stride in states.stride()[:2]],
            num_heads,
            num_tokens,
            scale * math.log2(math.e),
            NUM_GLOBALS=num_global_tokens,
            NUM_QUERIES=num_queries,
            WEIGHS_VALUES=kind == "attention_value",
            HEAD_DIM=head_dim,
            BLOCK_G=max(16, triton.next_power_of_2(num_queries)),
            BLOCK_N=block_n,
            num_warps=NUM_WARPS,
            enable_fp_fusion=FP_FUSION,
        )
    return scores


def score_block(dtype: torch.dtype) -> int:
    """Keys that a program takes at a time."""
    return 32 if dtype == torch.float32 else 64
