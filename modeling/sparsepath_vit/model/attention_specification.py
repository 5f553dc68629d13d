# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The specification of block-local and stratified attention: a number added to every logit and a plain softmax.

Everything else in this package that computes attention has to give these numbers. It needs memory and time quadratic in
the number of tokens. `attention_dense.py` gives the same pattern to the dense implementations of Transformers.
"""

import torch
from torch import nn

from .attention_precision import without_autocast
from .context_tokens import ContextTokens
from .mean_query_correction import add_correction
from .token_grid import TokenGrid


def attention_pattern(grid: TokenGrid, context: ContextTokens | None = None) -> torch.Tensor:
    """Which key each query sees.

    A patch token sees the global tokens, every present patch token whose block row and block column both differ from
    its own by at most `neighbor_radius`, and every context token outside these blocks; a global token sees all tokens;
    nobody sees another image.

    Args:
        grid: where the tokens are.
        context: the context tokens of a layer.

    Returns:
        (batch, tokens, tokens) bool with (batch, tokens) = `grid.batch_shape`; True where query (second axis) sees key.
    """
    is_seen, context_weights = _near_and_context(grid, context)
    return is_seen if context_weights is None else is_seen | (context_weights > 0)


def attention_bias(grid: TokenGrid, dtype: torch.dtype, context: ContextTokens | None = None) -> torch.Tensor:
    """What is added to the logit of each query and key.

    The logarithm of what the key counts for: its own weight in the query's neighbourhood, what it stands for as a
    context token outside of it, -inf where the query does not see it.

    Args:
        grid: where the tokens are.
        dtype: of the result.
        context: the context tokens of a layer.

    Returns:
        (batch, tokens, tokens) with (batch, tokens) = `grid.batch_shape`.
    """
    is_seen, context_weights = _near_and_context(grid, context)
    own_weights = torch.ones(grid.num_tokens, dtype=torch.int32, device=grid.device)
    if grid.weights is not None:
        own_weights[grid.patch_indices()] = grid.weights.to(torch.int32)
    weights = own_weights.view(grid.batch_shape)[:, None, :] * is_seen  # (batch, query, key)
    if context_weights is not None:
        weights = weights + context_weights
    return weights.to(dtype).log()


def _near_and_context(grid: TokenGrid, context: ContextTokens | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which key each query sees for itself, and the weight of each that it sees as a context token; 0 for all others.

    Returns:
        (batch, tokens, tokens) bool, and (batch, tokens, tokens) int64; `None` in its place without context tokens.
    """
    patch_indices = grid.patch_indices()

    def per_token(values: torch.Tensor, global_value: int) -> torch.Tensor:
        packed = torch.full((grid.num_tokens,), global_value, dtype=torch.int32, device=grid.device)
        packed[patch_indices] = values.to(torch.int32)
        return packed.view(grid.batch_shape)  # (batch, tokens)

    window = max(grid.canvas_size) if grid.window_size is None else grid.window_size
    block_rows = per_token(grid.rows // window, -1)
    block_columns = per_token(grid.columns // window, -1)
    is_global = block_rows < 0
    images = grid.images_of_tokens().view(grid.batch_shape)

    def differ_at_most(values: torch.Tensor, limit: int) -> torch.Tensor:
        return (values[:, :, None] - values[:, None, :]).abs() <= limit  # (batch, query, key)

    is_near = differ_at_most(block_rows, grid.neighbor_radius) & differ_at_most(block_columns, grid.neighbor_radius)
    is_seen = is_near | is_global[:, :, None] | is_global[:, None, :]
    is_same_image = differ_at_most(images, 0)
    if context is None:
        return is_seen & is_same_image, None
    context_weights = context.weights.new_zeros(grid.num_tokens).scatter_add(0, context.tokens, context.weights)
    context_weights = context_weights.view(grid.batch_shape)[:, None, :]
    return is_seen & is_same_image, context_weights * (~is_seen & is_same_image)


def naive_block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: TokenGrid,
    scale: float,
    dropout: float = 0.0,
    context: ContextTokens | None = None,
) -> torch.Tensor:
    """Softmax attention over the pattern, written out: one softmax over all keys of a query, weighted as they count.

    With context tokens it is corrected by the mean query.

    Args:
        query, key, value: (M, heads, head_dim) packed tokens.
        grid: where the tokens are.
        scale: factor on the logits.
        dropout: share of attention probabilities set to zero; the correction has none.
        context: the context tokens of the layer.

    Returns:
        (M, heads, head_dim).
    """
    shape = (*grid.batch_shape, *query.shape[1:])  # (batch, tokens, heads, head_dim)
    query, key, value = (states.reshape(shape).transpose(1, 2) for states in (query, key, value))
    dtype = torch.promote_types(query.dtype, torch.float32)
    bias = attention_bias(grid, dtype, context)[:, None]

    def attend(query: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        logits = query @ key.transpose(-1, -2) * scale  # (batch, heads, query, key)
        probabilities = torch.softmax(logits + bias, dim=-1, dtype=dtype)
        return nn.functional.dropout(probabilities.to(value.dtype), dropout) @ value

    with without_autocast(query.device.type):
        attended = attend(query, dropout)
        if context is not None:
            attended = add_correction(attended, query, grid, attend)
    return attended.transpose(1, 2).reshape(-1, *shape[2:])
