# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Block-local attention on NVIDIA GPUs: launches the Triton kernels, forward and backward, bitwise reproducible.

Queries, keys and values are read in place through their strides, so that a fused projection is never copied. Nothing
waits for the device, so a forward can be captured in a CUDA graph.
"""

import math
from typing import NamedTuple

import torch

from .attention_triton_kernels import (
    backward_key_value_kernel,
    backward_query_kernel,
    backward_reduce_kernel,
    delta_kernel,
    forward_kernel,
    forward_reduce_kernel,
)
from .attention_triton_tables import AttentionTiles, attention_tiles, check_states
from .token_grid import TokenGrid

try:
    import triton
except ImportError as error:
    raise ImportError("The attention kernel needs Triton, which is not installed: pip install triton.") from error

KERNEL_HEAD_DIMS = (16, 32, 64, 80, 96, 128)
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# TRITON_INTERPRET=1 before the kernels are imported: they run as numpy code on the CPU, for tests.
IS_INTERPRETED = triton.knobs.runtime.interpret


def check_kernel_states(query: torch.Tensor) -> None:
    """Raises a ValueError where the kernel does not take the head_dim (last dimension) or dtype of the states."""
    if query.shape[-1] not in KERNEL_HEAD_DIMS:
        raise ValueError(
            f"query has head_dim {query.shape[-1]}: the Triton kernel takes one of {KERNEL_HEAD_DIMS}. For others "
            "choose the backend 'cpu', which runs on any device."
        )
    if query.dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"query is {query.dtype}: the Triton kernel takes one of {KERNEL_DTYPES}. For others choose the backend "
            "'cpu', which runs on any device."
        )


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


# By kernel; 16-bit states with head_dim up to 64, then up to 128. The compiler spills no registers for sm_80 and sm_90
# with the first of each, and for sm_90 with the second.
_SHAPES = {
    "forward": (LaunchShape(64, 64, 4, 3), LaunchShape(64, 64, 4, 2)),
    "forward_large_tile": (LaunchShape(128, 64, 8, 3), LaunchShape(128, 64, 8, 2)),
    "backward_query": (LaunchShape(64, 64, 4, 2), LaunchShape(64, 32, 4, 3)),
    "backward_key_value": (LaunchShape(64, 32, 4, 3), LaunchShape(64, 32, 8, 2)),
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
        tile_size: of the tiles.
        capability: major compute capability of the GPU.
    """
    if dtype == torch.float32:
        return _SHAPE_FLOAT32
    if head_dim > 64 and capability not in (9, 10):
        return _SHAPE_WITHOUT_WARP_GROUPS
    if kernel == "forward" and tile_size == 128:
        kernel = "forward_large_tile"
    return _SHAPES[kernel][head_dim > 64]


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
    scales: tuple[float, ...],
) -> None:
    """Launches one of the three kernels that work on tiles; `states` are read with their strides."""
    num_tokens, num_heads, head_dim = states[0].shape
    capability = torch.cuda.get_device_capability()[0] if states[0].is_cuda else 0
    shape = launch_shape(name, head_dim, states[0].dtype, tiles.tile_size, capability)
    programs, parts = _programs(tiles, num_tokens), tiles.tile_size // shape.block_m
    kernel[(programs.num_split_programs + len(tiles.table) * parts, num_heads)](
        *states,
        *tensors,
        *[stride for state in states for stride in state.stride()[:2]],
        num_tokens,
        programs.num_splits,
        programs.num_split_programs,
        *scales,
        NUM_GLOBALS=tiles.num_global_tokens,
        NUM_RUNS=2 * tiles.neighbor_radius + 1,
        HEAD_DIM=head_dim,
        PARTS=parts,
        BLOCK_G=programs.block_g,
        BLOCK_M=shape.block_m,
        BLOCK_N=shape.block_n,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )


