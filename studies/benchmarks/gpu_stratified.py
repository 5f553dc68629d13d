# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Context tokens in the acceptance: those that its steps use, and what they cost."""

import statistics
from collections.abc import Iterator

import torch

from sparsepath_vit.model.attention_backend import LayerContext
from sparsepath_vit.model.attention_triton_launch import launch_block_attention, launch_block_attention_backward
from sparsepath_vit.model.attention_triton_tables import attention_tiles
from sparsepath_vit.model.context_tokens import ContextTokens, draw_context_tokens, exact_tokens
from sparsepath_vit.model.mean_query_correction import mean_queries
from sparsepath_vit.model.token_grid import TokenGrid
from sparsepath_vit.runtime.measure import repeatedly_measured

from .acceptance import Finding, Scale
from .attention import AttentionCase


def context_of(grid: TokenGrid) -> ContextTokens | None:
    """Context tokens of a grid, some of them exact; `None` where there are none to see."""
    if not grid.has_context:
        return None
    generator = torch.Generator(grid.device).manual_seed(5)
    scores = torch.rand(sum(grid.counts), generator=generator, device=grid.device)
    return draw_context_tokens(grid, exact_tokens(scores, grid))


def layer_context(query: torch.Tensor, grid: TokenGrid) -> LayerContext | None:
    """What the kernels take of the context tokens of (tokens, heads, head_dim) queries."""
    context = context_of(grid)
    return None if context is None else LayerContext(*context, mean_queries(query, grid))


def stratified_speed(scale: Scale) -> Iterator[Finding]:
    """Attention alone with context tokens, beside what it takes without them; compiled kernels, not the operator."""
    for tokens, kept_share in [(tokens, share) for tokens in scale.tokens for share in (1.0, 0.4) if tokens <= 240_100]:
        problem = (tokens, scale.windows[0], kept_share, scale.heads, scale.head_dim, scale.dtype, scale.device)
        rows = []
        for context_tokens in (0, scale.context_tokens):
            case = AttentionCase(*problem, is_clustered=True, context_tokens=context_tokens)
            row: dict[str, object] = {"tokens": tokens, "kept_share": kept_share, "context_tokens": context_tokens}
            rows.append(row | _stratified_seconds(case, scale))
        ratios = [rows[1][name] / rows[0][name] for name in ("seconds_forward", "seconds_backward")]
        yield Finding(
            f"{tokens:,} tokens, w = {scale.windows[0]}, {kept_share:.0%} kept, {scale.context_tokens:,} of context",
            f"forward {1000 * rows[1]['seconds_forward']:.2f} ms ({ratios[0]:.2f} x without), "
            f"backward {1000 * rows[1]['seconds_backward']:.2f} ms ({ratios[1]:.2f} x)",
            rows=tuple(rows),
        )


def _stratified_seconds(case: AttentionCase, scale: Scale) -> dict[str, float]:
    """Median seconds of the kernels of forward and backward."""
    grid = case.grid()
    states = [tensor[0].transpose(0, 1) for tensor in case.states(grid)]  # (tokens, heads, head_dim)
    settings = (attention_tiles(grid), scale.head_dim**-0.5, layer_context(states[0], grid))
    output, logsumexp = launch_block_attention(*states, *settings)
    calls = {
        "seconds_forward": lambda: launch_block_attention(*states, *settings),
        "seconds_backward": lambda: launch_block_attention_backward(output, *states, output, logsumexp, *settings),
    }
    return {
        name: statistics.median(repeatedly_measured(call, scale.device, scale.repeats)[0])
        for name, call in calls.items()
    }
