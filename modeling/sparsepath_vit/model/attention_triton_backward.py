# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: ANN001, ANN201, ANN202 (Triton infers types)
"""The backward kernels of block-local and stratified attention; `attention_triton_launch.py` launches them.

The neighbourhood is symmetric, so the tiles of the forward serve as queries with the keys streamed past them, and as
keys with the queries streamed past them. Probabilities are recomputed from the base-2 log-sum-exps of the forward.
There are no atomics: one program writes each number, and partial results are added in a fixed order.
"""

from .attention_triton_functions import (
    add_mean_rows,
    add_to_parts,
    context_of_tile,
    dot_parts,
    load_bias,
    load_parts,
    load_rows,
    load_runs,
    load_split,
    load_tile,
    near_rows,
    scale_parts,
    split_runs,
    store_grad_mean,
    store_parts,
    tokens_at,
    zero_parts,
)

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
def _add_grad_query_of(
    grad_query, query, grad_output, logsumexp, delta, key_states, value_states, tokens, is_key, bias, logit_scale,
    HEAD_DIM: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Adds what the keys `tokens` contribute, where BOUNDED only those that are keys, with their bias."""
    key = load_parts(key_states, tokens, is_key, HEAD_DIM, BOUNDED)
    value = load_parts(value_states, tokens, is_key, HEAD_DIM, BOUNDED)
    logits = dot_parts(query, key)
    if bias is None:
        probabilities = tl.exp2(logits * logit_scale - logsumexp[:, None])
        if BOUNDED:
            probabilities = tl.where(is_key[None, :], probabilities, 0.0)
    else:  # of absent keys it is -inf
        probabilities = tl.exp2(logits * logit_scale + bias[None, :] - logsumexp[:, None])
    grad_logits = probabilities * (dot_parts(grad_output, value) - delta[:, None])
    return add_to_parts(grad_query, grad_logits.to(key[0].dtype), key)


@triton.jit
def _grad_query(
    query, grad_output, logsumexp, delta, key_states, value_states, weight_ptr, logit_scale, whole, num_whole, rest,
    num_rest, NUM_RUNS: tl.constexpr, NUM_REST_RUNS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries in parts, of whole steps of keys and the rest."""
    grad_query = zero_parts(query[0].shape[0], HEAD_DIM)
    step_tokens = tl.arange(0, BLOCK_N)
    for position in range(0, num_whole, BLOCK_N):
        tokens = tokens_at(position, whole, NUM_RUNS) + step_tokens
        bias = load_bias(weight_ptr, tokens, None, BOUNDED=False)
        grad_query = _add_grad_query_of(
            grad_query, query, grad_output, logsumexp, delta, key_states, value_states, tokens, None, bias, logit_scale,
            HEAD_DIM, BOUNDED=False,
        )  # fmt: skip
    BLOCK_R: tl.constexpr = BLOCK_N // 2
    for position in range(0, num_rest // BLOCK_R * BLOCK_R, BLOCK_R):
        tokens = tokens_at(position + tl.arange(0, BLOCK_R), rest, NUM_REST_RUNS)
        bias = load_bias(weight_ptr, tokens, None, BOUNDED=False)
        grad_query = _add_grad_query_of(
            grad_query, query, grad_output, logsumexp, delta, key_states, value_states, tokens, None, bias, logit_scale,
            HEAD_DIM, BOUNDED=False,
        )  # fmt: skip
    for position in range(num_rest // BLOCK_R * BLOCK_R, num_rest, 16):
        positions = position + tl.arange(0, 16)
        tokens, is_key = tokens_at(positions, rest, NUM_REST_RUNS), positions < num_rest
        bias = load_bias(weight_ptr, tokens, is_key, BOUNDED=True)
        grad_query = _add_grad_query_of(
            grad_query, query, grad_output, logsumexp, delta, key_states, value_states, tokens, is_key, bias,
            logit_scale, HEAD_DIM, BOUNDED=True,
        )  # fmt: skip
    return grad_query


@triton.jit
def _grad_query_of_context(
    grad_query, query, grad_output, logsumexp, delta, key_states, value_states, bias_ptr, length, logit_scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Goes on over the image's context tokens."""
    step_tokens = tl.arange(0, BLOCK_N)
    for position in range(0, length, BLOCK_N):
        slots = position + step_tokens
        grad_query = _add_grad_query_of(
            grad_query, query, grad_output, logsumexp, delta, key_states, value_states, slots, None,
            tl.load(bias_ptr + slots), logit_scale, HEAD_DIM, BOUNDED=False,
        )  # fmt: skip
    return grad_query


@triton.jit(do_not_specialize=["num_tokens", "first_program", "num_splits", "num_split_programs"])
def backward_query_kernel(
    query_ptr, key_ptr, value_ptr, grad_output_ptr, grad_query_ptr, logsumexp_ptr, delta_ptr, table_ptr, image_ptr,
    partial_ptr, query_stride, query_head_stride, key_stride, key_head_stride, grad_output_stride,
    grad_output_head_stride, num_tokens, first_program, num_splits, num_split_programs, scale, logit_scale, weight_ptr,
    context_key_ptr, context_value_ptr, context_bias_ptr, context_start_ptr, context_size, entry_ptr, tile_entry_ptr,
    NUM_GLOBALS: tl.constexpr, NUM_RUNS: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries; programs, and what may be None, as in the forward."""
    program, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query_states = (query_ptr + head * query_head_stride, query_stride)
    key_states = (key_ptr + head * key_head_stride, key_stride)
    value_states = (value_ptr + head * key_head_stride, key_stride)
    grad_output_states = (grad_output_ptr + head * grad_output_head_stride, grad_output_stride)
    logsumexp_ptr += head * num_tokens
    delta_ptr += head * num_tokens
    if program < num_split_programs:
        image_start, indices, first, length, row = load_split(image_ptr, program, num_splits, NUM_GLOBALS, BLOCK_G)
        is_query = indices < NUM_GLOBALS
        queries = image_start + indices
        query = load_parts(query_states, queries, is_query, HEAD_DIM, True)
        grad_output = load_parts(grad_output_states, queries, is_query, HEAD_DIM, True)
        logsumexp = tl.load(logsumexp_ptr + queries, mask=is_query, other=float("inf"))
        delta = tl.load(delta_ptr + queries, mask=is_query, other=0.0)
        whole, num_whole, rest, num_rest = split_runs(first, length, BLOCK_N)
        grad_query = _grad_query(
            query, grad_output, logsumexp, delta, key_states, value_states, weight_ptr, logit_scale, whole, num_whole,
            rest, num_rest, 1, 1, HEAD_DIM, BLOCK_N,
        )  # fmt: skip
        store_parts((partial_ptr, HEAD_DIM), row + indices, is_query, grad_query, HEAD_DIM)
    else:
        tile_program = first_program + program - num_split_programs
        start, end, tile_ptr = load_tile(table_ptr, tile_program, NUM_RUNS, PARTS, BLOCK_M)
        if start < end:
            queries = start + tl.arange(0, BLOCK_M)
            is_query = queries < end
            query = load_parts(query_states, queries, is_query, HEAD_DIM, True)
            grad_output = load_parts(grad_output_states, queries, is_query, HEAD_DIM, True)
            # An absent query has probability exp2(-inf) = 0.
            logsumexp = tl.load(logsumexp_ptr + queries, mask=is_query, other=float("inf"))
            delta = tl.load(delta_ptr + queries, mask=is_query, other=0.0)
            whole, num_whole, rest, num_rest = load_runs(tile_ptr, NUM_GLOBALS, NUM_RUNS, BLOCK_N)
            grad_query = _grad_query(
                query, grad_output, logsumexp, delta, key_states, value_states, weight_ptr, logit_scale, whole,
                num_whole, rest, num_rest, NUM_RUNS, NUM_RUNS + 1, HEAD_DIM, BLOCK_N,
            )  # fmt: skip
            if context_key_ptr is not None:
                entry = tl.load(tile_entry_ptr + tile_program // PARTS)
                _, length, bias_ptr, shift, stride = context_of_tile(
                    entry_ptr, entry, context_start_ptr, context_bias_ptr, context_size, HEAD_DIM
                )
                grad_query = _grad_query_of_context(
                    grad_query, query, grad_output, logsumexp, delta, (context_key_ptr + shift, stride),
                    (context_value_ptr + shift, stride), bias_ptr, length, logit_scale, HEAD_DIM, BLOCK_N,
                )  # fmt: skip
            grad_query_states = (grad_query_ptr + head * HEAD_DIM, tl.num_programs(1) * HEAD_DIM)
            store_parts(grad_query_states, queries, is_query, scale_parts(grad_query, scale), HEAD_DIM)


@triton.jit
def _add_grad_key_value_of(
    gradients, key, value, bias, query_states, grad_output_states, row_ptrs, tokens, is_query, logit_scale,
    HEAD_DIM: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Adds what the queries `tokens` contribute, where BOUNDED only those that are queries; bias: of the keys."""
    grad_key, grad_value = gradients
    query = load_parts(query_states, tokens, is_query, HEAD_DIM, BOUNDED)
    grad_output = load_parts(grad_output_states, tokens, is_query, HEAD_DIM, BOUNDED)
    if BOUNDED:
        # An absent query has probability exp2(-inf) = 0.
        logsumexp = tl.load(row_ptrs[0] + tokens, mask=is_query, other=float("inf"))
        delta = tl.load(row_ptrs[1] + tokens, mask=is_query, other=0.0)
    else:
        logsumexp, delta = tl.load(row_ptrs[0] + tokens), tl.load(row_ptrs[1] + tokens)
    logits = dot_parts(key, query)  # (keys, queries)
    if bias is None:
        probabilities = tl.exp2(logits * logit_scale - logsumexp[None, :])
    else:
        probabilities = tl.exp2(logits * logit_scale + bias[:, None] - logsumexp[None, :])
    grad_value = add_to_parts(grad_value, probabilities.to(value[0].dtype), grad_output)
    grad_logits = probabilities * (dot_parts(value, grad_output) - delta[None, :])
    return add_to_parts(grad_key, grad_logits.to(key[0].dtype), query), grad_value


@triton.jit
def _grad_key_value(
    key, value, bias, query_states, grad_output_states, row_ptrs, logit_scale, whole, num_whole, rest, num_rest,
    NUM_RUNS: tl.constexpr, NUM_REST_RUNS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys and values in parts, of whole steps of queries and the rest.

    row_ptrs: of log-sum-exp and delta.
    """
    gradients = (zero_parts(key[0].shape[0], HEAD_DIM), zero_parts(key[0].shape[0], HEAD_DIM))
    step_tokens = tl.arange(0, BLOCK_N)
    for position in range(0, num_whole, BLOCK_N):
        tokens = tokens_at(position, whole, NUM_RUNS) + step_tokens
        gradients = _add_grad_key_value_of(
            gradients, key, value, bias, query_states, grad_output_states, row_ptrs, tokens, None, logit_scale,
            HEAD_DIM, BOUNDED=False,
        )  # fmt: skip
    BLOCK_R: tl.constexpr = BLOCK_N // 2
    for position in range(0, num_rest // BLOCK_R * BLOCK_R, BLOCK_R):
        tokens = tokens_at(position + tl.arange(0, BLOCK_R), rest, NUM_REST_RUNS)
        gradients = _add_grad_key_value_of(
            gradients, key, value, bias, query_states, grad_output_states, row_ptrs, tokens, None, logit_scale,
            HEAD_DIM, BOUNDED=False,
        )  # fmt: skip
    for position in range(num_rest // BLOCK_R * BLOCK_R, num_rest, 16):
        positions = position + tl.arange(0, 16)
        tokens, is_query = tokens_at(positions, rest, NUM_REST_RUNS), positions < num_rest
        gradients = _add_grad_key_value_of(
            gradients, key, value, bias, query_states, grad_output_states, row_ptrs, tokens, is_query, logit_scale,
            HEAD_DIM, BOUNDED=True,
        )  # fmt: skip
    return gradients


@triton.jit(
    do_not_specialize=[
        *("num_tokens", "first_program", "num_splits", "num_split_programs", "num_entries", "num_images", "most_parts")
    ]
)
def backward_key_value_kernel(
    query_ptr, key_ptr, value_ptr, grad_output_ptr, grad_key_ptr, grad_value_ptr, logsumexp_ptr, delta_ptr, table_ptr,
    image_ptr, partial_key_ptr, partial_value_ptr, query_stride, query_head_stride, key_stride, key_head_stride,
    grad_output_stride, grad_output_head_stride, num_tokens, first_program, num_splits, num_split_programs, scale,
    logit_scale, weight_ptr, mean_query_ptr, grad_mean_ptr, mean_logsumexp_ptr, mean_delta_ptr, partial_mean_ptr,
    partial_mean_split_ptr, num_entries, num_images, most_parts, entry_ptr, tile_entry_ptr, entry_offset_ptr,
    NUM_GLOBALS: tl.constexpr, NUM_RUNS: tl.constexpr, HEAD_DIM: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values; programs as in the forward, a tile's tokens as keys and its runs as queries.

    With context tokens, the mean query is a further query of the blocks around, and of all tokens of its image.
    """
    program, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query_states = (query_ptr + head * query_head_stride, query_stride)
    key_states = (key_ptr + head * key_head_stride, key_stride)
    value_states = (value_ptr + head * key_head_stride, key_stride)
    grad_output_states = (grad_output_ptr + head * grad_output_head_stride, grad_output_stride)
    row_ptrs = (logsumexp_ptr + head * num_tokens, delta_ptr + head * num_tokens)
    mean_stride = tl.num_programs(1) * HEAD_DIM
    if mean_query_ptr is not None:
        mean_rows = (
            grad_mean_ptr + head * HEAD_DIM, mean_stride, mean_logsumexp_ptr, mean_delta_ptr, num_entries + num_images
        )  # fmt: skip
    if program < num_split_programs:
        image_start, indices, first, length, row = load_split(image_ptr, program, num_splits, NUM_GLOBALS, BLOCK_G)
        is_key = indices < NUM_GLOBALS
        key = load_parts(key_states, image_start + indices, is_key, HEAD_DIM, True)
        value = load_parts(value_states, image_start + indices, is_key, HEAD_DIM, True)
        whole, num_whole, rest, num_rest = split_runs(first, length, BLOCK_N)
        grad_key, grad_value = _grad_key_value(
            key, value, None, query_states, grad_output_states, row_ptrs, logit_scale, whole, num_whole, rest, num_rest,
            1, 1, HEAD_DIM, BLOCK_N,
        )  # fmt: skip
        if mean_query_ptr is not None:
            image = program // num_splits // tl.cdiv(NUM_GLOBALS, BLOCK_G)
            first_row, end_row = tl.load(entry_offset_ptr + image), tl.load(entry_offset_ptr + image + 1)
            share = tl.cdiv(end_row + 1 - first_row, num_splits)
            first_row += program % num_splits * share
            mean_query = mean_query_ptr + image * mean_stride + head * HEAD_DIM
            bias = tl.where(is_key, 0.0, float("-inf"))
            gradients = (grad_key, grad_value, zero_parts(BLOCK_R, HEAD_DIM))
            for row_of_step in range(first_row, tl.minimum(first_row + share, end_row + 1), BLOCK_R):
                rows = row_of_step + tl.arange(0, BLOCK_R)
                is_row = rows < tl.minimum(first_row + share, end_row + 1)
                rows = tl.where(rows < end_row, rows, num_entries + image)  # the last one is that of the image
                gradients = add_mean_rows(
                    gradients, key, value, bias[:, None], mean_query, mean_rows, rows, is_row, logit_scale, HEAD_DIM
                )
            grad_key, grad_value, grad_mean = gradients
            store_grad_mean(partial_mean_split_ptr, program, grad_mean, HEAD_DIM)
        store_parts((partial_key_ptr, HEAD_DIM), row + indices, is_key, grad_key, HEAD_DIM)
        store_parts((partial_value_ptr, HEAD_DIM), row + indices, is_key, grad_value, HEAD_DIM)
    else:
        tile_program = first_program + program - num_split_programs
        start, end, tile_ptr = load_tile(table_ptr, tile_program, NUM_RUNS, PARTS, BLOCK_M)
        if start < end:
            keys = start + tl.arange(0, BLOCK_M)
            is_key = keys < end
            key = load_parts(key_states, keys, is_key, HEAD_DIM, True)
            value = load_parts(value_states, keys, is_key, HEAD_DIM, True)
            bias = load_bias(weight_ptr, keys, is_key, BOUNDED=True)
            whole, num_whole, rest, num_rest = load_runs(tile_ptr, NUM_GLOBALS, NUM_RUNS, BLOCK_N)
            grad_key, grad_value = _grad_key_value(
                key, value, bias, query_states, grad_output_states, row_ptrs, logit_scale, whole, num_whole, rest,
                num_rest, NUM_RUNS, NUM_RUNS + 1, HEAD_DIM, BLOCK_N,
            )  # fmt: skip
            if mean_query_ptr is not None:
                entry = tl.load(tile_entry_ptr + tile_program // PARTS)
                image, rows, is_row = near_rows(entry_ptr, entry, num_entries, NUM_RUNS // 2, BLOCK_R)
                mean_query = mean_query_ptr + image * mean_stride + head * HEAD_DIM
                if weight_ptr is None:
                    bias = tl.where(is_key, 0.0, float("-inf"))
                gradients = (grad_key, grad_value, zero_parts(BLOCK_R, HEAD_DIM))
                grad_key, grad_value, grad_mean = add_mean_rows(
                    gradients, key, value, bias[:, None], mean_query, mean_rows, rows, is_row, logit_scale, HEAD_DIM
                )
                row = tile_program // PARTS * most_parts + tile_program % PARTS
                store_grad_mean(partial_mean_ptr, row, grad_mean, HEAD_DIM)
            stride = tl.num_programs(1) * HEAD_DIM
            grad_key = scale_parts(grad_key, scale)
            store_parts((grad_key_ptr + head * HEAD_DIM, stride), keys, is_key, grad_key, HEAD_DIM)
            store_parts((grad_value_ptr + head * HEAD_DIM, stride), keys, is_key, grad_value, HEAD_DIM)


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
