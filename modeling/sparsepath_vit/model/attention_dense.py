# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The attention pattern as the dense implementations of Transformers take it: "eager", "sdpa" and "flex_attention".

They compute what `attention_specification.py` says, with memory or time quadratic in the number of tokens.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .attention_specification import attention_bias, attention_pattern
from .context_tokens import ContextTokens
from .device_memory import warn_if_memory_is_short
from .mean_query_correction import add_correction
from .token_grid import TokenGrid


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
    grid: TokenGrid, implementation: str, num_heads: int, dtype: torch.dtype, context: ContextTokens | None = None
) -> torch.Tensor | BlockMask | None:
    """The pattern in the form a dense attention implementation takes.

    Args:
        grid: where the tokens are.
        implementation: "eager", "sdpa" or "flex_attention".
        num_heads: heads, for the memory the implementation will need.
        dtype: of the attention.
        context: the context tokens of the layer.

    Returns:
        `None` where every token sees all others, else an additive (batch, 1, tokens, tokens) mask for "eager", a bool
        mask for "sdpa", a BlockMask for "flex_attention". Where keys have weights, an additive mask of at least
        float32 for all of them.
    """
    batch, tokens = grid.batch_shape
    is_needed = grid.weighs_keys or not (grid.is_dense and grid.is_uniform)
    warn_if_memory_is_short(implementation, batch, tokens, num_heads, dtype, is_needed, grid.device)
    if not is_needed:
        return None
    if grid.weighs_keys:
        bias = attention_bias(grid, torch.promote_types(dtype, torch.float32), context)
        return bias[:, None]  # the same for all heads
    pattern = attention_pattern(grid)
    if implementation == "flex_attention":

        def is_seen(image: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return pattern[image, query, key]

        return create_block_mask(is_seen, batch, None, tokens, tokens, device=grid.device)
    pattern = pattern[:, None]  # the same for all heads
    if implementation == "sdpa":
        return pattern
    return torch.zeros(pattern.shape, dtype=dtype, device=grid.device).masked_fill(~pattern, torch.finfo(dtype).min)


def dense_stratified_attention(
    implementation: str,
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: TokenGrid,
    context: ContextTokens,
    scaling: float,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Stratified attention by a dense implementation, which is called twice: for the queries and for the correction.

    Args:
        implementation: "eager", "sdpa" or "flex_attention".
        attend: the function of that name.
        module: the attention module.
        query, key, value: (batch, heads, tokens, head_dim).
        grid: where the tokens are.
        context: the context tokens of the layer.
        scaling: factor on the logits.
        dropout: share of attention probabilities set to zero in training; the correction has none.

    Returns:
        (batch, tokens, heads, head_dim), and the probabilities (batch, heads, query, key) before the correction, of
        "eager" only.
    """
    mask = dense_attention_mask(grid, implementation, query.shape[1], query.dtype, context)
    attended, weights = attend(module, query, key, value, mask, scaling=scaling, dropout=dropout)

    def attend_from(query: torch.Tensor) -> torch.Tensor:
        return attend(module, query, key, value, mask, scaling=scaling, dropout=0.0)[0].transpose(1, 2)

    return add_correction(attended.transpose(1, 2), query, grid, attend_from).transpose(1, 2), weights
