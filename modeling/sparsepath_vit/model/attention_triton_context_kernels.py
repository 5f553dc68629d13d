# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: ANN001, ANN201, ANN202 (Triton infers types)
"""The kernels of context tokens: gathered, weighed, given gradients; `attention_triton_context.py` launches them.

Each image has the same number of slots for its context tokens, a multiple of what a kernel takes at a time, so that no
step of a loop over them needs a bound: a slot without a token holds some token of its image and counts for nothing.

In the backward all queries of an image outside their neighbourhood see them, so the queries are split, and partial
results are added in a fixed order. Queries come in steps of one block, for which a bias says which of the keys count.
"""

from .attention_triton_context_tables import ENTRY_COLUMNS
from .attention_triton_functions import (
    add_mean_rows,
    add_to_parts,
    dot_parts,
    load_parts,
    load_rows,
    store_grad_mean,
    store_parts,
    store_rows,
    zero_parts,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The attention kernel needs Triton, which is not installed: pip install triton.") from error


_ENTRY_COLUMNS = tl.constexpr(len(ENTRY_COLUMNS))


@triton.jit
def _load_slots(values_ptr, start_ptr, image, slots):
    """What is listed of the context tokens in some slots of an image, and 0 where there is none."""
    start, end = tl.load(start_ptr + image), tl.load(start_ptr + image + 1)
    return tl.load(values_ptr + start + slots, mask=start + slots < end, other=0)


@triton.jit
def context_bias_kernel(
    entry_ptr, start_ptr, context_weight_ptr, block_row_ptr, block_column_ptr, bias_ptr, context_size,
    RADIUS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(entries, slots): what each context token of its image adds to the logits of a block's queries; grid (entries,).

    The base-2 logarithm of what it stands for, -inf inside the neighbourhood and in slots without a token.
    """
    entry = tl.program_id(0).to(tl.int64)
    entry_ptr += entry * _ENTRY_COLUMNS
    image, row, column = tl.load(entry_ptr + 2), tl.load(entry_ptr + 3), tl.load(entry_ptr + 4)
    for position in range(0, context_size, BLOCK_N):
        slots = position + tl.arange(0, BLOCK_N)
        weight = _load_slots(context_weight_ptr, start_ptr, image, slots)
        is_near = tl.abs(_load_slots(block_row_ptr, start_ptr, image, slots) - row) <= RADIUS
        is_near &= tl.abs(_load_slots(block_column_ptr, start_ptr, image, slots) - column) <= RADIUS
        bias = tl.where(is_near | (weight < 1), float("-inf"), tl.log2(tl.maximum(weight, 1).to(tl.float32)))
        tl.store(bias_ptr + entry * context_size + slots, bias)


@triton.jit
def context_gather_kernel(
    key_ptr, value_ptr, start_ptr, token_ptr, context_weight_ptr, image_ptr, context_key_ptr, context_value_ptr,
    key_stride, key_head_stride, value_stride, value_head_stride, context_size, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys and values, (images * slots, heads, head_dim), of BLOCK_N slots; grid (images * slots / BLOCK_N, heads)."""
    head, blocks_of_image = tl.program_id(1).to(tl.int64), context_size // BLOCK_N
    image = tl.program_id(0) // blocks_of_image
    slots = tl.program_id(0) % blocks_of_image * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = _load_slots(token_ptr, start_ptr, image, slots)
    # Of another image's token not even an infinity may be read.
    is_token = _load_slots(context_weight_ptr, start_ptr, image, slots) > 0
    tokens = tl.where(is_token, tokens, tl.load(image_ptr + image))
    key = load_rows((key_ptr + head * key_head_stride, key_stride), tokens, slots >= 0, HEAD_DIM, True)
    value = load_rows((value_ptr + head * value_head_stride, value_stride), tokens, slots >= 0, HEAD_DIM, True)
    stride = tl.num_programs(1) * HEAD_DIM
    places = image.to(tl.int64) * context_size + slots
    store_rows((context_key_ptr + head * HEAD_DIM, stride), places, slots >= 0, key, HEAD_DIM)
    store_rows((context_value_ptr + head * HEAD_DIM, stride), places, slots >= 0, value, HEAD_DIM)


@triton.jit
def _share(first, end, split, num_splits):
    """First and end of one split of a range."""
    size = tl.cdiv(end - first, num_splits)
    return tl.minimum(first + split * size, end), tl.minimum(first + (split + 1) * size, end)


@triton.jit(do_not_specialize=["num_tokens", "num_entries", "num_images", "num_splits"])
def context_key_value_kernel(
    query_ptr, grad_output_ptr, context_key_ptr, context_value_ptr, bias_ptr, logsumexp_ptr, delta_ptr, step_ptr,
    step_bound_ptr, entry_offset_ptr, mean_query_ptr, mean_logsumexp_ptr, mean_delta_ptr, grad_mean_ptr,
    partial_key_ptr, partial_value_ptr, partial_mean_ptr, query_stride, query_head_stride, grad_output_stride,
    grad_output_head_stride, num_tokens, context_size, num_entries, num_images, num_splits, logit_scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_M context tokens from a split of the queries; grid (images * tiles * splits, heads).

    Partial gradients are (splits, images * slots, heads, head_dim), of the mean query one for each program and head.
    """
    head, num_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    split, tile = tl.program_id(0) % num_splits, tl.program_id(0) // num_splits
    tiles_of_image = context_size // BLOCK_M
    image, first_slot = tile // tiles_of_image, tile % tiles_of_image * BLOCK_M
    stride = num_heads * HEAD_DIM
    slots = image.to(tl.int64) * context_size + first_slot + tl.arange(0, BLOCK_M)
    key = load_parts((context_key_ptr + head * HEAD_DIM, stride), slots, None, HEAD_DIM, False)
    value = load_parts((context_value_ptr + head * HEAD_DIM, stride), slots, None, HEAD_DIM, False)
    bias_ptrs = bias_ptr + first_slot + tl.arange(0, BLOCK_M)
    logsumexp_ptr += head * num_tokens
    delta_ptr += head * num_tokens
    grad_key, grad_value = zero_parts(BLOCK_M, HEAD_DIM), zero_parts(BLOCK_M, HEAD_DIM)
    first, end = _share(tl.load(step_bound_ptr + 2 * image), tl.load(step_bound_ptr + 2 * image + 1), split, num_splits)
    for step in range(first, end):
        step_start, step_end = tl.load(step_ptr + 3 * step), tl.load(step_ptr + 3 * step + 1)
        bias = tl.load(bias_ptrs + tl.load(step_ptr + 3 * step + 2).to(tl.int64) * context_size)
        tokens = step_start + tl.arange(0, BLOCK_N)
        is_query = tokens < step_end
        query = load_parts((query_ptr + head * query_head_stride, query_stride), tokens, is_query, HEAD_DIM, True)
        grad_output = load_parts(
            (grad_output_ptr + head * grad_output_head_stride, grad_output_stride), tokens, is_query, HEAD_DIM, True
        )
        logsumexp = tl.load(logsumexp_ptr + tokens, mask=is_query, other=float("inf"))
        delta = tl.load(delta_ptr + tokens, mask=is_query, other=0.0)
        logits = dot_parts(key, query) * logit_scale  # (keys, queries)
        probabilities = tl.exp2(logits + bias[:, None] - logsumexp[None, :])
        grad_value = add_to_parts(grad_value, probabilities.to(value[0].dtype), grad_output)
        grad_logits = probabilities * (dot_parts(value, grad_output) - delta[None, :])
        grad_key = add_to_parts(grad_key, grad_logits.to(key[0].dtype), query)
    mean_query = mean_query_ptr + image * stride + head * HEAD_DIM
    mean_rows = (grad_mean_ptr + head * HEAD_DIM, stride, mean_logsumexp_ptr, mean_delta_ptr, num_entries + num_images)
    gradients = (grad_key, grad_value, zero_parts(BLOCK_R, HEAD_DIM))
    first, end = _share(tl.load(entry_offset_ptr + image), tl.load(entry_offset_ptr + image + 1), split, num_splits)
    for row in range(first, end, BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        row_bias_ptrs = bias_ptrs[:, None] + rows.to(tl.int64)[None, :] * context_size
        row_bias = tl.load(row_bias_ptrs, mask=(rows < end)[None, :], other=float("-inf"))
        gradients = add_mean_rows(
            gradients, key, value, row_bias, mean_query, mean_rows, rows, rows < end, logit_scale, HEAD_DIM
        )
    grad_key, grad_value, grad_mean = gradients
    partial_rows = (split.to(tl.int64) * num_images * context_size + slots) * num_heads + head
    is_slot = slots >= 0
    store_parts((partial_key_ptr, HEAD_DIM), partial_rows, is_slot, grad_key, HEAD_DIM)
    store_parts((partial_value_ptr, HEAD_DIM), partial_rows, is_slot, grad_value, HEAD_DIM)
    store_grad_mean(partial_mean_ptr, tl.program_id(0), grad_mean, HEAD_DIM)


@triton.jit
def _add_to_token(states_ptr, partial_ptr, rows, is_split, place, scale, HEAD_DIM: tl.constexpr):
    """Adds the splits of one context token's gradient, in order, to what it received as itself."""
    total = tl.sum(load_rows((partial_ptr, HEAD_DIM), rows, is_split, HEAD_DIM, True), axis=0) * scale
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    states_ptr += place * HEAD_DIM
    own = tl.load(states_ptr + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)
    tl.store(states_ptr + dims, (own + total).to(states_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit(do_not_specialize=["num_splits"])
def context_reduce_kernel(
    grad_key_ptr, grad_value_ptr, partial_key_ptr, partial_value_ptr, start_ptr, token_ptr, context_weight_ptr,
    context_size, num_splits, scale, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Joins the splits of one context token, which is the only one that its patch token is; grid (slots, heads)."""
    image, slot = tl.program_id(0) // context_size, tl.program_id(0) % context_size
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    if _load_slots(context_weight_ptr, start_ptr, image, slot) > 0:
        splits = tl.arange(0, BLOCK_S)
        is_split = splits < num_splits
        rows = (splits.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * num_heads + head
        place = _load_slots(token_ptr, start_ptr, image, slot).to(tl.int64) * num_heads + head
        _add_to_token(grad_key_ptr, partial_key_ptr, rows, is_split, place, scale, HEAD_DIM)
        _add_to_token(grad_value_ptr, partial_value_ptr, rows, is_split, place, 1.0, HEAD_DIM)


@triton.jit(do_not_specialize=["num_rows"])
def sum_of_images_kernel(
    values_ptr, image_of_row_ptr, sum_ptr, num_rows, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Adds the rows, (rows, heads, head_dim) float32, of each image, in order; grid (images, heads)."""
    image, head, num_heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    states = (values_ptr + head * HEAD_DIM, num_heads * HEAD_DIM)
    total = tl.zeros([triton.next_power_of_2(HEAD_DIM)], tl.float32)
    for first in range(0, num_rows, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        is_of_image = tl.load(image_of_row_ptr + rows, mask=rows < num_rows, other=-1) == image
        total += tl.sum(load_rows(states, rows, is_of_image, HEAD_DIM, True), axis=0)
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    tl.store(sum_ptr + (image * num_heads + head) * HEAD_DIM + dims, total, mask=dims < HEAD_DIM)
