# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Block-local attention: the public operation, the choice of its backend, and its place in Transformers.

`block_attention` validates its arguments and runs a `torch.library` operator, so that `torch.compile` sees one node
with shapes and gradients. The operator runs on the backend chosen by `set_block_attention_backend` or the environment
variable SPARSEPATH_ATTENTION_BACKEND. Importing this file registers it with Transformers as the attention
implementation "block_sparse".
"""

import os

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from .attention_sdpa_tiles import tiled_block_attention, tiled_block_attention_backward
from .attention_specification import naive_block_attention
from .attention_triton_tables import AttentionTiles, attention_tile_size, attention_tiles, check_states
from .token_grid import TokenGrid

try:
    from .attention_triton import (
        IS_INTERPRETED,
        check_kernel_states,
        launch_block_attention,
        launch_block_attention_backward,
    )

    _HAS_TRITON = True
except ImportError:
    _HAS_TRITON = IS_INTERPRETED = False

logger = logging.get_logger(__name__)

ATTENTION_NAME = "block_sparse"
BACKENDS = ("auto", "triton", "cpu", "reference")
BACKEND_VARIABLE = "SPARSEPATH_ATTENTION_BACKEND"

_chosen_backend = os.environ.get(BACKEND_VARIABLE, "auto")


def set_block_attention_backend(backend: str) -> None:
    """Chooses what runs `block_sparse` attention in this process, over SPARSEPATH_ATTENTION_BACKEND.

    Args:
        backend: "auto" (the fastest that runs on the tensors' device), "triton" (the kernel), "cpu" (tiles of torch
            SDPA calls, on any device) or "reference" (the naive specification; quadratic).

    Raises:
        ValueError: an unknown backend, or "triton" where it cannot run.
    """
    global _chosen_backend
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: choose one of {', '.join(map(repr, BACKENDS))}.")
    if backend == "triton":
        missing = _missing_for_kernel(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        if missing is not None:
            raise ValueError(f"backend='triton' is unavailable: {missing}. Choose 'auto' or 'cpu'.")
    _chosen_backend = backend


def block_attention_backend(device: torch.device | str) -> str:
    """The backend that runs `block_sparse` on a device: "triton", "cpu" or "reference".

    Raises:
        ValueError: SPARSEPATH_ATTENTION_BACKEND holds no backend, or "triton" was chosen and cannot run on the device.
    """
    if _chosen_backend not in BACKENDS:
        raise ValueError(
            f"{BACKEND_VARIABLE}={_chosen_backend!r} is unknown: set it to one of {', '.join(BACKENDS)}, or unset it."
        )
    missing = _missing_for_kernel(torch.device(device))
    if _chosen_backend == "triton" and missing is not None:
        raise ValueError(
            f"The attention backend 'triton' was chosen and cannot run on {device}: {missing}. Move the model, or "
            f"choose 'auto' with set_block_attention_backend or {BACKEND_VARIABLE}."
        )
    if _chosen_backend != "auto":
        return _chosen_backend
    # Interpreted kernels are for tests: far slower than the tiles.
    return "triton" if missing is None and not IS_INTERPRETED else "cpu"


def describe_block_attention_backend(device: torch.device | str) -> str:
    """Which backend would run `block_sparse` on a device, and why, in one line."""
    try:
        backend = block_attention_backend(device)
    except ValueError as error:
        return f"none: {error}"
    names = {"triton": "Triton kernel", "cpu": "tiles of torch SDPA calls", "reference": "naive reference, quadratic"}
    if _chosen_backend != "auto":
        return f"{backend} ({names[backend]}): chosen by {BACKEND_VARIABLE} or set_block_attention_backend"
    missing = "kernels are interpreted" if IS_INTERPRETED else _missing_for_kernel(torch.device(device))
    return f"{backend} ({names[backend]}): {missing or 'the kernel runs here'}"


@torch.compiler.assume_constant_result
def _missing_for_kernel(device: torch.device) -> str | None:
    """What keeps the Triton kernel from running on a device; `None` where it runs."""
    if not _HAS_TRITON:
        return "Triton is not installed (on Linux: pip install triton)"
    if IS_INTERPRETED:
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


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: TokenGrid,
    *,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of every token to the global tokens and to the blocks around its own.

    One softmax over all keys of a query (arXiv 2601.12150). Where the neighbourhood covers the grid it equals
    `torch.nn.functional.scaled_dot_product_attention` without a mask.

    Args:
        query, key, value: (batch, heads, tokens, head_dim) with (batch, tokens) = `grid.batch_shape`, in the grid's
            order: global tokens, then patch tokens block by block.
        grid: where the tokens are.
        scale: positive factor on the logits, head_dim ** -0.5 by default.
        dropout: share of attention probabilities set to zero, in [0, 1). The kernel has none: above 0 the tiles run.

    Returns:
        (batch, heads, tokens, head_dim). Bitwise reproducible on the same machine.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, the grid or the backend.
    """
    scale = check_states(query, key, value, grid, scale)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout!r} is not possible: it must lie in [0, 1).")
    batch, heads, tokens, head_dim = query.shape
    backend = _backend_for(query, dropout)
    # (batch, heads, tokens, head_dim) -> (batch * tokens, heads, head_dim): a view of a fused projection
    packed = [states.transpose(1, 2).reshape(-1, heads, head_dim) for states in (query, key, value)]
    if backend == "reference":
        output = naive_block_attention(*packed, grid, scale, dropout)
    else:
        # A tensor, since a number would be compiled in; only with dropout, since a tensor of the host keeps a compiled
        # graph from becoming a CUDA graph.
        seed = torch.randint(2**62, ()) if dropout > 0.0 else None
        output, _ = _block_attention(*packed, *_flatten_grid(grid, backend), scale, dropout, seed, backend)
    return output.view(batch, tokens, heads, head_dim).transpose(1, 2)


