# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The specification of block-local attention: a dense mask and a plain softmax.

Everything else in this package that computes attention has to give these numbers. It needs memory and time quadratic in
the number of tokens. `attention_dense.py` gives the same pattern to the dense implementations of Transformers.
"""

import torch
from torch import nn

from .attention_precision import without_autocast
from .token_grid import TokenGrid


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
    with without_autocast(query.device.type):
        logits = query @ key.transpose(-1, -2) * scale  # (batch, heads, query, key)
        logits = logits.masked_fill(~attention_pattern(grid)[:, None], -torch.inf)
        probabilities = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        probabilities = nn.functional.dropout(probabilities.to(value.dtype), dropout)
        attended = probabilities @ value
    return attended.transpose(1, 2).reshape(-1, *shape[2:])
