# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Times block-local attention against dense and masked attention on the same queries, keys and values."""

import dataclasses
import logging
import math
import statistics
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from tqdm import tqdm

from ..block_attention import block_attention, block_attention_backend
from ..block_attention_reference import attention_pattern, naive_block_attention
from ..token_grid import TokenGrid
from .cost import attention_pairs, mean_keys_per_query
from .measure import describe_run, measured

logger = logging.getLogger(__name__)

CONTENDERS = ("block_sparse", "sdpa_dense", "flex_attention", "reference")
# Largest difference to float64 attention, relative to its largest output.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
CHECKED_QUERIES = 64
MOST_REFERENCE_TOKENS = 4096
BACKWARD_FACTOR = 2.5  # five matrix products against two

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One problem: a square grid of tokens, its pattern, and how many of the tokens are kept.

    Attributes:
        tokens: patch tokens of the full grid, rounded down to a square.
        window_size: tokens per block side.
        kept_share: 1.0, or the share that is kept at random.
        heads: attention heads.
        head_dim: width of each.
        dtype: of queries, keys and values.
        device: where it runs.
        global_tokens: G.
    """

    tokens: int
    window_size: int
    kept_share: float
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: str
    global_tokens: int = 9

    def grid(self) -> TokenGrid:
        """The tokens, pruned at random with a fixed seed."""
        side = math.isqrt(self.tokens)
        grid = TokenGrid.create(
            [(side, side)],
            num_global_tokens=self.global_tokens,
            window_size=self.window_size,
            device=self.device,
        )
        if self.kept_share == 1.0:
            return grid
        generator = torch.Generator().manual_seed(0)
        kept = torch.randperm(side * side, generator=generator)[: round(self.kept_share * side * side)]
        return grid.select(kept.sort().values.to(self.device), [len(kept)])

    def states(self, grid: TokenGrid) -> list[torch.Tensor]:
        """Query, key and value, (1, heads, tokens, head_dim): views of one projection, as in the model."""
        generator = torch.Generator().manual_seed(1)
        shape = (1, grid.num_tokens, 3, self.heads, self.head_dim)
        qkv = torch.randn(shape, generator=generator, dtype=torch.float32).to(self.device, self.dtype)
        return [states.transpose(1, 2) for states in qkv.unbind(2)]


def contender(name: str, grid: TokenGrid) -> tuple[Attention, int] | None:
    """The attention of that name and its query-key pairs; `None` where the problem is too large for it."""
    pairs = attention_pairs(grid)
    if name == "block_sparse":
        return lambda query, key, value: block_attention(query, key, value, grid), pairs
    if name == "sdpa_dense":
        return torch.nn.functional.scaled_dot_product_attention, grid.num_tokens**2
    if name == "flex_attention":
        compiled = torch.compile(flex_attention)
        mask = _flex_mask(grid)
        return lambda query, key, value: compiled(query, key, value, block_mask=mask), pairs
    if grid.num_tokens > MOST_REFERENCE_TOKENS:
        return None

    def reference(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        packed = [states[0].transpose(0, 1) for states in (query, key, value)]
        return naive_block_attention(*packed, grid, query.shape[-1] ** -0.5).transpose(0, 1)[None]

    return reference, pairs


def _flex_mask(grid: TokenGrid) -> torch.nn.attention.flex_attention.BlockMask:
    """The pattern as a BlockMask, from block coordinates per token: a dense mask of 60k tokens would not fit."""
    window = grid.window_size or max(grid.canvas_size)
    far = torch.full((grid.num_global_tokens,), -1, device=grid.device)
    block_rows = torch.cat([far, grid.rows // window])
    block_columns = torch.cat([far, grid.columns // window])

    def is_seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        is_near_row = (block_rows[query] - block_rows[key]).abs() <= grid.neighbor_radius
        is_near_column = (block_columns[query] - block_columns[key]).abs() <= grid.neighbor_radius
        return (is_near_row & is_near_column) | (block_rows[query] < 0) | (block_rows[key] < 0)

    return create_block_mask(is_seen, None, None, grid.num_tokens, grid.num_tokens, device=grid.device, _compile=True)


def check(attend: Attention, name: str, case: AttentionCase, grid: TokenGrid) -> float:
    """Compares some queries with float64 attention.

    Returns:
        The largest difference, relative to the largest output.

    Raises:
        ValueError: it is beyond the dtype's tolerance; such a contender is not timed.
    """
    query, key, value = case.states(grid)
    with torch.no_grad():
        computed = attend(query, key, value)
    generator = torch.Generator().manual_seed(2)
    chosen = torch.randperm(grid.num_tokens, generator=generator)[:CHECKED_QUERIES].to(case.device)
    chosen[0] = 0  # a global query
    logits = query[0, :, chosen].double() @ key[0].double().transpose(-1, -2) * case.head_dim**-0.5
    if name != "sdpa_dense":
        logits = logits.masked_fill(~_pattern_rows(grid, chosen), -torch.inf)
    expected = logits.softmax(dim=-1) @ value[0].double()
    difference = ((computed[0, :, chosen] - expected).abs().max() / expected.abs().max()).item()
    if not difference <= TOLERANCES[case.dtype]:
        raise ValueError(f"{name} differs from float64 attention by {difference:.1e}: not timed.")
    return difference


def _pattern_rows(grid: TokenGrid, queries: torch.Tensor) -> torch.Tensor:
    """(queries, tokens) rows of the pattern of one image."""
    if grid.num_tokens <= MOST_REFERENCE_TOKENS:
        return attention_pattern(grid)[0, queries]
    window = grid.window_size or max(grid.canvas_size)
    far = torch.full((grid.num_global_tokens,), -1, device=grid.device)
    rows, columns = torch.cat([far, grid.rows // window]), torch.cat([far, grid.columns // window])
    near = (rows[queries, None] - rows).abs() <= grid.neighbor_radius
    near &= (columns[queries, None] - columns).abs() <= grid.neighbor_radius
    return near | (rows[queries, None] < 0) | (rows < 0)


def time_case(case: AttentionCase, names: list[str], repeats: int, with_backward: bool) -> list[dict[str, object]]:
    """Checks and times each contender on one problem.

    Args:
        case: the problem.
        names: of `CONTENDERS`.
        repeats: timed calls; medians and quartiles are recorded.
        with_backward: whether to time forward and backward together, too.

    Returns:
        One row per contender and direction.
    """
    grid = case.grid()
    rows: list[dict[str, object]] = []
    for name in tqdm(names, desc=f"{grid.num_tokens:,} tokens, w = {case.window_size}", leave=False):
        made = contender(name, grid)
        if made is None:
            logger.info("%s: left out at %s tokens, it is quadratic in memory", name, f"{grid.num_tokens:,}")
            continue
        attend, pairs = made
        difference = check(attend, name, case, grid)
        flops = 4.0 * pairs * case.heads * case.head_dim
        for direction in ("forward", "forward+backward") if with_backward else ("forward",):
            has_backward = direction != "forward"
            seconds, peak = _time(attend, case, grid, repeats, has_backward)
            useful = flops * (1 + BACKWARD_FACTOR if has_backward else 1)
            rows.append(_row(case, grid, name, direction, seconds, peak, useful, difference))
    return rows


def _time(
    attend: Attention, case: AttentionCase, grid: TokenGrid, repeats: int, with_backward: bool
) -> tuple[list[float], int]:
    states = [tensor.detach().requires_grad_(with_backward) for tensor in case.states(grid)]
    seconds, peak = [], 0
    for repeat in range(repeats + 1):  # the first call compiles and warms up
        with torch.set_grad_enabled(with_backward), measured(case.device) as measurement:
            output = attend(*states)
            if with_backward:
                torch.autograd.grad(output, states, torch.ones_like(output))
        peak = max(peak, measurement.peak_bytes)
        if repeat > 0:
            seconds.append(measurement.seconds)
    return seconds, peak


def _row(
    case: AttentionCase,
    grid: TokenGrid,
    name: str,
    direction: str,
    seconds: list[float],
    peak: int,
    useful: float,
    difference: float,
) -> dict[str, object]:
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
    median = statistics.median(seconds)
    return {
        "attention": name,
        "backend": block_attention_backend(case.device) if name == "block_sparse" else "",
        "direction": direction,
        "tokens": grid.num_tokens,
        "window_size": case.window_size,
        "kept_share": case.kept_share,
        "keys_per_query": round(mean_keys_per_query(grid), 1),
        "heads": case.heads,
        "head_dim": case.head_dim,
        "dtype": str(case.dtype).removeprefix("torch."),
        "useful_tflop_per_second": round(useful / median / 1e12, 4),
        "seconds_median": round(median, 6),
        "seconds_lower_quartile": round(quartiles[0], 6),
        "seconds_upper_quartile": round(quartiles[2], 6),
        "repeats": len(seconds),
        "peak_gib": round(peak / 2**30, 3),
        "difference_to_float64": f"{difference:.1e}",
        **describe_run(case.device),
    }
