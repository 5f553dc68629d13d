# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: ANN001, ANN201, ANN202 (Triton infers types)
"""The backward kernels of block-local attention; `attention_triton_launch.py` launches them.

The neighbourhood is symmetric, so the tiles of the forward serve as queries with the keys streamed past them, and as
keys with the queries streamed past them. Probabilities are recomputed from the base-2 log-sum-exps of the forward.
There are no atomics: one program writes each number, and partial results are added in a fixed order.
"""

from .attention_triton_functions import is_near, load_rows, load_runs, load_split, load_tile, store_rows, tokens_at

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The attention kernel needs Triton, which is not installed: pip install triton.") from error


@triton.jit(do_not_specialize=["num_tokens"])
def delta_kernel(
    output_ptr, grad_output_ptr, delta_ptr, grad_output_stride, grad_output_head_stride, num_tokens,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Output times its gradient, summed over head_dim: what the softmax subtracts; grid (tokens / BLOCK_M, heads)."""
    head = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_token = tokens < num_tokens
    output_states = (output_ptr + head * HEAD_DIM, tl.num_programs(1) * HEAD_DIM)
    grad_output_states = (grad_output_ptr + head * grad_output_head_stride, grad_output_stride)
    output = load_rows(output_states, tokens, is_token, HEAD_DIM, True).to(tl.float32)
    grad_output = load_rows(grad_output_states, tokens, is_token, HEAD_DIM, True).to(tl.float32)
    delta = tl.sum(output * grad_output, axis=1)
    tl.store(delta_ptr + head * num_tokens + tokens, delta, mask=is_token)


@triton.jit
def _add_grad_query(
    grad_query, query, grad_output, logsumexp, delta, columns, key_states, value_states, column_ptr, logit_scale, runs,
    first, end, num_keys, NUM_RUNS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BOUNDED: tl.constexpr,
    NEAR: tl.constexpr,
):  # fmt: skip
    """Adds what the keys at positions first..end contribute to the gradient of the queries."""
    for position in range(first, end, BLOCK_N):
        positions = position + tl.arange(0, BLOCK_N)
        is_key = positions < num_keys
        tokens = tokens_at(positions, runs, NUM_RUNS)
        key = load_rows(key_states, tokens, is_key, HEAD_DIM, BOUNDED)
        value = load_rows(value_states, tokens, is_key, HEAD_DIM, BOUNDED)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee")
        probabilities = tl.exp2(logits * logit_scale - logsumexp[:, None])
        if NEAR:
            probabilities = tl.where(is_near(columns, column_ptr, tokens, is_key, NUM_RUNS), probabilities, 0.0)
        elif BOUNDED:
            probabilities = tl.where(is_key[None, :], probabilities, 0.0)
        grad_probabilities = tl.dot(grad_output, tl.trans(value), input_precision="ieee")
        grad_logits = probabilities * (grad_probabilities - delta[:, None])
        grad_query = tl.dot(grad_logits.to(key.dtype), key, grad_query, input_precision="ieee")
    return grad_query


@triton.jit(do_not_specialize=["num_tokens", "num_splits", "num_split_programs"])
def backward_query_kernel(
    query_ptr, key_ptr, value_ptr, grad_output_ptr, grad_query_ptr, logsumexp_ptr, delta_ptr, table_ptr, column_ptr,
    image_ptr, partial_ptr, query_stride, query_head_stride, key_stride, key_head_stride, value_stride,
    value_head_stride, grad_output_stride, grad_output_head_stride, num_tokens, num_splits, num_split_programs, scale,
    logit_scale, NUM_GLOBALS: tl.constexpr, NUM_RUNS: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries; programs as in the forward."""
    program, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query_states = (query_ptr + head * query_head_stride, query_stride)
    key_states = (key_ptr + head * key_head_stride, key_stride)
    value_states = (value_ptr + head * value_head_stride, value_stride)
    grad_output_states = (grad_output_ptr + head * grad_output_head_stride, grad_output_stride)
    logsumexp_ptr += head * num_tokens
    delta_ptr += head * num_tokens
    if program < num_split_programs:
        image_start, indices, run, num_keys, row = load_split(image_ptr, program, num_splits, NUM_GLOBALS, BLOCK_G)
        is_query = indices < NUM_GLOBALS
        queries = image_start + indices
        query = load_rows(query_states, queries, is_query, HEAD_DIM, True)
        grad_output = load_rows(grad_output_states, queries, is_query, HEAD_DIM, True)
        logsumexp = tl.load(logsumexp_ptr + queries, mask=is_query, other=float("inf"))
        delta = tl.load(delta_ptr + queries, mask=is_query, other=0.0)
        grad_query = _add_grad_query(
            tl.zeros_like(query).to(tl.float32), query, grad_output, logsumexp, delta, query, key_states, value_states,
            column_ptr, logit_scale, run, 0, num_keys, num_keys, 1, HEAD_DIM, BLOCK_N, BOUNDED=True, NEAR=False,
        )  # fmt: skip
        store_rows((partial_ptr, HEAD_DIM), row + indices, is_query, grad_query, HEAD_DIM)
    else:
        start, end, tile_ptr = load_tile(table_ptr, program - num_split_programs, NUM_RUNS, PARTS, BLOCK_M)
        if start < end:
            global_run = ((), (tl.load(tile_ptr + 2),))
            runs, num_keys = load_runs(tile_ptr, NUM_RUNS)
            column_ptr -= tl.load(tile_ptr + 3)
            queries = start + tl.arange(0, BLOCK_M)
            is_query = queries < end
            query = load_rows(query_states, queries, is_query, HEAD_DIM, True)
            grad_output = load_rows(grad_output_states, queries, is_query, HEAD_DIM, True)
            # An absent query has probability exp2(-inf) = 0.
            logsumexp = tl.load(logsumexp_ptr + queries, mask=is_query, other=float("inf"))
            delta = tl.load(delta_ptr + queries, mask=is_query, other=0.0)
            columns = tl.load(column_ptr + queries, mask=is_query, other=0)
            grad_query = _add_grad_query(
                tl.zeros_like(query).to(tl.float32), query, grad_output, logsumexp, delta, columns, key_states,
                value_states, column_ptr, logit_scale, global_run, 0, NUM_GLOBALS, NUM_GLOBALS, 1, HEAD_DIM, BLOCK_G,
                BOUNDED=True, NEAR=False,
            )  # fmt: skip
            whole = tl.load(tile_ptr + 4) * (num_keys // BLOCK_N * BLOCK_N)
            grad_query = _add_grad_query(
                grad_query, query, grad_output, logsumexp, delta, columns, key_states, value_states, column_ptr,
                logit_scale, runs, 0, whole, num_keys, NUM_RUNS, HEAD_DIM, BLOCK_N, BOUNDED=False, NEAR=False,
            )  # fmt: skip
            grad_query = _add_grad_query(
                grad_query, query, grad_output, logsumexp, delta, columns, key_states, value_states, column_ptr,
                logit_scale, runs, whole, num_keys, num_keys, NUM_RUNS, HEAD_DIM, BLOCK_N, BOUNDED=True, NEAR=True,
            )  # fmt: skip
            grad_query_states = (grad_query_ptr + head * HEAD_DIM, tl.num_programs(1) * HEAD_DIM)
            store_rows(grad_query_states, queries, is_query, grad_query * scale, HEAD_DIM)


@triton.jit
def _add_grad_key_value(
    gradients, key, value, columns, query_states, grad_output_states, logsumexp_ptr, delta_ptr, column_ptr, logit_scale,
    runs, first, end, num_queries, NUM_RUNS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Adds what the queries at positions first..end contribute to the gradients of the keys and values."""
    grad_key, grad_value = gradients
    for position in range(first, end, BLOCK_N):
        positions = position + tl.arange(0, BLOCK_N)
        is_query = positions < num_queries
        tokens = tokens_at(positions, runs, NUM_RUNS)
        query = load_rows(query_states, tokens, is_query, HEAD_DIM, BOUNDED)
        grad_output = load_rows(grad_output_states, tokens, is_query, HEAD_DIM, BOUNDED)
        # An absent query has probability exp2(-inf) = 0.
        logsumexp = tl.load(logsumexp_ptr + tokens, mask=is_query, other=float("inf"))
        delta = tl.load(delta_ptr + tokens, mask=is_query, other=0.0)
        logits = tl.dot(key, tl.trans(query), input_precision="ieee")  # (keys, queries)
        probabilities = tl.exp2(logits * logit_scale - logsumexp[None, :])
        if NEAR:
            probabilities = tl.where(is_near(columns, column_ptr, tokens, is_query, NUM_RUNS), probabilities, 0.0)
        grad_value = tl.dot(probabilities.to(query.dtype), grad_output, grad_value, input_precision="ieee")
        grad_probabilities = tl.dot(value, tl.trans(grad_output), input_precision="ieee")
        grad_logits = probabilities * (grad_probabilities - delta[None, :])
        grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision="ieee")
    return grad_key, grad_value


@triton.jit(do_not_specialize=["num_tokens", "num_splits", "num_split_programs"])
def backward_key_value_kernel(
    query_ptr, key_ptr, value_ptr, grad_output_ptr, grad_key_ptr, grad_value_ptr, logsumexp_ptr, delta_ptr, table_ptr,
    column_ptr, image_ptr, partial_key_ptr, partial_value_ptr, query_stride, query_head_stride, key_stride,
    key_head_stride, value_stride, value_head_stride, grad_output_stride, grad_output_head_stride, num_tokens,
    num_splits, num_split_programs, scale, logit_scale, NUM_GLOBALS: tl.constexpr, NUM_RUNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, PARTS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values; programs as in the forward, a tile's tokens as keys and its runs as queries."""
    program, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query_states = (query_ptr + head * query_head_stride, query_stride)
    key_states = (key_ptr + head * key_head_stride, key_stride)
    value_states = (value_ptr + head * value_head_stride, value_stride)
    grad_output_states = (grad_output_ptr + head * grad_output_head_stride, grad_output_stride)
    logsumexp_ptr += head * num_tokens
    delta_ptr += head * num_tokens
    if program < num_split_programs:
        image_start, indices, run, num_queries, row = load_split(image_ptr, program, num_splits, NUM_GLOBALS, BLOCK_G)
        is_key = indices < NUM_GLOBALS
        key = load_rows(key_states, image_start + indices, is_key, HEAD_DIM, True)
        value = load_rows(value_states, image_start + indices, is_key, HEAD_DIM, True)
        nothing = tl.zeros_like(key).to(tl.float32)
        grad_key, grad_value = _add_grad_key_value(
            (nothing, nothing), key, value, key, query_states, grad_output_states, logsumexp_ptr, delta_ptr, column_ptr,
            logit_scale, run, 0, num_queries, num_queries, 1, HEAD_DIM, BLOCK_N, BOUNDED=True, NEAR=False,
        )  # fmt: skip
        store_rows((partial_key_ptr, HEAD_DIM), row + indices, is_key, grad_key, HEAD_DIM)
        store_rows((partial_value_ptr, HEAD_DIM), row + indices, is_key, grad_value, HEAD_DIM)
    else:
        start, end, tile_ptr = load_tile(table_ptr, program - num_split_programs, NUM_RUNS, PARTS, BLOCK_M)
        if start < end:
            global_run = ((), (tl.load(tile_ptr + 2),))
            runs, num_queries = load_runs(tile_ptr, NUM_RUNS)
            column_ptr -= tl.load(tile_ptr + 3)
            keys = start + tl.arange(0, BLOCK_M)
            is_key = keys < end
            key = load_rows(key_states, keys, is_key, HEAD_DIM, True)
            value = load_rows(value_states, keys, is_key, HEAD_DIM, True)
            columns = tl.load(column_ptr + keys, mask=is_key, other=0)
            nothing = tl.zeros_like(key).to(tl.float32)
            gradients = _add_grad_key_value(
                (nothing, nothing), key, value, columns, query_states, grad_output_states, logsumexp_ptr, delta_ptr,
                column_ptr, logit_scale, global_run, 0, NUM_GLOBALS, NUM_GLOBALS, 1, HEAD_DIM, BLOCK_G, BOUNDED=True,
                NEAR=False,
            )  # fmt: skip
            whole = tl.load(tile_ptr + 4) * (num_queries // BLOCK_N * BLOCK_N)
            gradients = _add_grad_key_value(
                gradients, key, value, columns, query_states, grad_output_states, logsumexp_ptr, delta_ptr, column_ptr,
                logit_scale, runs, 0, whole, num_queries, NUM_RUNS, HEAD_DIM, BLOCK_N, BOUNDED=False, NEAR=False,
            )  # fmt: skip
            grad_key, grad_value = _add_grad_key_value(
                gradients, key, value, columns, query_states, grad_output_states, logsumexp_ptr, delta_ptr, column_ptr,
                logit_scale, runs, whole, num_queries, num_queries, NUM_RUNS, HEAD_DIM, BLOCK_N, BOUNDED=True,
                NEAR=True,
            )  # fmt: skip
            stride = tl.num_programs(1) * HEAD_DIM
            store_rows((grad_key_ptr + head * HEAD_DIM, stride), keys, is_key, grad_key * scale, HEAD_DIM)
            store_rows((grad_value_ptr + head * HEAD_DIM, stride), keys, is_key, grad_value, HEAD_DIM)


@triton.jit
def _add_splits(states_ptr, partial_ptr, rows, is_split, token, scale, HEAD_DIM: tl.constexpr):
    """Adds the splits of one token's gradient, in order, and stores it."""
    total = tl.sum(load_rows((partial_ptr, HEAD_DIM), rows, is_split, HEAD_DIM, True), axis=0) * scale
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    states_ptr += (token * tl.num_programs(1) + tl.program_id(1)) * HEAD_DIM
    tl.store(states_ptr + dims, total.to(states_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


@triton.jit(do_not_specialize=["num_splits"])
def backward_reduce_kernel(
    grad_query_ptr, grad_key_ptr, grad_value_ptr, image_ptr, partial_query_ptr, partial_key_ptr, partial_value_ptr,
    num_splits, scale, NUM_GLOBALS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Joins the splits of one global token; grid (images * globals, heads)."""
    image, index = tl.program_id(0) // NUM_GLOBALS, tl.program_id(0) % NUM_GLOBALS
    splits = tl.arange(0, BLOCK_S)
    is_split = splits < num_splits
    rows = ((image * tl.num_programs(1) + tl.program_id(1)) * num_splits + splits) * NUM_GLOBALS + index
    token = tl.load(image_ptr + image).to(tl.int64) + index
    _add_splits(grad_query_ptr, partial_query_ptr, rows, is_split, token, scale, HEAD_DIM)
    _add_splits(grad_key_ptr, partial_key_ptr, rows, is_split, token, scale, HEAD_DIM)
    _add_splits(grad_value_ptr, partial_value_ptr, rows, is_split, token, 1.0, HEAD_DIM)
