# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: ANN001, ANN201, ANN202, RUF005 (Triton infers types, and compiles no unpacking)
"""The Triton kernels of block-local attention, forward and backward; `attention_triton.py` launches them.

A program takes at most BLOCK_M patch tokens of one tile of `AttentionTiles` and streams the keys through an online
softmax (FlashAttention-2, arXiv 2307.08691): the global tokens first, so that the running maximum is finite, then the
runs of the neighbourhood as if they were one. Where the tile lies in one block every key is seen and nothing is masked.
Global queries see their whole image: they are split over the keys and reduced (flash-decoding). The neighbourhood is
symmetric, so in the backward the same tiles serve as keys with the queries streamed past them. There are no atomics:
one program writes each number, and partial results are added in a fixed order.

States are (pointer, token stride) of one head, runs are (ends, shifts) as `_load_runs` makes them, and log-sum-exps are
base 2: probabilities come from exp2, and log2(e) is part of the logit scale.
"""

from .attention_triton_tables import NUM_TILE_COLUMNS

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The attention kernel needs Triton, which is not installed: pip install triton.") from error

_FIRST_RUN_COLUMN = tl.constexpr(NUM_TILE_COLUMNS)
_FAR_COLUMN = tl.constexpr(-(2**30))


@triton.jit
def _load_rows(states, tokens, is_token, HEAD_DIM: tl.constexpr, BOUNDED: tl.constexpr):
    """(tokens, head_dim to the next power of two); zero beyond HEAD_DIM and, where BOUNDED, for absent tokens."""
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    # Row offsets are int64: a million tokens of a fused projection exceed 2**31 elements.
    pointers = states[0] + tokens.to(tl.int64)[:, None] * states[1] + dims[None, :]
    if BOUNDED:
        return tl.load(pointers, mask=is_token[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if triton.next_power_of_2(HEAD_DIM) > HEAD_DIM:
        return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _store_rows(states, tokens, is_token, rows, HEAD_DIM: tl.constexpr):
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    pointers = states[0] + tokens.to(tl.int64)[:, None] * states[1] + dims[None, :]
    mask = is_token[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, rows.to(states[0].dtype.element_ty), mask=mask)


@triton.jit
def _load_tile(table_ptr, program, NUM_RUNS: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """First token and end of a program's part of its tile, and where the tile's columns are."""
    tile_ptr = table_ptr + (program // PARTS).to(tl.int64) * (_FIRST_RUN_COLUMN + 2 * NUM_RUNS)
    start = tl.load(tile_ptr) + program % PARTS * BLOCK_M
    return start, tl.minimum(tl.load(tile_ptr + 1), start + BLOCK_M), tile_ptr


@triton.jit
def _load_runs(tile_ptr, NUM_RUNS: tl.constexpr):
    """Where runs end among the positions, how the shift to packed tokens changes there; the number of positions."""
    run_ptr = tile_ptr + _FIRST_RUN_COLUMN
    ends = ()
    shifts = (tl.load(run_ptr + 1),)
    for run in tl.static_range(1, NUM_RUNS):
        ends = ends + (tl.load(run_ptr + 2 * run - 2),)
        shifts = shifts + (tl.load(run_ptr + 2 * run + 1) - tl.load(run_ptr + 2 * run - 1),)
    return (ends, shifts), tl.load(run_ptr + 2 * NUM_RUNS - 2)


@triton.jit
def _load_split(image_ptr, program, num_splits, NUM_GLOBALS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Of one split of an image's tokens: the image's start, which global tokens, the run, its length, the first row.

    The row is that of the image's first global token among the partial results (images, heads, splits, globals).
    """
    split, rest = program % num_splits, program // num_splits
    image, first_global = rest // tl.cdiv(NUM_GLOBALS, BLOCK_G), rest % tl.cdiv(NUM_GLOBALS, BLOCK_G) * BLOCK_G
    start, end = tl.load(image_ptr + image), tl.load(image_ptr + image + 1)
    split_size = tl.cdiv(end - start, num_splits)
    length = tl.minimum(end - start - split * split_size, split_size)
    row = ((image * tl.num_programs(1) + tl.program_id(1)) * num_splits + split) * NUM_GLOBALS
    return start, first_global + tl.arange(0, BLOCK_G), ((), (start + split * split_size,)), length, row


@triton.jit
def _tokens_at(positions, runs, NUM_RUNS: tl.constexpr):
    """Packed token at each position of the runs."""
    tokens = positions + runs[1][0]
    for run in tl.static_range(1, NUM_RUNS):
        tokens += tl.where(positions >= runs[0][run - 1], runs[1][run], 0)
    return tokens


@triton.jit
def _is_near(columns, column_ptr, tokens, is_token, NUM_RUNS: tl.constexpr):
    """(columns, tokens) whether the block columns are neighbours; absent tokens are near to none."""
    other_columns = tl.load(column_ptr + tokens, mask=is_token, other=_FAR_COLUMN)
    # One comparison without an absolute value: what is negative is large without its sign.
    distances = (columns + NUM_RUNS // 2)[:, None] - other_columns[None, :]
    return distances.to(tl.uint32) <= 2 * (NUM_RUNS // 2)


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
        tokens = _tokens_at(positions, runs, NUM_RUNS)
        key = _load_rows(key_states, tokens, is_key, HEAD_DIM, BOUNDED)
        value = _load_rows(value_states, tokens, is_key, HEAD_DIM, BOUNDED)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee")
        if NEAR:
            is_seen = _is_near(columns, column_ptr, tokens, is_key, NUM_RUNS)
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
        image_start, queries, run, num_keys, row = _load_split(image_ptr, program, num_splits, NUM_GLOBALS, BLOCK_G)
        is_query = queries < NUM_GLOBALS
        query = _load_rows(query_states, image_start + queries, is_query, HEAD_DIM, True)
        output, row_max, row_sum = _attend(
            _attend_nothing(BLOCK_G, HEAD_DIM), query, query, key_states, value_states, column_ptr, logit_scale, run,
            0, num_keys, num_keys, 1, HEAD_DIM, BLOCK_N, BOUNDED=True, NEAR=False,
        )  # fmt: skip
        _store_rows((partial_output_ptr, HEAD_DIM), row + queries, is_query, output, HEAD_DIM)
        tl.store(partial_max_ptr + row + queries, row_max, mask=is_query)
        tl.store(partial_sum_ptr + row + queries, row_sum, mask=is_query)
    else:
        start, end, tile_ptr = _load_tile(table_ptr, program - num_split_programs, NUM_RUNS, PARTS, BLOCK_M)
        if start < end:
            global_run = ((), (tl.load(tile_ptr + 2),))
            runs, num_keys = _load_runs(tile_ptr, NUM_RUNS)
            column_ptr -= tl.load(tile_ptr + 3)
            queries = start + tl.arange(0, BLOCK_M)
            is_query = queries < end
            query = _load_rows(query_states, queries, is_query, HEAD_DIM, True)
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
            _store_rows(output_states, queries, is_query, output / row_sum[:, None], HEAD_DIM)
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
    partial_output = _load_rows((partial_output_ptr, HEAD_DIM), rows, is_split, HEAD_DIM, True)
    output = tl.sum(partial_output * weights[:, None], axis=0) / total
    token = tl.load(image_ptr + image).to(tl.int64) + index
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    output_ptr += (token * num_heads + head) * HEAD_DIM
    tl.store(output_ptr + dims, output.to(output_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
    tl.store(logsumexp_ptr + head * num_tokens + token, maximum + tl.log2(total))


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
    output = _load_rows(output_states, tokens, is_token, HEAD_DIM, True).to(tl.float32)
    grad_output = _load_rows(grad_output_states, tokens, is_token, HEAD_DIM, True).to(tl.float32)
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
        tokens = _tokens_at(positions, runs, NUM_RUNS)
        key = _load_rows(key_states, tokens, is_key, HEAD_DIM, BOUNDED)
        value = _load_rows(value_states, tokens, is_key, HEAD_DIM, BOUNDED)
        logits = tl.dot(query, tl.trans(key), input_precision="ieee")
        probabilities = tl.exp2(logits * logit_scale - logsumexp[:, None])
        if NEAR:
            probabilities = tl.where(_is_near(columns, column_ptr, tokens, is_key, NUM_RUNS), probabilities, 0.0)
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
        image_start, indices, run, num_keys, row = _load_split(image_ptr, program, num_splits, NUM_GLOBALS, BLOCK_G)
        is_query = indices < NUM_GLOBALS
        queries = image_start + indices
        query = _load_rows(query_states, queries, is_query, HEAD_DIM, True)
        grad_output = _load_rows(grad_output_states, queries, is_query, HEAD_DIM, True)
        logsumexp = tl.load(logsumexp_ptr + queries, mask=is_query, other=float("inf"))
        delta = tl.load(delta_ptr + queries, mask=is_query, other=0.0)
        grad_query = _add_grad_query(
            tl.zeros_like(query).to(tl.float32), query, grad_output, logsumexp, delta, query, key_states, value_states,
            column_ptr, logit_scale, run, 0, num_keys, num_keys, 1, HEAD_DIM, BLOCK_N, BOUNDED=True, NEAR=False,
        )  # fmt: skip
        _store_rows((partial_ptr, HEAD_DIM), row + indices, is_query, grad_query, HEAD_DIM)
    else:
        start, end, tile_ptr = _load_tile(table_ptr, program - num_split_programs, NUM_RUNS, PARTS, BLOCK_M)
        if start < end:
            global_run = ((), (tl.load(tile_ptr + 2),))
            runs, num_keys = _load_runs(tile_ptr, NUM_RUNS)
            column_ptr -= tl.load(tile_ptr + 3)
            queries = start + tl.arange(0, BLOCK_M)
            is_query = queries < end
            query = _load_rows(query_states, queries, is_query, HEAD_DIM, True)
            grad_output = _load_rows(grad_output_states, queries, is_query, HEAD_DIM, True)
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
            _store_rows(grad_query_states, queries, is_query, grad_query * scale, HEAD_DIM)


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
        tokens = _tokens_at(positions, runs, NUM_RUNS)
        query = _load_rows(query_states, tokens, is_query, HEAD_DIM, BOUNDED)
        grad_output = _load_rows(grad_output_states, tokens, is_query, HEAD_DIM, BOUNDED)
        # An absent query has probability exp2(-inf) = 0.
        logsumexp = tl.load(logsumexp_ptr + tokens, mask=is_query, other=float("inf"))
        delta = tl.load(delta_ptr + tokens, mask=is_query, other=0.0)
        logits = tl.dot(key, tl.trans(query), input_precision="ieee")  # (keys, queries)
        probabilities = tl.exp2(logits * logit_scale - logsumexp[None, :])
        if NEAR:
            probabilities = tl.where(_is_near(columns, column_ptr, tokens, is_query, NUM_RUNS), probabilities, 0.0)
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
        image_start, indices, run, num_queries, row = _load_split(image_ptr, program, num_splits, NUM_GLOBALS, BLOCK_G)
        is_key = indices < NUM_GLOBALS
        key = _load_rows(key_states, image_start + indices, is_key, HEAD_DIM, True)
        value = _load_rows(value_states, image_start + indices, is_key, HEAD_DIM, True)
        nothing = tl.zeros_like(key).to(tl.float32)
        grad_key, grad_value = _add_grad_key_value(
            (nothing, nothing), key, value, key, query_states, grad_output_states, logsumexp_ptr, delta_ptr, column_ptr,
            logit_scale, run, 0, num_queries, num_queries, 1, HEAD_DIM, BLOCK_N, BOUNDED=True, NEAR=False,
        )  # fmt: skip
        _store_rows((partial_key_ptr, HEAD_DIM), row + indices, is_key, grad_key, HEAD_DIM)
        _store_rows((partial_value_ptr, HEAD_DIM), row + indices, is_key, grad_value, HEAD_DIM)
    else:
        start, end, tile_ptr = _load_tile(table_ptr, program - num_split_programs, NUM_RUNS, PARTS, BLOCK_M)
        if start < end:
            global_run = ((), (tl.load(tile_ptr + 2),))
            runs, num_queries = _load_runs(tile_ptr, NUM_RUNS)
            column_ptr -= tl.load(tile_ptr + 3)
            keys = start + tl.arange(0, BLOCK_M)
            is_key = keys < end
            key = _load_rows(key_states, keys, is_key, HEAD_DIM, True)
            value = _load_rows(value_states, keys, is_key, HEAD_DIM, True)
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
            _store_rows((grad_key_ptr + head * HEAD_DIM, stride), keys, is_key, grad_key * scale, HEAD_DIM)
            _store_rows((grad_value_ptr + head * HEAD_DIM, stride), keys, is_key, grad_value, HEAD_DIM)


@triton.jit
def _add_splits(states_ptr, partial_ptr, rows, is_split, token, scale, HEAD_DIM: tl.constexpr):
    """Adds the splits of one token's gradient, in order, and stores it."""
    total = tl.sum(_load_rows((partial_ptr, HEAD_DIM), rows, is_split, HEAD_DIM, True), axis=0) * scale
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
