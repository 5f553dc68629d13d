# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: ANN001, ANN201, ANN202 (Triton infers types)
"""Kernels of the mean query, which corrects stratified attention; `attention_triton_context.py` launches them.

A mean query attends once to all tokens of its image and once to what each block sees. Its logit of a key is the same
each time, so the attention to one block's tokens is computed once and then merged, for each block, from the blocks
around: keys and values are read once. Its rows are those of the entries of `ContextTables`, then one for each image,
whose keys are all its tokens.
"""

from .attention_triton_context_tables import ENTRY_COLUMNS
from .attention_triton_functions import load_bias, load_correction, load_row, load_rows

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The attention kernel needs Triton, which is not installed: pip install triton.") from error

_ENTRY_COLUMNS = tl.constexpr(len(ENTRY_COLUMNS))
# Below any logit, and no infinity: two of those have no difference.
_LOWEST = tl.constexpr(-1e38)


@triton.jit
def _mean_logits(mean_query, key, bias, is_key, logit_scale):
    """(keys,) logits of one query, -inf of absent keys."""
    logits = tl.sum(mean_query[None, :] * key.to(tl.float32), axis=1) * logit_scale
    if bias is not None:
        logits += bias
    return tl.where(is_key, logits, float("-inf"))


@triton.jit
def mean_block_kernel(
    mean_query_ptr, key_ptr, value_ptr, entry_ptr, weight_ptr, partial_output_ptr, partial_max_ptr, partial_sum_ptr,
    key_stride, key_head_stride, value_stride, value_head_stride, logit_scale, HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial attention of the mean query to the tokens of one block; grid (entries, heads)."""
    entry, head, num_heads = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    start, end = tl.load(entry_ptr + entry * _ENTRY_COLUMNS), tl.load(entry_ptr + entry * _ENTRY_COLUMNS + 1)
    image = tl.load(entry_ptr + entry * _ENTRY_COLUMNS + 2)
    mean_query = load_row((mean_query_ptr + head * HEAD_DIM, num_heads * HEAD_DIM), image, HEAD_DIM)
    output = tl.zeros([triton.next_power_of_2(HEAD_DIM)], tl.float32)
    row_max, row_sum = tl.full([1], _LOWEST, tl.float32), tl.zeros([1], tl.float32)
    for first in range(start, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        is_key = tokens < end
        key = load_rows((key_ptr + head * key_head_stride, key_stride), tokens, is_key, HEAD_DIM, True)
        value = load_rows((value_ptr + head * value_head_stride, value_stride), tokens, is_key, HEAD_DIM, True)
        bias = load_bias(weight_ptr, tokens, is_key, BOUNDED=True)
        logits = _mean_logits(mean_query, key, bias, is_key, logit_scale)
        new_max = tl.maximum(row_max, tl.max(logits, axis=0))
        probabilities = tl.exp2(logits - new_max)
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(probabilities, axis=0)
        output = output * correction + tl.sum(probabilities[:, None] * value.to(tl.float32), axis=0)
        row_max = new_max
    row = entry * num_heads + head
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    tl.store(partial_output_ptr + row * HEAD_DIM + dims, output, mask=dims < HEAD_DIM)
    tl.store(partial_max_ptr + row + tl.arange(0, 1), row_max)
    tl.store(partial_sum_ptr + row + tl.arange(0, 1), row_sum)


@triton.jit
def _load_partial(partials, entries, is_entry, HEAD_DIM: tl.constexpr):
    """Output, maximum and sum of some entries' partial attention; those that are not there weigh nothing."""
    rows = entries.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    output = load_rows((partials[0], HEAD_DIM), rows, is_entry, HEAD_DIM, True)
    row_max = tl.load(partials[1] + rows, mask=is_entry, other=_LOWEST)
    return output, row_max, tl.load(partials[2] + rows, mask=is_entry, other=0.0)


@triton.jit
def _attend_to_globals(
    mean_query, key_states, value_states, first_global, logit_scale, NUM_GLOBALS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Output, (1, head_dim), maximum and sum, (1,), of the mean query's attention to the global tokens of an image."""
    tokens = tl.arange(0, BLOCK_G)
    is_key = tokens < NUM_GLOBALS
    tokens += first_global
    key = load_rows(key_states, tokens, is_key, HEAD_DIM, True)
    value = load_rows(value_states, tokens, is_key, HEAD_DIM, True).to(tl.float32)
    logits = _mean_logits(mean_query, key, None, is_key, logit_scale)
    row_max = tl.maximum(tl.full([1], _LOWEST, tl.float32), tl.max(logits, axis=0))
    probabilities = tl.exp2(logits - row_max)
    output = tl.sum(probabilities[:, None] * value, axis=0)[None, :]
    return output, row_max, tl.zeros([1], tl.float32) + tl.sum(probabilities, axis=0)


@triton.jit(do_not_specialize=["num_entries"])
def mean_all_kernel(
    mean_query_ptr, key_ptr, value_ptr, entry_offset_ptr, image_ptr, partial_output_ptr, partial_max_ptr,
    partial_sum_ptr, mean_output_ptr, mean_logsumexp_ptr, key_stride, key_head_stride, value_stride, value_head_stride,
    num_entries, logit_scale, NUM_GLOBALS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the mean query gets from all tokens of an image; grid (images, heads)."""
    image, head, num_heads = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    first, end = tl.load(entry_offset_ptr + image), tl.load(entry_offset_ptr + image + 1)
    mean_query = load_row((mean_query_ptr + head * HEAD_DIM, num_heads * HEAD_DIM), image, HEAD_DIM)
    output, row_max, row_sum = _attend_to_globals(
        mean_query, (key_ptr + head * key_head_stride, key_stride),
        (value_ptr + head * value_head_stride, value_stride), tl.load(image_ptr + image), logit_scale, NUM_GLOBALS,
        HEAD_DIM, BLOCK_G,
    )  # fmt: skip
    partials = (partial_output_ptr, partial_max_ptr, partial_sum_ptr)
    for position in range(first, end, BLOCK_N):
        entries = position + tl.arange(0, BLOCK_N)
        of_entries, entry_max, entry_sum = _load_partial(partials, entries, entries < end, HEAD_DIM)
        new_max = tl.maximum(row_max, tl.max(entry_max, axis=0))
        weights = tl.exp2(entry_max - new_max)
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(weights * entry_sum, axis=0)
        output = output * correction[:, None] + tl.sum(weights[:, None] * of_entries, axis=0)[None, :]
        row_max = new_max
    row = num_entries.to(tl.int64) + image
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, :]
    tl.store(mean_output_ptr + (row * num_heads + head) * HEAD_DIM + dims, output / row_sum[:, None], dims < HEAD_DIM)
    logsumexp_ptr = mean_logsumexp_ptr + head * (num_entries + tl.num_programs(0)) + row
    tl.store(logsumexp_ptr + tl.arange(0, 1), row_max + tl.log2(row_sum))


@triton.jit
def _merged(state, part):
    """Two partial attentions to different keys as one."""
    new_max = tl.maximum(state[1], part[1])
    weight, part_weight = tl.exp2(state[1] - new_max), tl.exp2(part[1] - new_max)
    output = state[0] * weight[:, None] + part[0] * part_weight[:, None]
    return output, new_max, state[2] * weight + part[2] * part_weight


@triton.jit(do_not_specialize=["num_entries", "num_images", "chunks", "global_shift"])
def mean_merge_kernel(
    mean_query_ptr, key_ptr, value_ptr, entry_ptr, entry_offset_ptr, image_ptr, partial_output_ptr, partial_max_ptr,
    partial_sum_ptr, context_key_ptr, context_value_ptr, bias_ptr, context_start_ptr, mean_output_ptr,
    mean_logsumexp_ptr, key_stride, key_head_stride, value_stride, value_head_stride, num_entries, num_images, chunks,
    global_shift, context_size, logit_scale, NUM_GLOBALS: tl.constexpr, RADIUS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What the mean query gets from the keys of BLOCK_E blocks each; grid (images * chunks of entries, heads)."""
    image, head, num_heads = tl.program_id(0) // chunks, tl.program_id(1).to(tl.int64), tl.num_programs(1)
    entries = tl.load(entry_offset_ptr + image) + tl.program_id(0) % chunks * BLOCK_E + tl.arange(0, BLOCK_E)
    is_entry = entries < tl.load(entry_offset_ptr + image + 1)
    columns_ptr = entry_ptr + entries.to(tl.int64) * _ENTRY_COLUMNS
    row, column = tl.load(columns_ptr + 3, is_entry, 0), tl.load(columns_ptr + 4, is_entry, 0)
    num_rows, num_columns = tl.load(columns_ptr + 5, is_entry, 0), tl.load(columns_ptr + 6, is_entry, 0)
    is_block = is_entry & (tl.load(columns_ptr, is_entry, 0) < tl.load(columns_ptr + 1, is_entry, 0))
    mean_query = load_row((mean_query_ptr + head * HEAD_DIM, num_heads * HEAD_DIM), image, HEAD_DIM)
    output, row_max, row_sum = _attend_to_globals(
        mean_query, (key_ptr + head * key_head_stride, key_stride),
        (value_ptr + head * value_head_stride, value_stride), tl.load(image_ptr + image) - global_shift, logit_scale,
        NUM_GLOBALS, HEAD_DIM, BLOCK_G,
    )  # fmt: skip
    state = (
        tl.zeros([BLOCK_E, triton.next_power_of_2(HEAD_DIM)], tl.float32) + output,
        tl.zeros([BLOCK_E], tl.float32) + row_max,
        tl.zeros([BLOCK_E], tl.float32) + row_sum,
    )
    partials = (partial_output_ptr, partial_max_ptr, partial_sum_ptr)
    for near in range((2 * RADIUS + 1) * (2 * RADIUS + 1)):
        row_step, column_step = near // (2 * RADIUS + 1) - RADIUS, near % (2 * RADIUS + 1) - RADIUS
        is_near = is_block & (row + row_step >= 0) & (row + row_step < num_rows)
        is_near &= (column + column_step >= 0) & (column + column_step < num_columns)
        near_entries = entries + row_step * (num_columns + 1) + column_step
        state = _merged(state, _load_partial(partials, near_entries, is_near, HEAD_DIM))
    stride = num_heads * HEAD_DIM
    slots = tl.arange(0, BLOCK_N)
    shift = image.to(tl.int64) * context_size * stride + head * HEAD_DIM
    num_context = tl.load(context_start_ptr + image + 1) - tl.load(context_start_ptr + image)
    for position in range(0, num_context.to(tl.int32), BLOCK_N):
        key = load_rows((context_key_ptr + shift, stride), position + slots, None, HEAD_DIM, False)
        value = load_rows((context_value_ptr + shift, stride), position + slots, None, HEAD_DIM, False)
        bias_ptrs = bias_ptr + entries.to(tl.int64)[:, None] * context_size + (position + slots)[None, :]
        bias = tl.load(bias_ptrs, mask=is_block[:, None], other=float("-inf"))
        logits = tl.sum(mean_query[None, :] * key.to(tl.float32), axis=1)[None, :] * logit_scale + bias
        step_max = tl.maximum(tl.max(logits, axis=1), _LOWEST)
        probabilities = tl.exp2(logits - step_max[:, None])
        of_step = tl.dot(probabilities.to(value.dtype), value, input_precision="ieee")
        state = _merged(state, (of_step, step_max, tl.sum(probabilities, axis=1)))
    # A row without a block gives nothing and gets nothing: its probabilities are exp2(-inf) = 0.
    output = tl.where(is_block[:, None], state[0] / state[2][:, None], 0.0)
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, :]
    output_ptrs = mean_output_ptr + (entries.to(tl.int64)[:, None] * num_heads + head) * HEAD_DIM + dims
    tl.store(output_ptrs, output, is_entry[:, None] & (dims < HEAD_DIM))
    logsumexp = tl.where(is_block, state[1] + tl.log2(state[2]), float("inf"))
    tl.store(mean_logsumexp_ptr + head * (num_entries + num_images) + entries, logsumexp, is_entry)


@triton.jit(do_not_specialize=["num_tokens", "num_entries"])
def mean_gradient_kernel(
    grad_output_ptr, mean_output_ptr, delta_ptr, grad_mean_ptr, entry_ptr, grad_output_stride, grad_output_head_stride,
    num_tokens, num_entries, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of what the mean query got from a block's keys: less the sum of its queries'; grid (entries, heads).

    What the queries attended to is their output without the correction: what the softmax subtracts is mended here.
    """
    entry, head, num_heads = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    start, end = tl.load(entry_ptr + entry * _ENTRY_COLUMNS), tl.load(entry_ptr + entry * _ENTRY_COLUMNS + 1)
    image = tl.load(entry_ptr + entry * _ENTRY_COLUMNS + 2)
    mean_states = (mean_output_ptr + head * HEAD_DIM, num_heads * HEAD_DIM)
    correction = load_correction(mean_states, entry, num_entries + image, HEAD_DIM)
    total = tl.zeros([triton.next_power_of_2(HEAD_DIM)], tl.float32)
    delta_ptr += head * num_tokens
    for first in range(start, end, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        is_token = tokens < end
        states = (grad_output_ptr + head * grad_output_head_stride, grad_output_stride)
        grad_output = load_rows(states, tokens, is_token, HEAD_DIM, True).to(tl.float32)
        delta = tl.load(delta_ptr + tokens, mask=is_token, other=0.0)
        tl.store(delta_ptr + tokens, delta - tl.sum(grad_output * correction[None, :], axis=1), mask=is_token)
        total += tl.sum(grad_output, axis=0)
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    tl.store(grad_mean_ptr + (entry * num_heads + head) * HEAD_DIM + dims, -total, mask=dims < HEAD_DIM)
