# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: ANN001, ANN201, RUF005 (Triton infers types, and compiles no unpacking)
"""What the forward and the backward kernels of block-local attention share: reading states, tiles and runs of tokens.

States are (pointer, token stride) of one head. Tokens to stream are split in two, each a list of runs that are walked
through as if they lay one after the other: the *whole* steps of BLOCK_N tokens that lie in one run, so that a step has
one address, and the *rest*, which is the global tokens and what remains of each run. A list is (ends, shifts): position
p of it is packed token p + shifts[0], and at ends[i] the shift grows by shifts[i + 1].
"""

from .attention_triton_context_tables import ENTRY_COLUMNS
from .attention_triton_tables import NUM_TILE_COLUMNS

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The attention kernel needs Triton, which is not installed: pip install triton.") from error

# Token strides of states that are read are multiples of this; head_dim is, too.
STRIDE_UNIT = 16

_FIRST_RUN_COLUMN = tl.constexpr(NUM_TILE_COLUMNS)
_ENTRY_COLUMNS = tl.constexpr(len(ENTRY_COLUMNS))
_STRIDE_UNIT = tl.constexpr(STRIDE_UNIT)
_IMAGE_COLUMN = tl.constexpr(ENTRY_COLUMNS.index("image"))


@triton.jit
def load_rows(states, tokens, is_token, HEAD_DIM: tl.constexpr, BOUNDED: tl.constexpr):
    """(tokens, head_dim to the next power of two); zero beyond HEAD_DIM and, where BOUNDED, for absent tokens."""
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    # A million tokens of a fused projection exceed 2**31 elements, but not 2**31 times 16 of them: one 32-bit product
    # for a step, and one instruction for the address of a row.
    offsets = (tokens * (states[1] // _STRIDE_UNIT)).to(tl.int64) * _STRIDE_UNIT
    pointers = states[0] + offsets[:, None] + dims[None, :]
    if BOUNDED:
        return tl.load(pointers, mask=is_token[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if triton.next_power_of_2(HEAD_DIM) > HEAD_DIM:
        return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_rows(states, tokens, is_token, rows, HEAD_DIM: tl.constexpr):
    """Stores (tokens, head_dim to the next power of two) in the dtype of the states, for tokens that are there."""
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    pointers = states[0] + tokens.to(tl.int64)[:, None] * states[1] + dims[None, :]
    mask = is_token[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, rows.to(states[0].dtype.element_ty), mask=mask)


@triton.jit
def load_parts(states, tokens, is_token, HEAD_DIM: tl.constexpr, BOUNDED: tl.constexpr):
    """`load_rows` in one or two parts, each a power of two wide: matrix products then take no column of padding."""
    FIRST: tl.constexpr = triton.next_power_of_2(HEAD_DIM + 1) // 2  # 64 of 80, 96 and 64
    parts = (load_rows(states, tokens, is_token, FIRST, BOUNDED),)
    if HEAD_DIM > FIRST:
        second_states = (states[0] + FIRST, states[1])
        parts = parts + (load_rows(second_states, tokens, is_token, HEAD_DIM - FIRST, BOUNDED),)
    return parts


@triton.jit
def store_parts(states, tokens, is_token, parts, HEAD_DIM: tl.constexpr):
    """`store_rows` of what `load_parts` reads."""
    FIRST: tl.constexpr = triton.next_power_of_2(HEAD_DIM + 1) // 2
    store_rows(states, tokens, is_token, parts[0], FIRST)
    if HEAD_DIM > FIRST:
        store_rows((states[0] + FIRST, states[1]), tokens, is_token, parts[1], HEAD_DIM - FIRST)


@triton.jit
def zero_parts(NUM_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Parts of float32 to add to."""
    FIRST: tl.constexpr = triton.next_power_of_2(HEAD_DIM + 1) // 2
    parts = (tl.zeros([NUM_ROWS, FIRST], tl.float32),)
    if HEAD_DIM > FIRST:
        parts = parts + (tl.zeros([NUM_ROWS, HEAD_DIM - FIRST], tl.float32),)
    return parts


@triton.jit
def dot_parts(first, second):
    """(rows of first, rows of second), the products of their rows."""
    product = tl.dot(first[0], tl.trans(second[0]), input_precision="ieee")
    for part in tl.static_range(1, len(first)):
        product = tl.dot(first[part], tl.trans(second[part]), product, input_precision="ieee")
    return product


@triton.jit
def add_to_parts(totals, weights, parts):
    """The totals and the weights' sums of the rows, part by part."""
    sums = ()
    for part in tl.static_range(len(parts)):
        sums = sums + (tl.dot(weights, parts[part], totals[part], input_precision="ieee"),)
    return sums


@triton.jit
def scale_parts(parts, factor):
    """Each part times a number or a column of them."""
    scaled = ()
    for part in tl.static_range(len(parts)):
        scaled = scaled + (parts[part] * factor,)
    return scaled


@triton.jit
def cast_parts(parts, dtype: tl.constexpr):
    """Each part in another dtype."""
    cast = ()
    for part in tl.static_range(len(parts)):
        cast = cast + (parts[part].to(dtype),)
    return cast


@triton.jit
def load_tile(table_ptr, program, NUM_RUNS: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """First token and end of a program's part of its tile, and where the tile's columns are."""
    tile_ptr = table_ptr + (program // PARTS).to(tl.int64) * (_FIRST_RUN_COLUMN + 2 * NUM_RUNS)
    start = tl.load(tile_ptr) + program % PARTS * BLOCK_M
    return start, tl.minimum(tl.load(tile_ptr + 1), start + BLOCK_M), tile_ptr


@triton.jit
def load_runs(tile_ptr, NUM_GLOBALS: tl.constexpr, NUM_RUNS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The whole steps of a tile's runs and their number of tokens, the rest and its number of tokens."""
    run_ptr = tile_ptr + _FIRST_RUN_COLUMN
    whole_ends, whole_shifts, rest_ends = (), (), ()
    num_whole, num_rest = 0, NUM_GLOBALS
    whole_shift, rest_shift = 0, tl.load(tile_ptr + 2)
    rest_shifts = (rest_shift,)
    for run in tl.static_range(NUM_RUNS):
        first, length = tl.load(run_ptr + 2 * run), tl.load(run_ptr + 2 * run + 1)
        if run > 0:
            whole_ends = whole_ends + (num_whole,)
        rest_ends = rest_ends + (num_rest,)
        whole_shifts = whole_shifts + (first - num_whole - whole_shift,)
        whole_shift = first - num_whole
        num_whole += length // BLOCK_N * BLOCK_N
        # The rest of the run begins where its whole steps end.
        rest_shifts = rest_shifts + (whole_shift + num_whole - num_rest - rest_shift,)
        rest_shift = whole_shift + num_whole - num_rest
        num_rest += length % BLOCK_N
    return (whole_ends, whole_shifts), num_whole, (rest_ends, rest_shifts), num_rest


@triton.jit
def load_split(image_ptr, program, num_splits, NUM_GLOBALS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Of one split of an image's tokens: the image's start, which global tokens, the first token, how many, the row.

    The row is that of the image's first global token among the partial results (images, heads, splits, globals).
    """
    split, rest = program % num_splits, program // num_splits
    image, first_global = rest // tl.cdiv(NUM_GLOBALS, BLOCK_G), rest % tl.cdiv(NUM_GLOBALS, BLOCK_G) * BLOCK_G
    start, end = tl.load(image_ptr + image), tl.load(image_ptr + image + 1)
    split_size = tl.cdiv(end - start, num_splits)
    length = tl.maximum(tl.minimum(end - start - split * split_size, split_size), 0)
    row = ((image * tl.num_programs(1) + tl.program_id(1)) * num_splits + split) * NUM_GLOBALS
    return start, first_global + tl.arange(0, BLOCK_G), start + split * split_size, length, row


@triton.jit
def split_runs(first, length, BLOCK_N: tl.constexpr):
    """As `load_runs`, of one run."""
    num_whole = length // BLOCK_N * BLOCK_N
    return ((), (first,)), num_whole, ((), (first + num_whole,)), length - num_whole


@triton.jit
def tokens_at(positions, runs, NUM_RUNS: tl.constexpr):
    """Packed token at each position of the runs."""
    tokens = positions + runs[1][0]
    for run in tl.static_range(1, NUM_RUNS):
        tokens += tl.where(positions >= runs[0][run - 1], runs[1][run], 0)
    return tokens


@triton.jit
def load_bias(weight_ptr, tokens, is_key, BOUNDED: tl.constexpr):
    """What is added to the logits of keys, -inf for absent ones; None where all count once and `weight_ptr` is None."""
    bias = None
    if weight_ptr is not None:
        if BOUNDED:
            bias = tl.load(weight_ptr + tokens, mask=is_key, other=float("-inf"))
        else:
            bias = tl.load(weight_ptr + tokens)
    return bias


@triton.jit
def context_of_tile(entry_ptr, entry, start_ptr, bias_ptr, context_size, HEAD_DIM: tl.constexpr):
    """Of the context tokens that a tile sees: image, how many, where their biases start, shift and stride of states."""
    image = tl.load(entry_ptr + entry.to(tl.int64) * _ENTRY_COLUMNS + _IMAGE_COLUMN)
    stride = tl.num_programs(1) * HEAD_DIM
    shift = image.to(tl.int64) * context_size * stride + tl.program_id(1) * HEAD_DIM
    length = (tl.load(start_ptr + image + 1) - tl.load(start_ptr + image)).to(tl.int32)
    return image, length, bias_ptr + entry.to(tl.int64) * context_size, shift, stride


@triton.jit
def load_row(states, token, HEAD_DIM: tl.constexpr):
    """(head_dim to the next power of two,) float32 of one token; zero beyond HEAD_DIM."""
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    row_ptr = states[0] + token.to(tl.int64) * states[1]
    return tl.load(row_ptr + dims, mask=dims < HEAD_DIM, other=0.0).to(tl.float32)


@triton.jit
def divide_and_correct(parts, divisors, mean_states, entry, all_row, HEAD_DIM: tl.constexpr, CORRECTS: tl.constexpr):
    """Each row over its divisor, where CORRECTS with `load_correction` added."""
    FIRST: tl.constexpr = triton.next_power_of_2(HEAD_DIM + 1) // 2
    divided = ()
    for part in tl.static_range(len(parts)):
        rows = parts[part] / divisors[:, None]
        if CORRECTS:
            part_states = (mean_states[0] + part * FIRST, mean_states[1])
            rows += load_correction(part_states, entry, all_row, FIRST if part == 0 else HEAD_DIM - FIRST)[None, :]
        divided = divided + (rows,)
    return divided


@triton.jit
def load_correction(mean_states, entry, all_row, HEAD_DIM: tl.constexpr):
    """What a block's queries get added: what the mean query gets from all tokens, less what it gets from its keys."""
    return load_row(mean_states, all_row, HEAD_DIM) - load_row(mean_states, entry, HEAD_DIM)


@triton.jit
def add_mean_rows(
    gradients, key, value, bias, mean_query, mean_rows, rows, is_row, logit_scale, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Adds what some rows of the mean query contribute to the gradients of keys, of values and of itself.

    The mean query is a pointer, the same for all rows, and `mean_rows` is (gradients and their stride, log-sum-exps,
    what the softmax subtracts, number of all rows). The bias is (keys, rows or 1), -inf for absent keys. Keys, values
    and gradients are in parts.
    """
    grad_key, grad_value, grad_mean = gradients
    head = tl.program_id(1).to(tl.int64)
    query = load_parts((mean_query, 0), rows, is_row, HEAD_DIM, True)
    grad_output = cast_parts(load_parts((mean_rows[0], mean_rows[1]), rows, is_row, HEAD_DIM, True), value[0].dtype)
    logsumexp = tl.load(mean_rows[2] + head * mean_rows[4] + rows, mask=is_row, other=float("inf"))
    delta = tl.load(mean_rows[3] + head * mean_rows[4] + rows, mask=is_row, other=0.0)
    logits = dot_parts(key, query)  # (keys, rows)
    probabilities = tl.exp2(logits * logit_scale + bias - logsumexp[None, :])
    grad_value = add_to_parts(grad_value, probabilities.to(value[0].dtype), grad_output)
    grad_logits = (probabilities * (dot_parts(value, grad_output) - delta[None, :])).to(key[0].dtype)
    grad_key = add_to_parts(grad_key, grad_logits, query)
    return grad_key, grad_value, add_to_parts(grad_mean, tl.trans(grad_logits), key)


@triton.jit
def store_grad_mean(partial_ptr, row, grad_mean, HEAD_DIM: tl.constexpr):
    """Stores what one program contributes to the gradient of the mean query, the sum of its rows."""
    FIRST: tl.constexpr = triton.next_power_of_2(HEAD_DIM + 1) // 2
    partial_ptr += (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * HEAD_DIM
    tl.store(partial_ptr + tl.arange(0, FIRST), tl.sum(grad_mean[0], axis=0))
    if HEAD_DIM > FIRST:
        tl.store(partial_ptr + FIRST + tl.arange(0, HEAD_DIM - FIRST), tl.sum(grad_mean[1], axis=0))


@triton.jit
def near_rows(entry_ptr, entry, num_entries, RADIUS: tl.constexpr, BLOCK_R: tl.constexpr):
    """The rows of the mean query that see a block's tokens: those of the blocks around it, and of its image."""
    SIDE: tl.constexpr = 2 * RADIUS + 1
    entry_ptr += entry.to(tl.int64) * _ENTRY_COLUMNS
    image, row, column = tl.load(entry_ptr + 2), tl.load(entry_ptr + 3), tl.load(entry_ptr + 4)
    num_rows, num_columns = tl.load(entry_ptr + 5), tl.load(entry_ptr + 6)
    indices = tl.arange(0, BLOCK_R)
    near_row, near_column = row + indices // SIDE - RADIUS, column + indices % SIDE - RADIUS
    is_row = (near_row >= 0) & (near_row < num_rows) & (near_column >= 0) & (near_column < num_columns)
    rows = entry + (near_row - row) * (num_columns + 1) + near_column - column
    is_image = indices == SIDE * SIDE
    return image, tl.where(is_image, num_entries + image, rows), is_image | (is_row & (indices < SIDE * SIDE))
