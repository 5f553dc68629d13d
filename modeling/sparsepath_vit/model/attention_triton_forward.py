# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: ANN001, ANN201, ANN202 (Triton infers types)
"""The forward kernels of block-local attention; `attention_triton_launch.py` launches them.

A program takes at most BLOCK_M patch tokens of one tile of `AttentionTiles` and streams the keys through an online
softmax (FlashAttention-2, arXiv 2307.08691): the global tokens first, so that the running maximum is finite, then the
runs of the neighbourhood as if they were one. Where the tile lies in one block every key is seen and nothing is masked.
Global queries see their whole image: they are split over the keys and reduced (flash-decoding). There are no atomics:
one program writes each number, and partial results are added in a fixed order.

Log-sum-exps are base 2: probabilities come from exp2, and log2(e) is part of the logit scale.
"""

from .attention_triton_functions import is_near, load_rows, load_runs, load_split, load_tile, store_rows, tokens_at

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The attention kernel needs Triton, which is not installed: pip install triton.") from error


@triton.jit
def _attend(
    state, query, columns, key_states, value_states, column_ptr, logit_scale, runs, first, end, num_keys,
    NUM_RUNS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDED: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys at positions first..end; BOUNDED tests for the last key, NEAR the block columns."""
    output, row_max, row_sum = state
    for position in range(first, end, BLOCK_N):
        positions = position + tl.arange(0, BLOCK_N)
        is_key = positions < num_keys
        tokens = tokens_at(positions, runs, NUM_RUNS)
        key = load_rows(key_states, tokens, is_key, HEAD_DIM, BOUNDED)
        value = load_rows(value_states, tokens, is_key, HEAD_DIM, BOUNDED)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee")
        if NEAR:
            is_seen = is_near(columns, column_ptr, tokens, is_key, NUM_RUNS)
            logits = tl.where(is_seen, logits, float("-inf"))
        elif BOUNDED:
            logits = tl.where(is_key[None, :], logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, axis=1) * logit_scale)
        probabilities = tl.exp2(logits * logit_scale - new_max[:, None])
        correction = tl.exp2(row_max - new_max)
        row_sum = row_sum * correction + tl.sum(probabilities, axis=1)
        output = output * correction[:, None]
        output = tl.dot(probabilities.to(value.dtype), value, output, input_precision="ieee")
        row_max = new_max
    return output, row_max, row_sum


@triton.jit
def _attend_nothing(BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Output, running maximum and running sum of the online softmax before the first key."""
    output = tl.zeros([BLOCK_M, triton.next_power_of_2(HEAD_DIM)], tl.float32)
    return output, tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)


@triton.jit(do_not_specialize=["num_tokens", "num_splits", "num_split_programs"])
def forward_kernel(
    query_ptr, key_ptr, value_ptr, output_ptr, logsumexp_ptr, table_ptr, column_ptr, image_ptr, partial_output_ptr,
    partial_max_ptr, partial_sum_ptr, query_stride, query_head_stride, key_stride, key_head_stride, value_stride,
    value_head_stride, num_tokens, num_splits, num_split_programs, logit_scale, NUM_GLOBALS: tl.constexpr,
    NUM_RUNS: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """First the global queries, whose programs wait for memory while others compute, then the tiles; grid y: heads."""
    program, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query_states = (query_ptr + head * query_head_stride, query_stride)
    key_states = (key_ptr + head * key_head_stride, key_stride)
    value_states = (value_ptr + head * value_head_stride, value_stride)
    if program < num_split_programs:
        image_start, queries, run, num_keys, row = load_split(image_ptr, program, num_splits, NUM_GLOBALS, BLOCK_G)
        is_query = queries < NUM_GLOBALS
        query = load_rows(query_states, image_start + queries, is_query, HEAD_DIM, True)
        output, row_max, row_sum = _attend(
            _attend_nothing(BLOCK_G, HEAD_DIM), query, query, key_states, value_states, column_ptr, logit_scale, run,
            0, num_keys, num_keys, 1, HEAD_DIM, BLOCK_N, BOUNDED=True, NEAR=False,
        )  # fmt: skip
        store_rows((partial_output_ptr, HEAD_DIM), row + queries, is_query, output, HEAD_DIM)
        tl.store(partial_max_ptr + row + queries, row_max, mask=is_query)
        tl.store(partial_sum_ptr + row + queries, row_sum, mask=is_query)
    else:
        start, end, tile_ptr = load_tile(table_ptr, program - num_split_programs, NUM_RUNS, PARTS, BLOCK_M)
        if start < end:
            global_run = ((), (tl.load(tile_ptr + 2),))
            runs, num_keys = load_runs(tile_ptr, NUM_RUNS)
            column_ptr -= tl.load(tile_ptr + 3)
            queries = start + tl.arange(0, BLOCK_M)
            is_query = queries < end
            query = load_rows(query_states, queries, is_query, HEAD_DIM, True)
            columns = tl.load(column_ptr + queries, mask=is_query, other=0)
            state = _attend(
                _attend_nothing(BLOCK_M, HEAD_DIM), query, columns, key_states, value_states, column_ptr, logit_scale,
                global_run, 0, NUM_GLOBALS, NUM_GLOBALS, 1, HEAD_DIM, BLOCK_G, BOUNDED=True, NEAR=False,
            )  # fmt: skip
            # Of a tile in one block only the last positions need a mask; of other tiles all do.
            whole = tl.load(tile_ptr + 4) * (num_keys // BLOCK_N * BLOCK_N)
            state = _attend(
                state, query, columns, key_states, value_states, column_ptr, logit_scale, runs, 0, whole, num_keys,
                NUM_RUNS, HEAD_DIM, BLOCK_N, BOUNDED=False, NEAR=False,
            )  # fmt: skip
            output, row_max, row_sum = _attend(
                state, query, columns, key_states, value_states, column_ptr, logit_scale, runs, whole, num_keys,
                num_keys, NUM_RUNS, HEAD_DIM, BLOCK_N, BOUNDED=True, NEAR=True,
            )  # fmt: skip
            output_states = (output_ptr + head * HEAD_DIM, tl.num_programs(1) * HEAD_DIM)
            store_rows(output_states, queries, is_query, output / row_sum[:, None], HEAD_DIM)
            logsumexp_ptr += head * num_tokens
            tl.store(logsumexp_ptr + queries, row_max + tl.log2(row_sum), mask=is_query)


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def forward_reduce_kernel(
    output_ptr, logsumexp_ptr, image_ptr, partial_output_ptr, partial_max_ptr, partial_sum_ptr, num_tokens, num_splits,
    NUM_GLOBALS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr,
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
    token = tl.load(image_ptr + image).to(tl.int64) + index
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    output_ptr += (token * num_heads + head) * HEAD_DIM
    tl.store(output_ptr + dims, output.to(output_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
    tl.store(logsumexp_ptr + head * num_tokens + token, maximum + tl.log2(total))
