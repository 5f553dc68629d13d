# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Block-local and stratified attention on NVIDIA GPUs: launches the Triton kernels, bitwise reproducible.

Queries, keys and values are read in place through their strides, so that a fused projection is never copied; keys and
values that lie differently are, since one offset serves both. Nothing waits for the device, so a forward can be
captured in a CUDA graph.
"""

import math
from typing import NamedTuple

import torch

from .attention_backend import LayerContext, StripContext
from .attention_precision import FP_FUSION
from .attention_triton_backward import (
    backward_key_value_kernel,
    backward_query_kernel,
    backward_reduce_kernel,
    delta_kernel,
)
from .attention_triton_context import (
    MEAN_ROWS,
    MeanGradients,
    StratifiedLayer,
    add_context_gradients,
    grad_mean_query,
    mean_gradients,
    stratified_layer,
)
from .attention_triton_forward import forward_kernel, forward_reduce_kernel
from .attention_triton_functions import STRIDE_UNIT
from .attention_triton_tables import AttentionTiles

try:
    import triton
except ImportError as error:
    raise ImportError("The attention kernel needs Triton, which is not installed: pip install triton.") from error

# TRITON_INTERPRET=1 before the kernels are imported: they run as numpy code on the CPU, for tests.
IS_INTERPRETED = triton.knobs.runtime.interpret


class LaunchShape(NamedTuple):
    """How a kernel is launched.

    Attributes:
        block_m: tokens of a program; divides the size of a tile.
        block_n: tokens it streams at a time.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By kernel and tile size; 16-bit states with head_dim up to 64, then up to 128. For sm_90 and head_dim 64 the registers
# of tiles of 128, 64, 32 and 16 with Triton 3.6 are: forward 125, 127, 159, 168; keys and values 163, 206, 182 but for
# the first; queries 154 and 168 of 64 and 16. With context tokens tiles of 64 take 142, 170 and 168. Spilled are, for
# sm_80 and sm_90: by the backward of queries in tiles of 16 4 bytes; with context tokens by the forward of 32 28 bytes
# (3.6), by keys and values, of heads of 80 and more, 16 to 124 bytes, and in float32 of heads of 128 on sm_80 3,128,
# nearly all of it outside the loops: tiles of 16 would spill 936 and take a tenth more instructions for the same work.
_SHAPES = {
    ("forward", 128): (LaunchShape(128, 64, 8, 3), LaunchShape(128, 64, 8, 2)),
    ("forward", 64): (LaunchShape(64, 64, 4, 3), LaunchShape(64, 64, 4, 2)),
    ("forward", 32): (LaunchShape(32, 64, 2, 2), LaunchShape(32, 32, 2, 2)),
    ("forward", 16): (LaunchShape(16, 64, 1, 2), LaunchShape(16, 32, 2, 2)),
    ("backward_query", 64): (LaunchShape(64, 64, 4, 2), LaunchShape(64, 32, 4, 3)),
    ("backward_query", 32): (LaunchShape(32, 32, 2, 2), LaunchShape(32, 32, 2, 2)),
    ("backward_query", 16): (LaunchShape(16, 32, 1, 2), LaunchShape(16, 32, 2, 2)),
    ("backward_key_value", 64): (LaunchShape(64, 32, 4, 3), LaunchShape(64, 32, 8, 2)),
    ("backward_key_value", 32): (LaunchShape(32, 32, 2, 2), LaunchShape(32, 32, 4, 2)),
    ("backward_key_value", 16): (LaunchShape(16, 32, 1, 2), LaunchShape(16, 32, 2, 2)),
}
# Warp group matrix products read both operands from shared memory; elsewhere a long head_dim needs smaller tiles.
_SHAPE_WITHOUT_WARP_GROUPS = LaunchShape(32, 32, 4, 2)
_SHAPE_FLOAT32 = LaunchShape(32, 32, 8, 1)

