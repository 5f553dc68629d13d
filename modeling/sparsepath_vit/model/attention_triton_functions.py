# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: ANN001, ANN201, RUF005 (Triton infers types, and compiles no unpacking)
"""What the forward and the backward kernels of block-local attention share: reading states, tiles and runs of tokens.

States are (pointer, token stride) of one head, runs are (ends, shifts) as `load_runs` makes them.
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
def load_rows(states, tokens, is_token, HEAD_DIM: tl.constexpr, BOUNDED: tl.constexpr):
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
def store_rows(states, tokens, is_token, rows, HEAD_DIM: tl.constexpr):
    """Stores (tokens, head_dim to the next power of two) in the dtype of the states, for tokens that are there."""
    dims = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    pointers = states[0] + tokens.to(tl.int64)[:, None] * states[1] + dims[None, :]
    mask = is_token[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, rows.to(states[0].dtype.element_ty), mask=mask)


@triton.jit
def load_tile(table_ptr, program, NUM_RUNS: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """First token and end of a program's part of its tile, and where the tile's columns are."""
    tile_ptr = table_ptr + (program // PARTS).to(tl.int64) * (_FIRST_RUN_COLUMN + 2 * NUM_RUNS)
    start = tl.load(tile_ptr) + program % PARTS * BLOCK_M
    return start, tl.minimum(tl.load(tile_ptr + 1), start + BLOCK_M), tile_ptr


@triton.jit
def load_runs(tile_ptr, NUM_RUNS: tl.constexpr):
    """Where runs end among the positions, how the shift to packed tokens changes there; the number of positions."""
    run_ptr = tile_ptr + _FIRST_RUN_COLUMN
    ends = ()
    shifts = (tl.load(run_ptr + 1),)
    for run in tl.static_range(1, NUM_RUNS):
        ends = ends + (tl.load(run_ptr + 2 * run - 2),)
        shifts = shifts + (tl.load(run_ptr + 2 * run + 1) - tl.load(run_ptr + 2 * run - 1),)
    return (ends, shifts), tl.load(run_ptr + 2 * NUM_RUNS - 2)


@triton.jit
def load_split(image_ptr, program, num_splits, NUM_GLOBALS: tl.constexpr, BLOCK_G: tl.constexpr):
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
def tokens_at(positions, runs, NUM_RUNS: tl.constexpr):
    """Packed token at each position of the runs."""
    tokens = positions + runs[1][0]
    for run in tl.static_range(1, NUM_RUNS):
        tokens += tl.where(positions >= runs[0][run - 1], runs[1][run], 0)
    return tokens


@triton.jit
def is_near(columns, column_ptr, tokens, is_token, NUM_RUNS: tl.constexpr):
    """(columns, tokens) whether the block columns are neighbours; absent tokens are near to none."""
    other_columns = tl.load(column_ptr + tokens, mask=is_token, other=_FAR_COLUMN)
    # One comparison without an absolute value: what is negative is large without its sign.
    distances = (columns + NUM_RUNS // 2)[:, None] - other_columns[None, :]
    return distances.to(tl.uint32) <= 2 * (NUM_RUNS // 2)
