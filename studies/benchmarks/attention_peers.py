# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What block-local attention is compared with: dense attention, and other ways to compute its pattern."""

import dataclasses
from collections.abc import Callable

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from sparsepath_vit.model.attention_operator import block_attention
from sparsepath_vit.model.attention_specification import naive_block_attention
from sparsepath_vit.model.token_grid import TokenGrid
from sparsepath_vit.runtime.cost import attention_pairs

try:
    import natten
except ImportError:
    natten = None

PEERS = ("block_sparse", "sdpa_dense", "flex_attention", "natten", "natten_sliding", "reference")
# Beyond it attentions that keep all logits would not fit.
MOST_TOKENS_OF_ALL_LOGITS = 4096

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class DoesNotApplyError(ValueError):
    """An attention cannot be asked for this grid, or is not installed; the message says why."""


@dataclasses.dataclass(frozen=True)
class AttentionPeer:
    """One way to compute attention of one grid.

    Attributes:
        name: of `PEERS`.
        attend: takes query, key and value, (1, heads, tokens, head_dim), global tokens first; returns the same shape.
        pairs: query-key pairs it is asked for.
        pattern: takes (queries,) token indices; returns (queries, tokens) bool, the keys each query sees.
        has_backward: whether it has gradients on this device.
    """

    name: str
    attend: Attention
    pairs: int
    pattern: Callable[[torch.Tensor], torch.Tensor]
    has_backward: bool = True


def attention_peer(name: str, grid: TokenGrid) -> AttentionPeer:
    """The attention of that name for the one image of a grid.

    Raises:
        DoesNotApplyError: it cannot be asked for this grid, or is not installed.
    """
    if name == "sdpa_dense":
        pairs = grid.num_tokens**2
        everything = torch.ones(grid.num_tokens, dtype=torch.bool, device=grid.device)
        return AttentionPeer(
            name, scaled_dot_product_attention, pairs, lambda queries: everything.expand(len(queries), -1)
        )
    if name.startswith("natten"):
        return _natten(name, grid)

    def pattern(queries: torch.Tensor) -> torch.Tensor:
        return block_pattern(grid, queries)

    pairs = attention_pairs(grid)
    if name == "block_sparse":
        return AttentionPeer(name, lambda *states: block_attention(*states, grid), pairs, pattern)
    if name == "flex_attention":
        compiled, mask = torch.compile(flex_attention), _flex_mask(grid)
        has_backward = grid.device.type == "cuda"  # on the CPU it is for inference only
        return AttentionPeer(name, lambda *states: compiled(*states, block_mask=mask), pairs, pattern, has_backward)
    _check_all_logits_fit(grid)
    return AttentionPeer(name, _reference(grid), pairs, pattern)


def block_pattern(grid: TokenGrid, queries: torch.Tensor) -> torch.Tensor:
    """(queries, tokens) rows of the pattern of one image, written from its definition.

    Args:
        grid: of one image.
        queries: token indices, global tokens first.
    """
    return _seen_by(grid)(queries[:, None], torch.arange(grid.num_tokens, device=grid.device))