# Global queries are split over their keys: enough programs to fill a GPU, few enough to be joined at once.
_MAX_SPLITS = 64
_TOKENS_PER_SPLIT = 1024


def launch_shape(kernel: str, head_dim: int, dtype: torch.dtype, tile_size: int, capability: int) -> LaunchShape:
    """The shape that "forward", "backward_query" or "backward_key_value" is launched with.

    Args:
        kernel: which kernel.
        head_dim: of the states.
        dtype: of the states.
        tile_size: most tokens of the tiles.
        capability: major compute capability of the GPU.
    """
    has_warp_groups = capability in (9, 10)
    if dtype == torch.float32:
        shape = _SHAPE_FLOAT32
    elif head_dim in (80, 96) and (tile_size < 64 or not has_warp_groups):
        # A warp for 16 tokens: more of them would compute the products of a head's second part twice.
        shape = LaunchShape(min(64, tile_size), 32, min(64, tile_size) // 16, 2)
    elif head_dim > 64 and not has_warp_groups:
        shape = _SHAPE_WITHOUT_WARP_GROUPS
    else:
        # The backward takes the tokens of its large tiles in two parts.
        known = tile_size if (kernel, tile_size) in _SHAPES else 64
        shape = _SHAPES[kernel, known][head_dim > 64]
    return shape._replace(block_m=min(shape.block_m, tile_size))


class _Programs(NamedTuple):
    """The programs of a kernel: for each image and `block_g` global tokens `num_splits`, then those of the tiles."""

    num_images: int
    num_splits: int
    block_g: int
    num_split_programs: int


def _programs(tiles: AttentionTiles, num_tokens: int) -> _Programs:
    num_images = len(tiles.image_offsets) - 1
    num_splits = min(_MAX_SPLITS, triton.cdiv(num_tokens, num_images * _TOKENS_PER_SPLIT))
    block_g = min(64, max(16, triton.next_power_of_2(tiles.num_global_tokens)))
    num_programs = num_images * triton.cdiv(tiles.num_global_tokens, block_g) * num_splits
    return _Programs(num_images, num_splits, block_g, num_programs)


def _launch(
    kernel: triton.JITFunction,
    name: str,
    states: tuple[torch.Tensor, ...],
    tensors: tuple[torch.Tensor, ...],
    tiles: AttentionTiles,
    numbers: tuple[object, ...],
    **constants: int,
) -> None:
    """Launches one of the three kernels that work on tiles, once for each width of them.

    `states` are read with their strides, the value with the key's; `numbers` come after those that all three take.
    """
    num_tokens, num_heads, head_dim = states[0].shape  # of queries: a strip has fewer of them than of keys
    capability = torch.cuda.get_device_capability()[0] if states[0].is_cuda else 0
    programs = _programs(tiles, len(states[1]))
    num_split_programs = programs.num_split_programs
    for tile_size, first, count in tiles.widths():
        shape = launch_shape(name, head_dim, states[0].dtype, tile_size, capability)
        parts = tile_size // shape.block_m
        kernel[(num_split_programs + count * parts, num_heads)](
            *states,
            *tensors,
            *[stride for state in (*states[:2], *states[3:]) for stride in state.stride()[:2]],
            num_tokens,
            first * parts,
            programs.num_splits,
            num_split_programs,
            *numbers,
            NUM_GLOBALS=tiles.num_global_tokens,
            NUM_RUNS=2 * tiles.neighbor_radius + 1,
            HEAD_DIM=head_dim,
            PARTS=parts,
            BLOCK_G=programs.block_g,
            BLOCK_M=shape.block_m,
            BLOCK_N=shape.block_n,
            **constants,
            num_warps=shape.num_warps,
            num_stages=shape.num_stages,
            enable_fp_fusion=FP_FUSION,
        )
        num_split_programs = 0  # the global tokens are done by the first launch


def _readable(states: torch.Tensor) -> torch.Tensor:
    """States (M, heads, head_dim) whose rows the kernels can find: themselves, or a copy of views that lie oddly."""
    stride, _, last_stride = states.stride()
    is_near = len(states) * stride < STRIDE_UNIT * 2**31  # offsets of rows are counted in units, in int32
    return states if stride % STRIDE_UNIT == 0 and is_near and last_stride == 1 else states.contiguous()


def _lying_alike(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values with the same strides: they themselves where they have, as views of one projection do."""
    key, value = _readable(key), _readable(value)
    return (key, value) if key.stride() == value.stride() else (key.contiguous(), value.contiguous())


def _context_arguments(layer: StratifiedLayer | None) -> tuple[object, ...]:
    """What the kernels that stream keys take of a layer's context tokens."""
    if layer is None:
        return (None,) * 5
    return layer.key, layer.value, layer.bias, layer.starts, layer.bias.shape[1]


def launch_block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    tiles: AttentionTiles,
    scale: float,
    context: LayerContext | StripContext | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-local or stratified attention of packed tokens, or of a strip of them, read in place.

    Args:
        query: (M, heads, head_dim), of a strip (G + S, heads, head_dim); contiguous in the last dimension.
        key, value: (M, heads, head_dim), views of a fused projection or not, as the query.
        tiles: where the tokens are.
        scale: positive factor on the logits.
        context: the context tokens of the layer; `None` for block-local attention.

    Returns:
        The output in the query's shape, and the base-2 log-sum-exp (heads, queries) of each query's logits, float32.
    """
    num_tokens, num_heads, head_dim = query.shape
    query, (key, value) = _readable(query), _lying_alike(key, value)
    num_images, num_splits, *_ = _programs(tiles, len(key))
    output = query.new_empty(query.shape)
    logsumexp = query.new_empty((num_heads, num_tokens), dtype=torch.float32)
    partial = logsumexp.new_empty((num_images, num_heads, num_splits, tiles.num_global_tokens, head_dim))
    # Two tensors: halves of one would be aligned for some numbers of heads only, and the kernel compiled for both.
    partial_max, partial_sum = (partial.new_empty(partial.shape[:-1]) for _ in range(2))
    tensors = (output, logsumexp, tiles.table, tiles.image_offsets, partial, partial_max, partial_sum)
    with torch.cuda.device_of(query):
        layer, of_mean = None, (None, 0, None, None)
        if context is not None:
            layer = stratified_layer(key, value, tiles, context, scale)
            of_mean = (layer.mean_output, len(tiles.context.entries), *tiles.context[:2])
        numbers = (scale * math.log2(math.e), tiles.global_shift, tiles.weights, *_context_arguments(layer), *of_mean)
        _launch(forward_kernel, "forward", (query, key, value), tensors, tiles, numbers)
        forward_reduce_kernel[(num_images * tiles.num_global_tokens, num_heads)](
            *(output, logsumexp, tiles.image_offsets, partial, partial_max, partial_sum),
            *(num_tokens, num_splits, tiles.global_shift),
            NUM_GLOBALS=tiles.num_global_tokens,
            HEAD_DIM=head_dim,
            BLOCK_S=_MAX_SPLITS,  # not of their number, which would compile for each
            enable_fp_fusion=FP_FUSION,
        )
    return output, logsumexp


def launch_block_attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    tiles: AttentionTiles,
    scale: float,
    context: LayerContext | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of `launch_block_attention` with respect to query, key and value, each (M, heads, head_dim).

    With context tokens also with respect to the mean queries, (images, heads, head_dim).
    """
    num_tokens, num_heads, head_dim = query.shape
    query, (key, value) = _readable(query), _lying_alike(key, value)
    num_images, num_splits, _, num_split_programs = _programs(tiles, num_tokens)
    # The gradient of a sum is one number expanded to all: its last dimension is not contiguous.
    grad_output = _readable(grad_output)
    grad_query, grad_key, grad_value = gradients = [query.new_empty(query.shape) for _ in range(3)]
    partial = logsumexp.new_empty((3, num_images, num_heads, num_splits, tiles.num_global_tokens, head_dim))
    states, scales = (query, key, value, grad_output), (scale, scale * math.log2(math.e), tiles.weights)
    with torch.cuda.device_of(query):
        delta = _delta(output, grad_output, logsumexp)
        layer, of_mean, of_blocks = None, None, (None, None)
        if context is not None:
            layer, of_blocks = stratified_layer(key, value, tiles, context, scale), tiles.context[:2]
            of_mean = mean_gradients(grad_output, delta, layer, tiles, _most_parts(tiles, query), num_split_programs)
        tables = (logsumexp, delta, tiles.table, tiles.image_offsets)
        tensors, numbers = (grad_query, *tables, partial[0]), (*scales, *_context_arguments(layer), *of_blocks)
        _launch(backward_query_kernel, "backward_query", states, tensors, tiles, numbers)
        tensors, numbers = (grad_key, grad_value, *tables, *partial[1:]), _mean_arguments(tiles, layer, of_mean)
        rows = max(MEAN_ROWS, triton.next_power_of_2((2 * tiles.neighbor_radius + 1) ** 2 + 1))
        name = "backward_key_value"
        _launch(backward_key_value_kernel, name, states, tensors, tiles, (*scales, *numbers), BLOCK_R=rows)
        _join_splits(gradients, partial, tiles, scale)
        if context is None:
            return grad_query, grad_key, grad_value
        of_slots = (gradients[1:], grad_output, query, (logsumexp, delta), layer, of_mean, tiles, scale)
        return *gradients, grad_mean_query(add_context_gradients(*of_slots), of_mean, layer, tiles, scale)


def _join_splits(gradients: list[torch.Tensor], partial: torch.Tensor, tiles: AttentionTiles, scale: float) -> None:
    """Stores the gradients of the global tokens; `partial` is (3, images, heads, splits, globals, head_dim)."""
    _, num_images, num_heads, num_splits, num_globals, head_dim = partial.shape
    backward_reduce_kernel[(num_images * num_globals, num_heads)](
        *(*gradients, tiles.image_offsets, *partial, num_splits, scale),
        NUM_GLOBALS=num_globals,
        HEAD_DIM=head_dim,
        BLOCK_S=_MAX_SPLITS,  # not of their number, which would compile for each
        enable_fp_fusion=FP_FUSION,
    )


def _delta(output: torch.Tensor, grad_output: torch.Tensor, logsumexp: torch.Tensor) -> torch.Tensor:
    """Output times its gradient, summed over head_dim, (heads, M) float32."""
    num_tokens, num_heads, head_dim = output.shape
    delta = torch.empty_like(logsumexp)
    delta_kernel[(triton.cdiv(num_tokens, 64), num_heads)](
        *(output, grad_output, delta, *grad_output.stride()[:2], num_tokens),
        HEAD_DIM=head_dim,
        BLOCK_M=64,
        enable_fp_fusion=FP_FUSION,
    )
    return delta


def _most_parts(tiles: AttentionTiles, query: torch.Tensor) -> int:
    """How many programs a tile has at most where its tokens are keys."""
    capability = torch.cuda.get_device_capability()[0] if query.is_cuda else 0
    shapes = {
        size: launch_shape("backward_key_value", query.shape[-1], query.dtype, size, capability)
        for size, _, _ in tiles.widths()
    }
    return max(size // shape.block_m for size, shape in shapes.items())


def _mean_arguments(
    tiles: AttentionTiles, layer: StratifiedLayer | None, of_mean: MeanGradients | None
) -> tuple[object, ...]:
    """What the kernel of keys and values takes of the mean queries."""
    if layer is None:
        return (*(None,) * 6, *(0,) * 3, *(None,) * 3)
    return (
        *(layer.mean_query, of_mean.output, of_mean.logsumexp, of_mean.delta, of_mean.partial),
        *(of_mean.partial_splits, len(tiles.context.entries), len(layer.mean_query), of_mean.most_parts),
        *tiles.context[:3],
    )
