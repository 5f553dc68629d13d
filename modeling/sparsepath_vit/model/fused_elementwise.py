# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a layer does between its matrix products, each in one pass over the tokens: LayerScale, residual, norm, SwiGLU.

The torch form of each function is the specification. It runs in training, on the CPU and under torch.compile, where
inductor fuses it and its neighbours itself: a custom operator would move as many bytes and stand in the way of fusing
the next layer's norm. In eager inference on NVIDIA GPUs a Triton kernel runs instead. It computes in float32 and rounds
each result once, where the torch form rounds after every operation, so that in 16 bits it is the closer to the exact
result; the norm is that of the sum before it is rounded. The kernels are imported when first launched, as those of
attention are.

Bytes moved for N tokens of width C in 16 bits, in units of 2 N C, C the width and the gated MLP 16/3 C wide as in
UNI2-h: LayerScale, residual and norm 4 instead of 7, SwiGLU 8 instead of 13.3, LayerScale and residual 3 instead of 5;
these 3 are none where the last product of the MLP itself adds to the residual (`linear_products.py`).
"""

import torch
from torch import nn

from .attention_triton import is_installed

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A program of the kernel holds whole rows in its registers.
_MOST_CHANNELS = 8192


@torch.compiler.assume_constant_result
def kernels_run_on(device: torch.device) -> bool:
    """Whether Triton kernels run on a device; those that the interpreter runs on the CPU are for tests only."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip or not is_installed():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def fuses(first: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether a kernel computes with these tensors: at inference, in eager mode, where they lie contiguous on a GPU.

    Subclasses of tensors (fake, distributed, quantised ones) say by themselves what an operation does to them. The
    result has the dtype of the first, so the others must not be wider.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    are_plain = all(
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.dtype in _DTYPES
        and tensor.device == first.device
        and tensor.is_contiguous()
        and torch.promote_types(first.dtype, tensor.dtype) == first.dtype
        for tensor in (first, *others)
        if tensor is not None
    )
    return are_plain and first.numel() > 0 and kernels_run_on(first.device)


def fuses_layer(residual: torch.Tensor, branch: torch.Tensor, *modules: nn.Module) -> bool:
    """Whether the functions below may stand for these modules of a layer, the LayerScales and norms among them.

    Not where a hook waits for one of them to be called, as Accelerate's do for those whose weights are elsewhere.
    """
    if any(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in modules):
        return False
    return _fuses_sum(residual, branch, *(weight for module in modules for weight in module.parameters()))


def _fuses_sum(residual: torch.Tensor, branch: torch.Tensor, *weights: torch.Tensor | None) -> bool:
    return residual.shape[-1] <= _MOST_CHANNELS and fuses(residual, branch, *weights)


def add_scaled_and_normalise(
    residual: torch.Tensor,
    branch: torch.Tensor,
    scale: torch.Tensor | None,
    norm: nn.LayerNorm,
    total: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum residual + branch * scale, and its LayerNorm.

    Args:
        residual, branch: (..., width).
        scale: (width,) LayerScale, `None` for 1.
        norm: over the width.
        total: takes the sum, and may be the residual itself; `None` for a new tensor.
        shift: (width,) added to the sum that is returned and not to what is normalised; `None` for 0.

    Returns:
        The sum and the normalised sum, each (..., width).
    """
    if _fuses_sum(residual, branch, scale, norm.weight, norm.bias, shift):
        from .fused_elementwise_triton import launch_add_scaled

        total = torch.empty_like(residual) if total is None else total
        return total, launch_add_scaled(residual, branch, scale, total, norm, shift)
    total = torch.add(residual, branch if scale is None else branch * scale, out=total)
    normalised = norm(total)
    return total if shift is None else total.add_(shift), normalised


def add_scaled_(residual: torch.Tensor, branch: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """The sum residual + branch * scale, written over the residual, which is returned.

    Args:
        residual, branch: (..., width).
        scale: (width,) LayerScale, `None` for 1.
    """
    if not _fuses_sum(residual, branch, scale):
        return residual.add_(branch if scale is None else branch * scale)
    from .fused_elementwise_triton import launch_add_scaled

    launch_add_scaled(residual, branch, scale, residual)
    return residual


def gated_silu(packed: torch.Tensor, may_fuse: bool = True) -> torch.Tensor:
    """The product silu(gate) * value of a SwiGLU whose gate and value share one projection, gate first.

    Args:
        packed: (..., 2 * width).
        may_fuse: `False` for training, where some forwards record no gradient and are later compared to one that does:
            gradient checkpointing.

    Returns:
        (..., width).
    """
    if may_fuse and fuses(packed):
        from .fused_elementwise_triton import launch_gated_silu

        return launch_gated_silu(packed)
    gate, value = packed.chunk(2, dim=-1)
    return nn.functional.silu(gate) * value
