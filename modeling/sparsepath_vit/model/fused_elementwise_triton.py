# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
# ruff: noqa: ANN001, ANN201 (Triton infers types)
"""The Triton kernels of `fused_elementwise.py`: each reads its operands once, computes in float32 and rounds once."""

import torch

from .attention_precision import FP_FUSION

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused kernels need Triton, which is not installed: pip install triton.") from error

# A program holds about so many numbers of each operand: 32 a thread, in 16-byte loads.
_NUMBERS_PER_PROGRAM = 4096
NUM_WARPS = 4


@triton.jit(do_not_specialize=["num_rows"])
def add_scaled_kernel(
    residual_ptr, branch_ptr, scale_ptr, weight_ptr, bias_ptr, shift_ptr, sum_ptr, normalised_ptr, num_rows, eps,
    WIDTH: tl.constexpr, SCALES: tl.constexpr, NORMALISES: tl.constexpr, SHIFTS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Computes residual + branch * scale, and its LayerNorm, of BLOCK_M whole rows; `sum_ptr` may be `residual_ptr`.

    The sum is stored with the shift, and normalised without.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, triton.next_power_of_2(WIDTH))
    is_column = columns < WIDTH
    mask = (rows < num_rows)[:, None] & is_column[None, :]
    # Row offsets are int64: a million tokens of 4,096 channels exceed 2**31 elements.
    offsets = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    total = tl.load(branch_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if SCALES:
        total *= tl.load(scale_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    total += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    stored = total
    if SHIFTS:
        stored += tl.load(shift_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    tl.store(sum_ptr + offsets, stored.to(sum_ptr.dtype.element_ty), mask=mask)
    if NORMALISES:
        centred = tl.where(is_column[None, :], total - (tl.sum(total, axis=1) / WIDTH)[:, None], 0.0)
        variance = tl.sum(centred * centred, axis=1) / WIDTH
        weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
        normalised = centred * (1.0 / tl.sqrt(variance + eps))[:, None] * weight[None, :] + bias[None, :]
        tl.store(normalised_ptr + offsets, normalised.to(normalised_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_silu_kernel(packed_ptr, output_ptr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Computes silu(gate) * value of BLOCK_N columns of a row of (rows, gate then value); grid (rows, blocks)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = columns < WIDTH
    packed_ptr += row * 2 * WIDTH
    gate = tl.load(packed_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(packed_ptr + WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    output = gate / (1.0 + tl.exp(-gate)) * value
    tl.store(output_ptr + row * WIDTH + columns, output.to(output_ptr.dtype.element_ty), mask=mask)


def add_scaled_block(width: int) -> int:
    """Rows a program of `add_scaled_kernel` takes."""
    return max(1, _NUMBERS_PER_PROGRAM // triton.next_power_of_2(width))


def gated_silu_block(width: int) -> int:
    """Columns a program of `gated_silu_kernel` takes."""
    return min(triton.next_power_of_2(width), _NUMBERS_PER_PROGRAM)


def launch_add_scaled(
    residual: torch.Tensor,
    branch: torch.Tensor,
    scale: torch.Tensor | None,
    total: torch.Tensor,
    norm: torch.nn.LayerNorm | None = None,
    shift: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Writes residual + branch * scale to `total`, which may be `residual`, and returns its LayerNorm where asked for.

    Args:
        residual, branch, total: (..., width), contiguous.
        scale: (width,), `None` for 1.
        norm: over the width, with weight and bias.
        shift: (width,), added to what is written and not to what is normalised; `None` for 0.
    """
    width = residual.shape[-1]
    num_rows, block = residual.numel() // width, add_scaled_block(width)
    normalised = None if norm is None else torch.empty_like(residual)
    with torch.cuda.device_of(residual):
        add_scaled_kernel[(triton.cdiv(num_rows, block),)](
            residual,
            branch,
            scale,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            shift,
            total,
            normalised,
            num_rows,
            0.0 if norm is None else norm.eps,
            WIDTH=width,
            SCALES=scale is not None,
            NORMALISES=norm is not None,
            SHIFTS=shift is not None,
            BLOCK_M=block,
            num_warps=NUM_WARPS,
            enable_fp_fusion=FP_FUSION,
        )
    return normalised


def launch_gated_silu(packed: torch.Tensor) -> torch.Tensor:
    """Launches silu(gate) * value: (..., gate then value), contiguous -> (..., half as wide)."""
    width = packed.shape[-1] // 2
    output = packed.new_empty((*packed.shape[:-1], width))
    block = gated_silu_block(width)
    with torch.cuda.device_of(packed):
        gated_silu_kernel[(output.numel() // width, triton.cdiv(width, block))](
            packed, output, WIDTH=width, BLOCK_N=block, num_warps=NUM_WARPS, enable_fp_fusion=FP_FUSION
        )
    return output