def _seen_by(grid: TokenGrid) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Takes indices of queries and of keys, which broadcast; returns bool, whether the one sees the other."""
    rows, columns = _block_positions(grid)
    num_global_tokens, radius = grid.num_global_tokens, grid.neighbor_radius

    def is_seen(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        is_near = ((rows[query] - rows[key]).abs() <= radius) & ((columns[query] - columns[key]).abs() <= radius)
        return is_near | (query < num_global_tokens) | (key < num_global_tokens)

    return is_seen


def _block_positions(grid: TokenGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Block row and block column of each token; those of global tokens mean nothing."""
    window = grid.window_size or max(grid.canvas_size)
    nowhere = torch.zeros(grid.num_global_tokens, dtype=torch.int64, device=grid.device)
    return torch.cat([nowhere, grid.rows // window]), torch.cat([nowhere, grid.columns // window])


def _flex_mask(grid: TokenGrid) -> BlockMask:
    """The pattern as a BlockMask, from block coordinates per token: a dense mask of 60k tokens would not fit."""
    seen_by = _seen_by(grid)

    def is_seen(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return seen_by(query, key)

    return create_block_mask(is_seen, None, None, grid.num_tokens, grid.num_tokens, device=grid.device, _compile=True)


def _reference(grid: TokenGrid) -> Attention:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        packed = [states[0].transpose(0, 1) for states in (query, key, value)]
        return naive_block_attention(*packed, grid, query.shape[-1] ** -0.5).transpose(0, 1)[None]

    return attend


def _natten(name: str, grid: TokenGrid) -> AttentionPeer:
    """NATTEN's neighbourhood attention, with a window as large as ours: "natten" moves it by a block.

    Away from the border that is our pattern. At the border NATTEN shifts the window inwards, where ours sees fewer
    blocks: its queries there have more keys, and it is checked against its own pattern. "natten_sliding" moves the
    window by a token. Patch tokens are taken in raster order; global keys go in as additional ones, global queries are
    a dense attention of their own.
    """
    if natten is None:
        raise DoesNotApplyError("NATTEN is not installed")
    rows, columns = grid.grid_sizes[0]
    num_globals, side = grid.num_global_tokens, 2 * grid.neighbor_radius + 1
    window = side * (grid.window_size or max(rows, columns))
    if window > min(rows, columns):
        raise DoesNotApplyError(f"NATTEN needs an image of {side} x {side} blocks or more")
    stride = grid.window_size if name == "natten" else 1
    if grid.counts[0] != rows * columns:
        raise DoesNotApplyError("NATTEN has no form for absent tokens")
    if not natten.HAS_LIBNATTEN:  # it then runs uncompiled FlexAttention
        _check_all_logits_fit(grid)
    backend = None if natten.HAS_LIBNATTEN else "flex-fna"

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        patches = [_patch_map(states, num_globals, rows, columns) for states in (query, key, value)]
        global_key, global_value = (states[:, :, :num_globals].transpose(1, 2) for states in (key, value))
        attended = natten.na2d(
            *patches,
            kernel_size=window,
            stride=stride,
            additional_keys=global_key.contiguous(),
            additional_values=global_value.contiguous(),
            backend=backend,
        )
        attended = attended.flatten(1, 2).transpose(1, 2)  # (1, rows, columns, heads, head_dim) -> as the query
        return torch.cat([scaled_dot_product_attention(query[:, :, :num_globals], key, value), attended], dim=2)

    def pattern(queries: torch.Tensor) -> torch.Tensor:
        tokens = torch.arange(rows * columns, device=grid.device)
        near = torch.ones(len(queries), grid.num_tokens, dtype=torch.bool, device=grid.device)
        patch_queries = (queries - num_globals).clamp(min=0)
        near[:, num_globals:] = _is_in_window(patch_queries // columns, tokens // columns, window, stride, rows)
        near[:, num_globals:] &= _is_in_window(patch_queries % columns, tokens % columns, window, stride, columns)
        return near | (queries < num_globals)[:, None]

    pairs = rows * columns * (window**2 + num_globals) + num_globals * grid.num_tokens
    return AttentionPeer(name, attend, pairs, pattern, has_backward=natten.HAS_LIBNATTEN)


def _patch_map(states: torch.Tensor, num_global_tokens: int, rows: int, columns: int) -> torch.Tensor:
    """(1, heads, tokens, head_dim) -> (1, rows, columns, heads, head_dim), contiguous as NATTEN asks for."""
    return states[:, :, num_global_tokens:].transpose(1, 2).unflatten(1, (rows, columns)).contiguous()


def _is_in_window(queries: torch.Tensor, keys: torch.Tensor, window: int, stride: int, size: int) -> torch.Tensor:
    """(queries, keys) along one axis: whether the key lies in the query's window, which is shifted inside the image.

    The window of `stride` queries lies around the middle one of them.
    """
    start = (queries // stride * stride + stride // 2 - window // 2).clamp(0, size - window)
    return (keys >= start[:, None]) & (keys < start[:, None] + window)


def _check_all_logits_fit(grid: TokenGrid) -> None:
    if grid.num_tokens > MOST_TOKENS_OF_ALL_LOGITS:
        raise DoesNotApplyError(f"it keeps all logits, which is done up to {MOST_TOKENS_OF_ALL_LOGITS:,} tokens")
