# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a backend of block-local attention is: the interface between the operator and the files that compute.

A backend says once per grid what it needs of it, as tensors and integers, because an operator that torch.compile can
trace takes nothing else. The tensors come back to the backend with the queries, keys and values of every layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .token_grid import TokenGrid


class PreparedGrid(NamedTuple):
    """What a backend needs of a grid.

    Attributes:
        tensors: tables made from the grid, on any device.
        numbers: integers that are known without reading a device.
    """

    tensors: list[torch.Tensor]
    numbers: list[int]


class LayerContext(NamedTuple):
    """The context tokens of one layer, see `ContextTokens`, and the mean query of each image, which corrects them.

    Attributes:
        tokens, weights, block_rows, block_columns: (entries,) int64.
        counts: entries of each image, host integers.
        mean_query: (images, heads, head_dim).
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    block_rows: torch.Tensor
    block_columns: torch.Tensor
    counts: tuple[int, ...]
    mean_query: torch.Tensor

    def entries_of(self, image: int) -> slice:
        """Where the context tokens of an image are."""
        start = sum(self.counts[:image])
        return slice(start, start + self.counts[image])


class StripContext(NamedTuple):
    """The context tokens that the strips of one image see in a layer, and the mean query of the image.

    Attributes:
        key, value: (entries, heads, head_dim).
        weights, block_rows, block_columns: (entries,) int64, see `ContextTokens`.
        mean_query: (heads, head_dim).
        of_mean: (heads, head_dim), what the mean query gets from all tokens of the image, of at least float32.
    """

    key: torch.Tensor
    value: torch.Tensor
    weights: torch.Tensor
    block_rows: torch.Tensor
    block_columns: torch.Tensor
    mean_query: torch.Tensor
    of_mean: torch.Tensor

    def as_layer_context(self) -> LayerContext:
        """As the only image of a layer, `tokens` being the rows of `key` and `value`."""
        places = torch.arange(len(self.weights), device=self.weights.device)
        entries = (places, self.weights, self.block_rows, self.block_columns)
        return LayerContext(*entries, (len(self.weights),), self.mean_query[None])


@dataclass(frozen=True)
class AttentionBackend:
    """One way to compute block-local attention of the M = `grid.num_tokens` packed tokens of a grid.

    Attributes:
        name: what users choose it by.
        description: what it is, in words that fit into "the ... has no dropout" and "left to the ...".
        device_type: what it was written for, "cuda" or "cpu"; `None` where it is for all.
        missing: what keeps it from running on a device, in words; `None` where it runs.
        unwanted: why "auto" passes it over on a device although it runs there; `None` where it does not.
        check_query: raises a ValueError where it does not take the head_dim or the dtype of (..., head_dim) queries.
        prepare: what it needs of a grid. Called once per grid; torch.compile traces it.
        forward: takes query, key and value, each (M, heads, head_dim), the prepared grid, the scale of the logits, the
            share of dropped probabilities and the generator that draws them (0.0 and `None` without dropout); where
            there are any, and it takes key weights, the `LayerContext` comes last. Returns the output, (M, heads,
            head_dim), and the base-2 log-sum-exp of each query's logits, (heads, M) in float32, or `None`.
        backward: takes the gradient of the output, query, key, value, output, log-sum-exp and the rest as in the
            forward, the generator seeded alike. Returns the gradients of query, key and value, and with context tokens
            of the mean queries.
        forward_strip: as the forward, for what `prepare` made of a `TokenStrip`. Takes the query of the global tokens
            and the strip's own patch tokens, (G + S, heads, head_dim), key and value of all of its M tokens, the
            prepared strip and the scale; where there are context tokens, and `strips_take_context`, a `StripContext`
            comes last. Returns the output, (G + S, heads, head_dim), in which a global token has attended to the
            strip's part of its keys, and the natural log-sum-exp of the global tokens' logits, (heads, G), of at least
            float32.
        has_dropout: whether it can drop probabilities; if not, another backend runs where some are to be dropped.
        takes_key_weights: whether keys may have weights, and context tokens be keys; if not, another backend runs
            where they do.
        returns_logsumexp: whether the forward returns it.
        strips_take_context: whether `forward_strip` takes context tokens; if not, layers that have some run whole.
    """

    name: str
    description: str
    device_type: str | None
    missing: Callable[[torch.device], str | None]
    unwanted: Callable[[torch.device], str | None]
    check_query: Callable[[torch.Tensor], None]
    prepare: Callable[[TokenGrid], PreparedGrid]
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
    backward: Callable[..., tuple[torch.Tensor, ...]]
    forward_strip: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    has_dropout: bool
    takes_key_weights: bool
    returns_logsumexp: bool
    strips_take_context: bool


def prepared_grid(backend: AttentionBackend, grid: TokenGrid) -> PreparedGrid:
    """What the backend needs of the grid: prepared when first asked for and kept with the grid, for all layers."""
    if backend.name not in grid.prepared:
        grid.prepared[backend.name] = backend.prepare(grid)
    return grid.prepared[backend.name]
