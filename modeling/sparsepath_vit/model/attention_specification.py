# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The specification of block-local and stratified attention: a number added to every logit and a plain softmax.

Everything else in this package that computes attention has to give these numbers. It needs memory and time quadratic in
the number of tokens. `attention_dense.py` gives the same pattern to the dense implementations of Transformers.
"""

import torch
from torch import nn

from .attention_precision import without_autocast
from .token_grid import TokenGrid


def attention_pattern(grid: TokenGrid) -> torch.Tensor:
    """Which key each query sees.

    A patch token sees the global tokens, every present patch token whose block row and block column both differ from
    its own by at most `neighbor_radius`, and every context token outside these blocks; a global token sees all tokens;
    nobody sees another image.

    Returns:
        (batch, tokens, tokens) bool with (batch, tokens) = `grid.batch_shape`; True where query (second axis) sees key.
    """
    is_seen, context_weights = _exact_and_context(grid)
    return is_seen if context_weights is None else is_seen | (context_weights > 0)


def attention_bias(grid: TokenGrid, dtype: torch.dtype) -> torch.Tensor:
    """What is added to the logit of each query and key.

    The logarithm of what the key counts for: its own weight where the query sees it exactly, the total weight of its
    cell where it is a context token outside the query's neighbourhood, -inf where the query does not see it.

    Args:
        grid: where the tokens are.
        dtype: of the result.

    Returns:
        (batch, tokens, tokens) with (batch, tokens) = `grid.batch_shape`.
    """
    is_seen, context_weights = _exact_and_context(grid)
    own_weights = torch.ones(grid.num_tokens, dtype=torch.int32, device=grid.device)
    if grid.weights is not None:
        own_weights[grid.patch_indices()] = grid.weights.to(torch.int32)
    weights = own_weights.view(grid.batch_shape)[:, None, :] * is_seen  # (batch, query, key)
    if context_weights is not None:
        weights = weights + context_weights
    return weights.to(dtype).log()


def _exact_and_context(grid: TokenGrid) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which key each query sees exactly, and the weight of each that it sees in place of a cell; 0 for all others.

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
    images = torch.bucketize(
        torch.arange(grid.num_tokens, device=grid.device),
        torch.tensor(grid.image_offsets[1:], device=grid.device),
        right=True,
    ).view(grid.batch_shape)

    def differ_at_most(values: torch.Tensor, limit: int) -> torch.Tensor:
        return (values[:, :, None] - values[:, None, :]).abs() <= limit  # (batch, query, key)

    is_near = differ_at_most(block_rows, grid.neighbor_radius) & differ_at_most(block_columns, grid.neighbor_radius)
    is_seen = is_near | is_global[:, :, None] | is_global[:, None, :]
    is_same_image = differ_at_most(images, 0)
    context = grid.context_tokens()
    if context is None:
        return is_seen & is_same_image, None
    cell_weights = context.weights.new_zeros(sum(grid.counts) + 1)  # of patch tokens; the last is of cells without any
    cell_weights = per_token(cell_weights.scatter(0, context.tokens, context.weights)[:-1], 0)
    return is_seen & is_same_image, cell_weights[:, None, :] * (~is_seen & is_same_image)


def naive_block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: TokenGrid,
    scale: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Softmax attention over the pattern, written out: one softmax over all keys of a query, weighted as they count.

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
    with without_autocast(query.device.type):
        logits = query @ key.transpose(-1, -2) * scale  # (batch, heads, query, key)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits = logits + attention_bias(grid, dtype)[:, None]
        probabilities = torch.softmax(logits, dim=-1, dtype=dtype)
        probabilities = nn.functional.dropout(probabilities.to(value.dtype), dropout)
        attended = probabilities @ value
    return attended.transpose(1, 2).reshape(-1, *shape[2:])
