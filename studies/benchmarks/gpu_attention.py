# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Steps of the acceptance that time attention alone: ours, dense, and what else computes its pattern."""

from collections.abc import Iterator

import torch

from .acceptance import Finding, Scale, finding_of, matrix_rate
from .attention import DIRECTIONS, AttentionCase, time_case

DENSE_TOKENS_UP_TO = 60_025
PEER_TOKENS = 60_025
LEAST_SHARE_OF_ATTENTION = 0.3  # of the rate of a large matrix product
# Milliseconds on an H100 that the page of NATTEN's profiler shows (natten.org/profiler), reordering of tokens included,
# of windows of 80 x 80: moved by a token, and by 16 tokens, which away from the border is our pattern.
PUBLISHED_SLIDING, PUBLISHED_STRIDED = 18.6, 10.6


def _case(scale: Scale, tokens: int, window_size: int, kept_share: float) -> AttentionCase:
    settings = (scale.heads, scale.head_dim, scale.dtype, scale.device)
    return AttentionCase(tokens, window_size, kept_share, *settings, is_clustered=True)


def attention_speed(scale: Scale) -> Iterator[Finding]:
    """Attention alone, ours and dense."""
    window = scale.windows[0]
    problems = [(tokens, size, 1.0) for tokens in scale.tokens for size in scale.windows]
    problems += [(tokens, window, 0.4) for tokens in scale.tokens if tokens <= 240_100]
    for tokens, window_size, kept_share in problems:
        case = _case(scale, tokens, window_size, kept_share)
        peers = ["block_sparse"]
        if window_size == window and kept_share == 1.0 and tokens <= DENSE_TOKENS_UP_TO:
            peers.append("sdpa_dense")
        for name in peers:
            yield _finding(name, case, scale, DIRECTIONS if tokens < 500_000 else DIRECTIONS[:1])


def attention_peers(scale: Scale) -> Iterator[Finding]:
    """Other ways to compute the pattern, where they are installed; compiling FlexAttention takes long.

    Forward and backward are findings of their own: a backward that does not compile leaves the forward's time.
    """
    flex = "sdpa_dense" if scale.is_rehearsal else "flex_attention"
    tokens = min(PEER_TOKENS, scale.tokens[-1])
    full, pruned = (_case(scale, tokens, scale.windows[0], kept_share) for kept_share in (1.0, 0.4))
    yield _finding(flex, full, scale, DIRECTIONS[:1])
    yield _finding(flex, full, scale, DIRECTIONS[1:])
    yield from published_problem(scale)
    yield _finding("natten", full, scale, DIRECTIONS)
    yield _finding(flex, pruned, scale, DIRECTIONS[:1])


def published_problem(scale: Scale) -> Iterator[Finding]:
    """The problem that NATTEN publishes times of, with one global token beside: ours, and NATTEN itself."""
    tokens, window_size, radius, head_dim = scale.published
    settings = (tokens, window_size, 1.0, scale.heads, head_dim, scale.dtype, scale.device)
    case = AttentionCase(*settings, global_tokens=1, neighbor_radius=radius)
    side = window_size * (2 * radius + 1)
    for name in ("block_sparse", "natten", "natten_sliding"):
        moves = "a token" if name == "natten_sliding" else f"{window_size} tokens"
        title = f"{name}, published problem: {tokens:,} tokens, head_dim {head_dim}, window of {side}, moved by {moves}"
        yield _finding(name, case, scale, DIRECTIONS[:1], title)


def _finding(
    name: str, case: AttentionCase, scale: Scale, directions: tuple[str, ...], title: str | None = None
) -> Finding:
    """One attention on one problem."""
    kept = f"{case.kept_share:.0%} kept"
    title = title or f"{name}, {case.tokens:,} tokens, w = {case.window_size}, {kept}, {' and '.join(directions)}"

    def measure() -> Finding:
        rows = time_case(case, [name], scale.repeats, directions)
        if not rows:
            return Finding(title, "left out: not installed, or too large")
        rate = matrix_rate(scale) / 1e12
        for row in rows:
            row["share_of_matrix_rate"] = round(row["useful_tflop_per_second"] / rate, 3)
        text = "; ".join(
            f"{row['direction']} {1000 * row['seconds_median']:.2f} ms, {row['useful_tflop_per_second']:.0f} TFLOP/s "
            f"({row['share_of_matrix_rate']:.0%})"
            for row in rows
        )
        return Finding(title, text, *attention_target(name, case, rows[0]), tuple(rows))

    return finding_of(title, measure, scale)


def attention_target(name: str, case: AttentionCase, row: dict[str, object]) -> tuple[str, bool | None]:
    """What ours is asked for, and whether it gives it: nothing of small problems, nor of pruned ones."""
    if name != "block_sparse" or case.kept_share < 1.0 or case.tokens < 50_000:
        return "", None
    if case.neighbor_radius == 1:
        target = f"forward {LEAST_SHARE_OF_ATTENTION:.0%}"
        return target, row["share_of_matrix_rate"] >= LEAST_SHARE_OF_ATTENTION
    target = f"NATTEN publishes {PUBLISHED_SLIDING} ms on an H100, {PUBLISHED_STRIDED} moved as ours"
    if case.device != "cuda" or not torch.cuda.get_device_name().startswith(("NVIDIA H100", "NVIDIA H200")):
        return target, None
    return target, 1000 * row["seconds_median"] <= PUBLISHED_SLIDING
