# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The specification of block-local attention: a dense mask and a plain softmax.

Everything else in this package that computes attention has to give these numbers. It needs memory and time quadratic in
the number of tokens. The dense implementations of Transformers ("eager", "sdpa", "flex_attention") take the same
pattern as a mask.
"""

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers.utils import logging
from transformers.utils.generic import maybe_autocast

from .token_grid import TokenGrid

logger = logging.get_logger(__name__)


def attention_pattern(grid: TokenGrid) -> torch.Tensor:
    """Which key each query sees.

    A patch token sees the global tokens and every present patch token whose block row and block column both differ from
    its own by at most `neighbor_radius`; a global token sees all tokens; nobody sees another image.

    Returns:
        (batch, tokens, tokens) bool with (batch, tokens) = `grid.batch_shape`; True where query (second axis) sees key.
    """

    def per_token(values: torch.Tensor, global_value: int) -> torch.Tensor:
        packed = torch.full((grid.num_tokens,), global_value, dtype=torch.int32, device=grid.device)
        packed[patch_indices] = values.to(torch.int32)
        return packed.view(grid.batch_shape)  # (batch, tokens)

    patch_indices = grid.patch_indices()
    window = max(grid.canvas_size) if grid.window_size is None else grid.window_size
    block_rows = per_token(grid.rows // window, -1)
    block_columns = per_token(grid.columns // window, -1)
    is_global = block_rows < 0
    images = torch.bucketize(
        torch.arange(grid.num_tokens, device=grid.device),
        torch.tensor(grid.image_offsets[1:], device=grid.device),
        right=True,
    ).view(grid.batch_shape)

    def differ_at_most(values: torch.Tensor, limit: int) -> torch.Tensor:
        return (values[:, :, None] - values[:, None, :]).abs() <= limit  # (batch, query, key)

    is_near = differ_at_most(block_rows, grid.neighbor_radius) & differ_at_most(block_columns, grid.neighbor_radius)
    is_seen = is_near | is_global[:, :, None] | is_global[:, None, :]
    return is_seen & differ_at_most(images, 0)


def naive_block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: TokenGrid,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention over the pattern, written out.

    Args:
        query, key, value: (M, heads, head_dim) packed tokens.
        grid: where the tokens are.
        scale: factor on the logits.
        dropout: share of attention probabilities set to zero.

    Returns:
        (M, heads, head_dim).
    """
    shape = (*grid.batch_shape, *query.shape[1:])  # (batch, tokens, heads, head_dim)
    query, key, value = (states.reshape(shape).transpose(1, 2) for states in (query, key, value))
    with maybe_autocast(query.device.type, enabled=False):
        logits = query @ key.transpose(-1, -2) * scale  # (batch, heads, query, key)
        logits = logits.masked_fill(~attention_pattern(grid)[:, None], -torch.inf)
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        probabilities = nn.functional.dropout(probabilities.to(value.dtype), dropout)
        attended = probabilities @ value
    return attended.transpose(1, 2).reshape(-1, *shape[2:])


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Materialised attention, the implementation named "eager".

    Args:
        module: the attention module; its `training` switches dropout.
        query, key, value: (batch, heads, tokens, head_dim).
        attention_mask: added to the logits, see `dense_attention_mask`.
        scaling: factor on the logits, head_dim ** -0.5 by default.
        dropout: share of attention probabilities set to zero in training.
        **kwargs: arguments of other implementations.

    Returns:
        (batch, tokens, heads, head_dim), and the probabilities (batch, heads, query, key).
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = query @ key.transpose(-1, -2) * scaling  # (batch, heads, query, key)
    if attention_mask is not None:
        logits = logits + attention_mask
    weights = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def dense_attention_mask(
    grid: TokenGrid, implementation: str, num_heads: int, dtype: torch.dtype
) -> torch.Tensor | BlockMask | None:
    """The pattern in the form a dense attention implementation takes.

    Args:
        grid: where the tokens are.
        implementation: "eager", "sdpa" or "flex_attention".
        num_heads: heads, for the memory the implementation will need.
        dtype: of the attention.

    Returns:
        `None` where every token sees all others, else an additive (batch, 1, tokens, tokens) mask for "eager", a bool
        mask for "sdpa", a BlockMask for "flex_attention".
    """
    batch, tokens = grid.batch_shape
    is_needed = not (grid.is_dense and grid.is_uniform)
    warn_if_memory_is_short(implementation, batch, tokens, num_heads, dtype, is_needed, grid.device)
    if not is_needed:
        return None
    pattern = attention_pattern(grid)
    if implementation == "flex_attention":

        def is_seen(image: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return pattern[image, query, key]

        return create_block_mask(is_seen, batch, None, tokens, tokens, device=grid.device)
    pattern = pattern[:, None]  # the same for all heads
    if implementation == "sdpa":
        return pattern
    return torch.zeros(pattern.shape, dtype=dtype, device=grid.device).masked_fill(~pattern, torch.finfo(dtype).min)


def warn_if_memory_is_short(
    implementation: str,
    batch: int,
    tokens: int,
    num_heads: int,
    dtype: torch.dtype,
    is_masked: bool,
    device: torch.device,
) -> None:
    """Warns once where a dense implementation will need more memory than there is."""
    if torch.compiler.is_compiling():
        return
    pairs = batch * tokens * tokens
    needed = pairs * 4 if is_masked else 0  # the pattern and its int32 intermediates
    if implementation == "eager":
        needed += pairs * num_heads * (dtype.itemsize + 4)  # logits, and their float32 softmax
    available = available_memory(device)
    if available is not None and needed > available:
        logger.warning_once(
            f"attn_implementation={implementation!r} needs about {needed / 2**30:.1f} GiB for {tokens} x {tokens} "
            f"attention, {available / 2**30:.1f} GiB are free on {device}. Use "
            'model.set_attn_implementation("block_sparse"), a smaller image, or window_size=8.'
        )


def available_memory(device: torch.device) -> int | None:
    """Free bytes on a CUDA device or of this machine; `None` where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:  # counts the page cache, which sysconf's free pages do not
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
