# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: ANN001, ANN201, ANN202 (Triton infers types)
"""The forward kernels of block-local and stratified attention; `attention_triton_launch.py` launches them.

A program takes at most BLOCK_M patch tokens of one tile of `AttentionTiles` and streams its keys through an online
softmax (FlashAttention-2, arXiv 2307.08691). A tile lies in one block, so every query sees every key: only the last few
keys are masked, where their number is no multiple of the step. Global queries see their whole image: they are split
over the keys and reduced (flash-decoding). There are no atomics: one program writes each number, and partial results
are added in a fixed order.

Context tokens are the last keys of a tile, with a bias: what is added to a logit, the base-2 logarithm of what the key
stands for, or -inf inside the neighbourhood. Keys that count for more than themselves have one, too.

Log-sum-exps are base 2: probabilities come from exp2, and log2(e) is part of the logit scale.
"""

from .attention_triton_functions import (
    add_to_parts,
    context_of_tile,
    divide_and_correct,
    dot_parts,
    load_bias,
    load_parts,
    load_rows,
    load_runs,
    load_split,
    load_tile,
    scale_parts,
    split_runs,
    store_parts,
    tokens_at,
    zero_parts,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The attention kernel needs Triton, which is not installed: pip install triton.") from error


@triton.jit
def _attend_to(
    state, query, key_states, value_states, tokens, is_key, bias, logit_scale, HEAD_DIM: tl.constexpr,
    BOUNDED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the keys `tokens`, where BOUNDED only those that are keys, with their bias."""
    output, row_max, row_sum = state
    key = load_parts(key_states, tokens, is_key, HEAD_DIM, BOUNDED)
    value = load_parts(value_states, tokens, is_key, HEAD_DIM, BOUNDED)
    logits = dot_parts(query, key)
    if bias is None:
        if BOUNDED:
            logits = tl.where(is_key[None, :], logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1) * logit_scale)
        probabilities = tl.exp2(logits * logit_scale - new_max[:, None])
    else:  # of absent keys it is -inf
        logits = logits * logit_scale + bias[None, :]
        new_max = tl.maximum(row_max, tl.max(logits, axis=1))
        probabilities = tl.exp2(logits - new_max[:, None])
    correction = tl.exp2(row_max - new_max)
    row_sum = row_sum * correction + tl.sum(probabilities, axis=1)
    output = scale_parts(output, correction[:, None])
    return add_to_parts(output, probabilities.to(value[0].dtype), value), new_max, row_sum


@triton.jit
def _attend(
    query, key_states, value_states, weight_ptr, logit_scale, whole, num_whole, rest, num_rest, NUM_RUNS: tl.constexpr,
    NUM_REST_RUNS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over whole steps and the rest: output in parts, running maximum and running sum."""
    BLOCK_M: tl.constexpr = query[0].shape[0]
    state = (
        zero_parts(BLOCK_M, HEAD_DIM),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
    )
    step_tokens = tl.arange(0, BLOCK_N)
    for position in range(0, num_whole, BLOCK_N):
        tokens = tokens_at(position, whole, NUM_RUNS) + step_tokens
        bias = load_bias(weight_ptr, tokens, None, BOUNDED=False)
        state = _attend_to(
            state, query, key_states, value_states, tokens, None, bias, logit_scale, HEAD_DIM, BOUNDED=False
        )
    BLOCK_R: tl.constexpr = BLOCK_N // 2
    for position in range(0, num_rest // BLOCK_R * BLOCK_R, BLOCK_R):
        tokens = tokens_at(position + tl.arange(0, BLOCK_R), rest, NUM_REST_RUNS)
        bias = load_bias(weight_ptr, tokens, None, BOUNDED=False)
        state = _attend_to(
            state, query, key_states, value_states, tokens, None, bias, logit_scale, HEAD_DIM, BOUNDED=False
        )
    for position in range(num_rest // BLOCK_R * BLOCK_R, num_rest, 16):
        positions = position + tl.arange(0, 16)
        tokens, is_key = tokens_at(positions, rest, NUM_REST_RUNS), positions < num_rest
        bias = load_bias(weight_ptr, tokens, is_key, BOUNDED=True)
        state = _attend_to(
            state, query, key_states, value_states, tokens, is_key, bias, logit_scale, HEAD_DIM, BOUNDED=True
        )
    return state


@triton.jit
def _attend_to_context(
    state, query, key_states, value_states, bias_ptr, length, logit_scale, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Goes on over the image's context tokens, in whole steps: those that do not count have a bias of -inf."""
    step_tokens = tl.arange(0, BLOCK_N)
    for position in range(0, length, BLOCK_N):
        slots = position + step_tokens
        state = _attend_to(
            state, query, key_states, value_states, slots, None, tl.load(bias_ptr + slots), logit_scale, HEAD_DIM,
            BOUNDED=False,
        )  # fmt: skip
    return state


@triton.jit(
    do_not_specialize=[
        *("num_tokens", "first_program", "num_splits", "num_split_programs", "global_shift", "num_entries")
    ]
)
def forward_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, logsumexp_ptr, table_ptr, image_ptr, partial_output_ptr, partial_max_ptr,
    partial_sum_ptr, query_stride, query_head_stride, key_stride, key_head_stride, num_tokens, first_program,
    num_splits, num_split_programs, logit_scale, global_shift, weight_ptr, context_key_ptr, context_value_ptr,
    context_bias_ptr, context_start_ptr, context_size, mean_output_ptr, num_entries, entry_ptr, tile_entry_ptr,
    NUM_GLOBALS: tl.constexpr, NUM_RUNS: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """First the global queries, whose programs wait for memory while others compute, then the tiles; grid y: heads.

    Keys are addressed by packed index, queries by their place, which is another one in a strip. Values have the keys'
    strides: one offset serves both. `weight_ptr` is None where all keys count once, what follows it where there are no
    context tokens.
    """
    program, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query_states = (query_ptr + head * query_head_stride, query_stride)
    key_states = (key_ptr + head * key_head_stride, key_stride)
    value_states = (value_ptr + head * key_head_stride, key_stride)
    if program < num_split_programs:
        image_start, queries, first, length, row = load_split(image_ptr, program, num_splits, NUM_GLOBALS, BLOCK_G)
        is_query = queries < NUM_GLOBALS
        query = load_parts(query_states, image_start - global_shift + queries, is_query, HEAD_DIM, True)
        whole, num_whole, rest, num_rest = split_runs(first, length, BLOCK_N)
        output, row_max, row_sum = _attend(
            query, key_states, value_states, weight_ptr, logit_scale, whole, num_whole, rest, num_rest, 1, 1, HEAD_DIM,
            BLOCK_N,
        )  # fmt: skip
        store_parts((partial_output_ptr, HEAD_DIM), row + queries, is_query, output, HEAD_DIM)
        tl.store(partial_max_ptr + row + queries, row_max, mask=is_query)
        tl.store(partial_sum_ptr + row + queries, row_sum, mask=is_query)
    else:
        tile_program = first_program + program - num_split_programs
        start, end, tile_ptr = load_tile(table_ptr, tile_program, NUM_RUNS, PARTS, BLOCK_M)
        if start < end:
            queries = start + tl.arange(0, BLOCK_M)
            is_query = queries < end
            query = load_parts(query_states, queries, is_query, HEAD_DIM, True)
            whole, num_whole, rest, num_rest = load_runs(tile_ptr, NUM_GLOBALS, NUM_RUNS, BLOCK_N)
            state = _attend(
                query, key_states, value_states, weight_ptr, logit_scale, whole, num_whole, rest, num_rest, NUM_RUNS,
                NUM_RUNS + 1, HEAD_DIM, BLOCK_N,
            )  # fmt: skip
            if context_key_ptr is not None:
                entry = tl.load(tile_entry_ptr + tile_program // PARTS)
                image, length, bias_ptr, shift, stride = context_of_tile(
                    entry_ptr, entry, context_start_ptr, context_bias_ptr, context_size, HEAD_DIM
                )
                context_states = ((context_key_ptr + shift, stride), (context_value_ptr + shift, stride))
                state = _attend_to_context(
                    state, query, context_states[0], context_states[1], bias_ptr, length, logit_scale, HEAD_DIM, BLOCK_N
                )
            output, row_max, row_sum = state
            if context_key_ptr is not None:
                mean_states = (mean_output_ptr + head * HEAD_DIM, stride)
                output = divide_and_correct(
                    output, row_sum, mean_states, entry, num_entries + image, HEAD_DIM, CORRECTS=True
                )
            else:
                output = divide_and_correct(output, row_sum, None, None, None, HEAD_DIM, CORRECTS=False)
            output_states = (output_ptr + head * HEAD_DIM, tl.num_programs(1) * HEAD_DIM)
            store_parts(output_states, queries, is_query, output, HEAD_DIM)
            logsumexp_ptr += head * num_tokens
            tl.store(logsumexp_ptr + queries, row_max + tl.log2(row_sum), mask=is_query)


@triton.jit(do_not_specialize=["num_tokens", "num_splits", "global_shift"])
def forward_reduce_kernel(
    output_ptr, logsumexp_ptr, image_ptr, partial_output_ptr, partial_max_ptr, partial_sum_ptr, num_tokens, num_splits,
    global_shift, NUM_GLOBALS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Joins the splits of one global query; grid (images * globals, heads)."""
    image, index = tl.program_id(0) // NUM_GLOBALS, tl.program_id(0) % NUM_GLOBALS
    head, num_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    splits = tl.arange(0, BLOCK_S)
    is_split = splits < num_splits
    rows = ((image * num_heads + head) * num_splits + splits) * NUM_GLOBALS + index
    row_max = tl.load(partial_max_ptr + rows, mask=is_split, other=float("-inf"))
    row_sum = tl.load(partial_sum_ptr + rows, mask=is_split, other=0.0)
    maximum = tl.max(row_max, axis=0)
    weights = tl.exp2(row_max - maximum)
    total = tl.sum(weights * row_sum, axis=0)
    partial_output = load_rows((partial_output_ptr, HEAD_DIM), rows, is_split, HEAD_DIM, True)
    output = tl.sum(partial_output * weights[:, None], axis=0) / total
    token = tl.load(image_ptr + image).to(tl.int64) - global_shift + index
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    output_ptr += (token * num_heads + head) * HEAD_DIM
    tl.store(output_ptr + dims, output.to(output_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
    tl.store(logsumexp_ptr + head * num_tokens + token, maximum + tl.log2(total))