def _backend_for(query: torch.Tensor, dropout: float) -> str:
    """The backend of one call; says so where it is not the one a user would expect."""
    backend = block_attention_backend(query.device)
    if backend == "triton" and dropout == 0.0:
        check_kernel_states(query)
        return backend
    if not torch.compiler.is_compiling():
        if backend == "triton":
            logger.warning_once("block_sparse: the Triton kernel has no dropout; tiles of SDPA calls run instead.")
        elif query.is_cuda and _chosen_backend == "auto":
            missing = _missing_for_kernel(query.device)
            logger.warning_once(f"block_sparse: {missing}; tiles of SDPA calls run instead, correct but slower.")
        elif _chosen_backend == "auto":
            logger.info_once("block_sparse: no CUDA, using tiles of SDPA calls.")
    return "cpu" if backend == "triton" else backend


_GRID_TENSORS = ("rows", "columns", "blocks", "block_offsets", "entry_shifts")


def _flatten_grid(grid: TokenGrid, backend: str) -> tuple[list[torch.Tensor], list[int], list[int], int, int, int]:
    """The grid as arguments an operator can take: the kernel's tiles or all tensors; window size 0 means `None`."""
    if backend == "triton":
        tiles = attention_tiles(grid)
        tensors = [tiles.table, tiles.block_columns, tiles.image_offsets]
    else:
        tensors = [getattr(grid, name) for name in _GRID_TENSORS]
    return (
        tensors,
        [side for size in grid.grid_sizes for side in size],
        list(grid.counts),
        grid.num_global_tokens,
        grid.window_size or 0,
        grid.neighbor_radius,
    )


def _unflatten_grid(
    grid_tensors: list[torch.Tensor],
    grid_sizes: list[int],
    counts: list[int],
    num_global_tokens: int,
    window_size: int,
    neighbor_radius: int,
) -> TokenGrid:
    return TokenGrid(
        grid_sizes=tuple(zip(grid_sizes[::2], grid_sizes[1::2], strict=True)),
        counts=tuple(counts),
        num_global_tokens=num_global_tokens,
        window_size=window_size or None,
        neighbor_radius=neighbor_radius,
        **dict(zip(_GRID_TENSORS, grid_tensors, strict=True)),
    )


def _generator(seed: torch.Tensor | None, device: torch.device) -> torch.Generator | None:
    """Draws the same dropout in the forward and in its recomputation, and leaves the global generator untouched."""
    return None if seed is None else torch.Generator(device).manual_seed(int(seed))


