# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Times block-local attention against dense and masked attention on the same queries, keys and values."""

import dataclasses
import logging
import math
import statistics

import torch
from tqdm import tqdm

from sparsepath_vit.model.attention_backends import block_attention_backend
from sparsepath_vit.model.token_grid import TokenGrid
from sparsepath_vit.runtime.measure import describe_run, describe_seconds, repeatedly_measured

from .attention_peers import PEERS, AttentionPeer, DoesNotApplyError, attention_peer

logger = logging.getLogger(__name__)

# Largest difference to float64 attention, relative to its largest output.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
CHECKED_QUERIES = 64
DIRECTIONS = ("forward", "forward+backward")
BACKWARD_FACTOR = 2.5  # five matrix products against two


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One problem: a square grid of tokens, its pattern, and how many of the tokens are kept.

    Attributes:
        tokens: patch tokens of the full grid, rounded down to a square.
        window_size: tokens per block side.
        kept_share: 1.0, or the share that is kept.
        heads: attention heads.
        head_dim: width of each.
        dtype: of queries, keys and values.
        device: where it runs.
        global_tokens: G.
        is_clustered: whether what is kept lies together, as tissue does; otherwise it is drawn at random.
        context_tokens: at most how many; 0 for block-local attention.
        neighbor_radius: r.
    """

    tokens: int
    window_size: int
    kept_share: float
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: str
    global_tokens: int = 9
    is_clustered: bool = False
    context_tokens: int = 0
    neighbor_radius: int = 1

    def grid(self) -> TokenGrid:
        """The tokens, pruned at random with a fixed seed."""
        side = math.isqrt(self.tokens)
        grid = TokenGrid.create(
            [(side, side)],
            num_global_tokens=self.global_tokens,
            window_size=self.window_size,
            neighbor_radius=self.neighbor_radius,
            device=self.device,
            num_context_tokens=self.context_tokens,
        )
        if self.kept_share == 1.0:
            return grid
        kept = grid_places(side, self.is_clustered)[: round(self.kept_share * side * side)].to(self.device)
        # Places are in raster order, tokens in that of the grid.
        kept = grid.raster_order()[kept] if self.is_clustered else kept
        return grid.select(kept.sort().values, [len(kept)])

    def states(self, grid: TokenGrid) -> list[torch.Tensor]:
        """Query, key and value, (1, heads, tokens, head_dim): views of one projection, as in the model."""
        generator = torch.Generator(self.device).manual_seed(1)
        shape = (1, grid.num_tokens, 3, self.heads, self.head_dim)
        qkv = torch.randn(shape, generator=generator, dtype=self.dtype, device=self.device)
        return [states.transpose(1, 2) for states in qkv.unbind(2)]


def grid_places(side: int, is_clustered: bool) -> torch.Tensor:
    """(side * side,) places of a square grid, those to keep first: at random, or by a smooth random field."""
    generator = torch.Generator().manual_seed(0)
    if not is_clustered:
        return torch.randperm(side * side, generator=generator)
    coarse = torch.randn(1, 1, *[max(3, side // 16)] * 2, generator=generator)
    field = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return field.flatten().argsort(descending=True)


def check(peer: AttentionPeer, case: AttentionCase, grid: TokenGrid) -> float:
    """Compares some queries with float64 attention over the peer's pattern.

    Returns:
        The largest difference, relative to the largest output.

    Raises:
        ValueError: it is beyond the dtype's tolerance; such a peer is not timed.
    """
    query, key, value = case.states(grid)
    with torch.no_grad():
        computed = peer.attend(query, key, value)
    generator = torch.Generator().manual_seed(2)
    chosen = torch.randperm(grid.num_tokens, generator=generator)[:CHECKED_QUERIES].to(case.device)
    chosen[0] = 0  # a global query
    largest_difference = largest = 0.0
    is_seen = peer.pattern(chosen)
    for head in range(case.heads):  # all heads in float64 would not fit beside a million tokens
        logits = query[0, head, chosen].double() @ key[0, head].double().T * case.head_dim**-0.5
        expected = logits.masked_fill(~is_seen, -torch.inf).softmax(dim=-1) @ value[0, head].double()
        largest_difference = max(largest_difference, (computed[0, head, chosen] - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    difference = largest_difference / largest
    if not difference <= TOLERANCES[case.dtype]:
        raise ValueError(f"{peer.name} differs from float64 attention by {difference:.1e}: not timed.")
    return difference


def time_case(
    case: AttentionCase, names: list[str], repeats: int, directions: tuple[str, ...] = ("forward",)
) -> list[dict[str, object]]:
    """Checks and times each peer on one problem.

    Args:
        case: the problem.
        names: of `attention_peers.PEERS`; those that do not apply are left out, and the log says why.
        repeats: measurements; medians and quartiles are recorded.
        directions: of `DIRECTIONS`; a peer that has no gradients on this device is timed forward only.

    Returns:
        One row per peer and direction.

    Raises:
        ValueError: an unknown peer, or one whose numbers are wrong.
    """
    unknown = set(names) - set(PEERS)
    if unknown:
        raise ValueError(f"peers holds {', '.join(sorted(unknown))}: it takes {', '.join(PEERS)}.")
    grid = case.grid()
    rows: list[dict[str, object]] = []
    for name in tqdm(names, desc=f"{grid.num_tokens:,} tokens, w = {case.window_size}", leave=False):
        try:
            rows.extend(_time_peer(attention_peer(name, grid), case, grid, repeats, directions))
        except (DoesNotApplyError, torch.OutOfMemoryError) as reason:
            logger.info("%s left out at %s tokens: %s", name, f"{grid.num_tokens:,}", reason)
    return rows


def _time_peer(
    peer: AttentionPeer, case: AttentionCase, grid: TokenGrid, repeats: int, directions: tuple[str, ...]
) -> list[dict[str, object]]:
    """One row per direction."""
    difference = check(peer, case, grid)
    rows = []
    for direction in directions if peer.has_backward else ("forward",):
        seconds, peak = _time(peer, case, grid, repeats, direction != "forward")
        rows.append(_row(case, grid, peer, direction, seconds, peak, difference))
    return rows


def _time(
    peer: AttentionPeer, case: AttentionCase, grid: TokenGrid, repeats: int, with_backward: bool
) -> tuple[list[float], int]:
    """Seconds of one call, `repeats` times, and the peak memory in bytes."""
    states = [tensor.detach().requires_grad_(with_backward) for tensor in case.states(grid)]

    def call() -> None:
        output = peer.attend(*states)
        if with_backward:
            torch.autograd.grad(output, states, torch.ones_like(output))

    with torch.set_grad_enabled(with_backward):
        return repeatedly_measured(call, case.device, repeats)


def _row(
    case: AttentionCase,
    grid: TokenGrid,
    peer: AttentionPeer,
    direction: str,
    seconds: list[float],
    peak: int,
    difference: float,
) -> dict[str, object]:
    useful = 4.0 * peer.pairs * case.heads * case.head_dim * (1.0 if direction == "forward" else 1 + BACKWARD_FACTOR)
    return {
        "attention": peer.name,
        "backend": block_attention_backend(case.device) if peer.name == "block_sparse" else "",
        "direction": direction,
        "tokens": grid.num_tokens,
        "window_size": case.window_size,
        "neighbor_radius": case.neighbor_radius,
        "kept_share": case.kept_share,
        "kept": "" if case.kept_share == 1.0 else "clustered" if case.is_clustered else "random",
        "keys_per_query": round(peer.pairs / grid.num_tokens, 1),
        "heads": case.heads,
        "head_dim": case.head_dim,
        "dtype": str(case.dtype).removeprefix("torch."),
        "useful_tflop_per_second": round(useful / statistics.median(seconds) / 1e12, 4),
        **describe_seconds(seconds),
        "peak_gib": round(peak / 2**30, 3),
        "difference_to_float64": f"{difference:.1e}",
        **describe_run(case.device),
    }
