# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: ANN001, ANN201, ANN202 (Triton infers types)
"""The prune score on NVIDIA GPUs, in two launches; `prune_score_operator.py` calls them.

The first launch takes the log-sum-exp of each global query's logits over a split of its image's keys. The second walks
the heads for a tile of keys and adds up what these receive. The keys are read twice, and nothing as long as they are is
written but the scores. There are no atomics, so that the result is bitwise reproducible. Logarithms are base 2.
"""

import math

import torch

from .attention_precision import FP_FUSION

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The prune score kernel needs Triton, which is not installed: pip install triton.") from error

MAX_SPLITS = 64
_TOKENS_PER_SPLIT = 1024
NUM_WARPS = 4


@triton.jit
def _load_rows(states_ptr, tokens, stride, is_token, HEAD_DIM: tl.constexpr):
    """(tokens, head_dim to the next power of two), zero where nothing is; a row offset may exceed 2**31 elements."""
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    pointers = states_ptr + tokens.to(tl.int64)[:, None] * stride + dims[None, :]
    return tl.load(pointers, mask=is_token[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_splits"])
def split_logsumexp_kernel(
    query_ptr, key_ptr, logsumexp_ptr, image_offset_ptr, query_stride, query_head_stride, key_stride, key_head_stride,
    num_splits, logit_scale, NUM_QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(images, heads, splits, queries); -inf where a split has no key. Grid (images * splits, heads)."""
    image, split, head = tl.program_id(0) // num_splits, tl.program_id(0) % num_splits, tl.program_id(1).to(tl.int64)
    start, end = tl.load(image_offset_ptr + image), tl.load(image_offset_ptr + image + 1)
    split_size = tl.cdiv(end - start, num_splits)
    first = start + split * split_size
    last = tl.minimum(first + split_size, end)
    queries = tl.arange(0, BLOCK_G)
    is_query = queries < NUM_QUERIES
    query = _load_rows(query_ptr + head * query_head_stride, start + queries, query_stride, is_query, HEAD_DIM)
    row_max = tl.full([BLOCK_G], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_G], tl.float32)
    for token in range(first, last, BLOCK_N):
        tokens = token + tl.arange(0, BLOCK_N)
        is_key = tokens < last
        key = _load_rows(key_ptr + head * key_head_stride, tokens, key_stride, is_key, HEAD_DIM)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * logit_scale
        logits = tl.where(is_key[None, :], logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(logits - new_max[:, None]), axis=1)
        row_max = new_max
    row = ((image * tl.num_programs(1) + tl.program_id(1)) * num_splits + split) * NUM_QUERIES
    tl.store(logsumexp_ptr + row + queries, row_max + tl.log2(row_sum), mask=is_query)


@triton.jit(do_not_specialize=["num_heads", "num_splits"])
def prune_score_kernel(
    query_ptr, key_ptr, value_ptr, logsumexp_ptr, image_offset_ptr, score_ptr, query_stride, query_head_stride,
    key_stride, key_head_stride, value_stride, value_head_stride, num_heads, num_splits, logit_scale,
    NUM_GLOBALS: tl.constexpr, NUM_QUERIES: tl.constexpr, WEIGHS_VALUES: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scores of BLOCK_N patch tokens of one image; grid (tiles of the longest image, images)."""
    image = tl.program_id(1)
    start, end = tl.load(image_offset_ptr + image), tl.load(image_offset_ptr + image + 1)
    tokens = start + NUM_GLOBALS + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_token = tokens < end
    queries, splits = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)
    is_query = queries < NUM_QUERIES
    is_split = (splits < num_splits)[None, :] & is_query[:, None]
    scores = tl.zeros([BLOCK_N], tl.float32)
    for head in range(num_heads):
        query = _load_rows(query_ptr, start + queries, query_stride, is_query, HEAD_DIM)
        key = _load_rows(key_ptr, tokens, key_stride, is_token, HEAD_DIM)
        rows = ((image * num_heads + head) * num_splits + splits[None, :]) * NUM_QUERIES + queries[:, None]
        of_splits = tl.load(logsumexp_ptr + rows, mask=is_split, other=float("-inf"))
        # Of a query that is not there all are -inf: its probability is set to 0 below.
        largest = tl.max(of_splits, axis=1)
        logsumexp = largest + tl.log2(tl.sum(tl.exp2(of_splits - largest[:, None]), axis=1))
        logits = tl.dot(query, tl.trans(key), input_precision="ieee") * logit_scale
        received = tl.sum(tl.where(is_query[:, None], tl.exp2(logits - logsumexp[:, None]), 0.0), axis=0)
        if WEIGHS_VALUES:
            value = _load_rows(value_ptr, tokens, value_stride, is_token, HEAD_DIM).to(tl.float32)
            received *= tl.sqrt(tl.sum(value * value, axis=1))
        scores += received
        query_ptr += query_head_stride
        key_ptr += key_head_stride
        value_ptr += value_head_stride
    # Each image before this one, and this one, has NUM_GLOBALS tokens that are given no score.
    places = tokens - NUM_GLOBALS * (image + 1)
    tl.store(score_ptr + places, scores / (num_heads * NUM_QUERIES), mask=is_token)


def launch_prune_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    image_offsets: torch.Tensor,
    most_patch_tokens: int,
    num_global_tokens: int,
    scale: float,
    kind: str,
) -> torch.Tensor:
    """Prune scores of packed tokens, read in place.

    Args:
        query, key, value: (M, heads, head_dim), views of a fused projection or not; contiguous in the last dimension.
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
    num_splits = min(MAX_SPLITS, triton.cdiv(num_tokens, num_images * _TOKENS_PER_SPLIT))
    block_g = max(16, triton.next_power_of_2(num_queries))
    block_n = score_block(query.dtype)
    shape = {"NUM_QUERIES": num_queries, "HEAD_DIM": head_dim, "BLOCK_G": block_g, "BLOCK_N": block_n}
    shape |= {"num_warps": NUM_WARPS, "enable_fp_fusion": FP_FUSION}
    logsumexp = query.new_empty((num_images, num_heads, num_splits, num_queries), dtype=torch.float32)
    scores = query.new_empty(num_tokens - num_images * num_global_tokens, dtype=torch.float32)
    strides = [stride for states in (query, key, value) for stride in states.stride()[:2]]
    logit_scale = scale * math.log2(math.e)
    with torch.cuda.device_of(query):
        split_logsumexp_kernel[(num_images * num_splits, num_heads)](
            query, key, logsumexp, image_offsets, *strides[:4], num_splits, logit_scale, **shape
        )
        prune_score_kernel[(triton.cdiv(most_patch_tokens, block_n), num_images)](
            *(query, key, value, logsumexp, image_offsets, scores),
            *strides,
            num_heads,
            num_splits,
            logit_scale,
            NUM_GLOBALS=num_global_tokens,
            WEIGHS_VALUES=kind == "attention_value",
            BLOCK_S=MAX_SPLITS,
            **shape,
        )
    return scores


def score_block(dtype: torch.dtype) -> int:
    """Keys that a program takes at a time."""
    return 32 if dtype == torch.float32 else 64
