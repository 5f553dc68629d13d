# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The Triton kernels as a backend: where they run, what they take, and the tables they need of a grid.

This file does without Triton. The kernels are imported when they are first launched, since that takes a second.
"""

import importlib.util
import math
import os

import torch

from .attention_backend import AttentionBackend, LayerContext, PreparedGrid, StripContext
from .attention_triton_context_tables import ContextTables
from .attention_triton_tables import AttentionTiles, attention_tiles
from .token_grid import TokenGrid

KERNEL_HEAD_DIMS = (16, 32, 64, 80, 96, 128)
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def is_installed() -> bool:
    """Whether there is a Triton to compile the kernels with."""
    return importlib.util.find_spec("triton") is not None


def is_interpreted() -> bool:
    """Whether the kernels run as numpy code on the CPU, for tests: TRITON_INTERPRET=1 before they are imported."""
    if "TRITON_INTERPRET" not in os.environ:
        return False
    from .attention_triton_launch import IS_INTERPRETED

    return IS_INTERPRETED


def _missing(device: torch.device) -> str | None:
    """What keeps the kernels from running on a device; `None` where they run."""
    if not is_installed():
        return "Triton is not installed (on Linux: pip install triton)"
    if is_interpreted():
        return None
    if device.type != "cuda":
        reason = f"the tensors are on {device.type}" if torch.cuda.is_available() else "there is no CUDA device"
        return f"the kernel needs CUDA, and {reason}"
    if torch.version.hip:
        return "the kernel was written for NVIDIA GPUs, and this is a ROCm build of torch"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the kernel needs compute capability 8.0, and {device} has {capability[0]}.{capability[1]}"
    return None


def _unwanted(device: torch.device) -> str | None:
    """Interpreted kernels are for tests: far slower than any other backend."""
    return "kernels are interpreted" if is_interpreted() else None


def _check_query(query: torch.Tensor) -> None:
    if query.shape[-1] not in KERNEL_HEAD_DIMS:
        raise ValueError(
            f"query has head_dim {query.shape[-1]}: the Triton kernel takes one of {KERNEL_HEAD_DIMS}. For others "
            "choose the backend 'sdpa_tiles', which runs on any device."
        )
    if query.dtype not in KERNEL_DTYPES:
        raise ValueError(
            f"query is {query.dtype}: the Triton kernel takes one of {KERNEL_DTYPES}. For others choose the backend "
            "'sdpa_tiles', which runs on any device."
        )


def _prepare(grid: TokenGrid) -> PreparedGrid:
    table, image_offsets, *numbers, weights, context = attention_tiles(grid)
    optional = [*([] if weights is None else [weights]), *(context or [])]
    return PreparedGrid([table, image_offsets, *optional], [*numbers, int(weights is not None)])


def prepared_tiles(prepared: PreparedGrid) -> AttentionTiles:
    """The tiles that were prepared."""
    table, image_offsets, *optional = prepared.tensors
    *numbers, has_weights = prepared.numbers
    weights = optional.pop(0) if has_weights else None
    return AttentionTiles(table, image_offsets, *numbers, weights, ContextTables(*optional) if optional else None)


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prepared: PreparedGrid,
    scale: float,
    dropout: float,
    generator: torch.Generator | None,
    context: LayerContext | StripContext | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from .attention_triton_launch import launch_block_attention

    return launch_block_attention(query, key, value, prepared_tiles(prepared), scale, context)


def _forward_strip(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prepared: PreparedGrid,
    scale: float,
    context: StripContext | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    output, logsumexp = _forward(query, key, value, prepared, scale, 0.0, None, context)
    return output, logsumexp[:, : prepared_tiles(prepared).num_global_tokens] * math.log(2.0)


def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    prepared: PreparedGrid,
    scale: float,
    dropout: float,
    generator: torch.Generator | None,
    context: LayerContext | None = None,
) -> tuple[torch.Tensor, ...]:
    from .attention_triton_launch import launch_block_attention_backward

    tiles = prepared_tiles(prepared)
    return launch_block_attention_backward(grad_output, query, key, value, output, logsumexp, tiles, scale, context)


TRITON = AttentionBackend(
    name="triton",
    description="Triton kernel",
    device_type="cuda",
    missing=_missing,
    unwanted=_unwanted,
    check_query=_check_query,
    prepare=_prepare,
    forward=_forward,
    backward=_backward,
    forward_strip=_forward_strip,
    has_dropout=False,
    takes_key_weights=True,
    returns_logsumexp=True,
    strips_take_context=True,
)