@torch.library.custom_op("sparsepath_vit::block_attention", mutates_args=())
def _block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid_tensors: list[torch.Tensor],
    grid_sizes: list[int],
    counts: list[int],
    num_global_tokens: int,
    window_size: int,
    neighbor_radius: int,
    scale: float,
    dropout: float,
    seed: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the base-2 log-sum-exps the kernel's backward needs; the tiles recompute theirs."""
    if backend == "triton":
        tile_size = attention_tile_size(window_size or None)
        tiles = AttentionTiles(*grid_tensors, tile_size, num_global_tokens, neighbor_radius)
        return launch_block_attention(query, key, value, tiles, scale)
    grid = _unflatten_grid(grid_tensors, grid_sizes, counts, num_global_tokens, window_size, neighbor_radius)
    generator = _generator(seed, query.device)
    output = tiled_block_attention(query, key, value, grid, scale, dropout, generator)
    return output, query.new_empty(0, dtype=torch.float32)


@_block_attention.register_fake
def _block_attention_fake(
    query: torch.Tensor, *arguments: object, backend: str = "", **keywords: object
) -> tuple[torch.Tensor, torch.Tensor]:
    backend = backend or arguments[-1]
    shape = (query.shape[1], query.shape[0]) if backend == "triton" else (0,)
    return query.new_empty(query.shape), query.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("sparsepath_vit::block_attention_backward", mutates_args=())
def _block_attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    grid_tensors: list[torch.Tensor],
    grid_sizes: list[int],
    counts: list[int],
    num_global_tokens: int,
    window_size: int,
    neighbor_radius: int,
    scale: float,
    dropout: float,
    seed: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if backend == "triton":
        tile_size = attention_tile_size(window_size or None)
        tiles = AttentionTiles(*grid_tensors, tile_size, num_global_tokens, neighbor_radius)
        return launch_block_attention_backward(grad_output, query, key, value, output, logsumexp, tiles, scale)
    grid = _unflatten_grid(grid_tensors, grid_sizes, counts, num_global_tokens, window_size, neighbor_radius)
    generator = _generator(seed, query.device)
    return tiled_block_attention_backward(grad_output, query, key, value, grid, scale, dropout, generator)


@_block_attention_backward.register_fake
def _block_attention_backward_fake(
    grad_output: torch.Tensor, query: torch.Tensor, *arguments: object, **keywords: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape), query.new_empty(query.shape)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]
) -> None:
    query, key, value, grid_tensors, *settings, seed, backend = inputs
    ctx.save_for_backward(query, key, value, *output, seed, *grid_tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.settings, ctx.backend = settings, backend


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad_output: torch.Tensor, _: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    query, key, value, output, logsumexp, seed, *grid_tensors = ctx.saved_tensors
    gradients = _block_attention_backward(
        grad_output, query, key, value, output, logsumexp, grid_tensors, *ctx.settings, seed, ctx.backend
    )
    return (*gradients, [None] * len(grid_tensors), *[None] * (len(ctx.settings) + 2))


_block_attention.register_autograd(_backward, setup_context=_setup_context)


def block_sparse_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    token_grid: TokenGrid | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """`block_attention` with the signature Transformers' `AttentionInterface` asks for.

    Args:
        module: the attention module; unused.
        query, key, value: (batch, heads, tokens, head_dim).
        attention_mask: must be `None`: the grid says which tokens are present.
        scaling: factor on the logits.
        dropout: share of attention probabilities set to zero.
        token_grid: where the tokens are.
        **kwargs: arguments of other implementations.

    Returns:
        (batch, tokens, heads, head_dim), and `None` in place of attention weights.

    Raises:
        ValueError: a mask was given, or no grid.
    """
    if token_grid is None:
        raise ValueError(
            "token_grid is missing: block_sparse attention needs a TokenGrid that says where the tokens are. "
            'For models other than SparsePathViT use attn_implementation="sdpa".'
        )
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} was given beside token_grid: block_sparse takes "
            "None. Say which tokens are absent with patch_mask, from which the grid is made."
        )
    output = block_attention(query, key, value, token_grid, scale=scaling, dropout=dropout)
    return output.transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, block_sparse_attention_forward)
# Without a mask of its own a padding mask would be dropped silently; with it, the function above refuses it.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
