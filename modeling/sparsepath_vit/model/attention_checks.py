# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Whether queries, keys, values and context tokens fit each other and a grid."""

import torch

from .context_tokens import ContextTokens
from .token_grid import TokenGrid
from .token_strips import TokenStrip


def check_states(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: TokenGrid, scale: float | None
) -> float:
    """Raises a ValueError where states do not fit each other or the grid; returns the scale to use.

    Args:
        query, key, value: (batch, heads, tokens, head_dim).
        grid: where the tokens are.
        scale: factor on the logits, head_dim ** -0.5 by default.
    """
    if query.ndim != 4:
        raise ValueError(f"query has shape {tuple(query.shape)}: it takes (batch, heads, tokens, head_dim).")
    for name, states in (("key", key), ("value", value)):
        if states.shape != query.shape:
            raise ValueError(f"{name} has shape {tuple(states.shape)}: it takes the query's, {tuple(query.shape)}.")
    _check_kinds(query, key, value, grid)
    if (query.shape[0], query.shape[2]) != grid.batch_shape:
        raise ValueError(
            f"grid describes (batch, tokens) = {grid.batch_shape}, but query has shape {tuple(query.shape)}, that is "
            f"{(query.shape[0], query.shape[2])}: pass the grid these tokens were made with."
        )
    if len(grid.rows) != sum(grid.counts):
        raise ValueError(
            f"grid has {len(grid.rows)} patch tokens, but its counts {grid.counts} add up to {sum(grid.counts)}: pass "
            "TokenGrid.select the counts of the tokens it keeps."
        )
    return _checked_scale(query, scale)


def check_strip_states(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, strip: TokenStrip, scale: float | None
) -> float:
    """Raises a ValueError where states do not fit each other or the strip; returns the scale to use.

    Args:
        query: (heads, G + S, head_dim).
        key, value: (heads, M, head_dim).
        strip: where the tokens are.
        scale: factor on the logits, head_dim ** -0.5 by default.
    """
    if query.ndim != 3:
        raise ValueError(f"query has shape {tuple(query.shape)}: it takes (heads, G + S, head_dim) of one strip.")
    heads, _, head_dim = query.shape
    for name, states, tokens in (
        *(("query", query, strip.num_queries), ("key", key, strip.num_tokens)),
        ("value", value, strip.num_tokens),
    ):
        if states.shape != (heads, tokens, head_dim):
            raise ValueError(
                f"{name} has shape {tuple(states.shape)}: of this strip it takes {(heads, tokens, head_dim)}. Queries "
                "are those of the global and the own patch tokens, keys and values those of all."
            )
    _check_kinds(query, key, value, strip)
    return _checked_scale(query, scale)


def _check_kinds(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: TokenGrid) -> None:
    """Dtypes, devices and strides."""
    for name, states in (("key", key), ("value", value)):
        if states.dtype != query.dtype:
            raise ValueError(f"{name} is {states.dtype}: it takes the query's dtype, {query.dtype}.")
        if states.device != query.device:
            raise ValueError(f"{name} is on {states.device}: it takes the query's device, {query.device}.")
    for name, states in (("query", query), ("key", key), ("value", value)):
        if states.stride(-1) != 1:
            raise ValueError(
                f"{name} has strides {states.stride()}: its last dimension, head_dim, must be contiguous (stride 1). "
                "Call .contiguous() on it."
            )
    if not query.is_floating_point():
        raise ValueError(f"query is {query.dtype}: it takes a floating point dtype.")
    if grid.device != query.device:
        raise ValueError(f"grid is on {grid.device}: it takes the query's device, {query.device}.")


def _checked_scale(query: torch.Tensor, scale: float | None) -> float:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0.0:
        raise ValueError(f"scale={scale!r} is not possible: it takes a positive number.")
    return scale


def check_context(context: ContextTokens | None, grid: TokenGrid) -> None:
    """Raises a ValueError where a grid asks for context tokens and has none, or has those of another batch."""
    if context is None:
        if grid.has_context:
            raise ValueError(
                f"context is None, but the grid asks for num_context_tokens={grid.num_context_tokens}: pass "
                "draw_context_tokens(grid), or make the grid with num_context_tokens=0."
            )
    elif len(context.counts) != grid.batch_size or sum(context.counts) != len(context.tokens):
        raise ValueError(
            f"context has {len(context.tokens)} entries, {context.counts} of the images, and the grid "
            f"{grid.batch_size} images: pass the context tokens that were drawn for this grid."
        )