def launch_block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tiles: AttentionTiles, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-local attention of packed tokens, read in place.

    Args:
        query, key, value: (M, heads, head_dim), views of a fused projection or not; contiguous in the last dimension.
        tiles: where the tokens are.
        scale: positive factor on the logits.

    Returns:
        The output (M, heads, head_dim), and the base-2 log-sum-exp (heads, M) of each query's logits, float32.
    """
    num_tokens, num_heads, head_dim = query.shape
    num_images, num_splits, *_ = _programs(tiles, num_tokens)
    output = query.new_empty(query.shape)
    logsumexp = query.new_empty((num_heads, num_tokens), dtype=torch.float32)
    partial = logsumexp.new_empty((num_images, num_heads, num_splits, tiles.num_global_tokens, head_dim))
    # Two tensors: halves of one would be aligned for some numbers of heads only, and the kernel compiled for both.
    partial_max, partial_sum = (partial.new_empty(partial.shape[:-1]) for _ in range(2))
    tensors = (output, logsumexp, tiles.table, tiles.block_columns, tiles.image_offsets)
    with torch.cuda.device_of(query):
        _launch(
            forward_kernel,
            "forward",
            (query, key, value),
            (*tensors, partial, partial_max, partial_sum),
            tiles,
            (scale * math.log2(math.e),),
        )
        forward_reduce_kernel[(num_images * tiles.num_global_tokens, num_heads)](
            output,
            logsumexp,
            tiles.image_offsets,
            partial,
            partial_max,
            partial_sum,
            num_tokens,
            num_splits,
            NUM_GLOBALS=tiles.num_global_tokens,
            HEAD_DIM=head_dim,
            BLOCK_S=_MAX_SPLITS,  # not of their number, which would compile for each
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `launch_block_attention` with respect to query, key and value, each (M, heads, head_dim)."""
    num_tokens, num_heads, head_dim = query.shape
    num_images, num_splits, *_ = _programs(tiles, num_tokens)
    # The gradient of a sum is one number expanded to all: its last dimension is not contiguous.
    grad_output = grad_output if grad_output.stride(-1) == 1 else grad_output.contiguous()
    grad_query, grad_key, grad_value = (query.new_empty(query.shape) for _ in range(3))
    delta = torch.empty_like(logsumexp)
    partial = logsumexp.new_empty((3, num_images, num_heads, num_splits, tiles.num_global_tokens, head_dim))
    partial_query, partial_key, partial_value = partial
    states, logit_scale = (query, key, value, grad_output), scale * math.log2(math.e)
    tables = (logsumexp, delta, tiles.table, tiles.block_columns, tiles.image_offsets)
    with torch.cuda.device_of(query):
        delta_kernel[(triton.cdiv(num_tokens, 64), num_heads)](
            output, grad_output, delta, *grad_output.stride()[:2], num_tokens, HEAD_DIM=head_dim, BLOCK_M=64
        )
        _launch(
            backward_query_kernel,
            "backward_query",
            states,
            (grad_query, *tables, partial_query),
            tiles,
            (scale, logit_scale),
        )
        _launch(
            backward_key_value_kernel,
            "backward_key_value",
            states,
            (grad_key, grad_value, *tables, partial_key, partial_value),
            tiles,
            (scale, logit_scale),
        )
        backward_reduce_kernel[(num_images * tiles.num_global_tokens, num_heads)](
            grad_query,
            grad_key,
            grad_value,
            tiles.image_offsets,
            *partial,
            num_splits,
            scale,
            NUM_GLOBALS=tiles.num_global_tokens,
            HEAD_DIM=head_dim,
            BLOCK_S=_MAX_SPLITS,  # not of their number, which would compile for each
        )
    return grad_query, grad_key, grad_value


class BlockAttention(torch.autograd.Function):
    """`launch_block_attention` with its gradient, for callers without the operator of `attention_operator.py`."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        tiles: AttentionTiles,
        scale: float,
    ) -> torch.Tensor:
        """Output only; see `launch_block_attention`."""
        output, logsumexp = launch_block_attention(query, key, value, tiles, scale)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.tiles, ctx.scale = tiles, scale
        return output

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None, None]:
        """Gradients of query, key and value; see `launch_block_attention_backward`."""
        gradients = launch_block_attention_backward(grad_output, *ctx.saved_tensors, ctx.tiles, ctx.scale)
        return (*gradients, None, None)


def triton_block_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: TokenGrid, *, scale: float | None = None
) -> torch.Tensor:
    """`block_attention` on the kernel alone, for users who have only that.

    Args:
        query, key, value: (batch, heads, tokens, head_dim) with (batch, tokens) = `grid.batch_shape`, in the grid's
            order: global tokens, then patch tokens block by block.
        grid: where the tokens are.
        scale: positive factor on the logits, head_dim ** -0.5 by default.

    Returns:
        (batch, heads, tokens, head_dim).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, the grid or the kernel.
    """
    scale = check_states(query, key, value, grid, scale)
    check_kernel_states(query)
    batch, heads, tokens, head_dim = query.shape
    packed = [states.transpose(1, 2).reshape(-1, heads, head_dim) for states in (query, key, value)]
    output = BlockAttention.apply(*packed, attention_tiles(grid), scale)
    return output.view(batch, tokens, heads, head_dim).transpose(1, 2)
