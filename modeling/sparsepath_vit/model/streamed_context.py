# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The context tokens of a layer that runs strip by strip: found before its strips, without keys of the whole image.

Which tokens are exact, and the correction, need the attention of CLS and of the mean query over all tokens. A logit is
linear in the normalised token n that its key is made of: q . (W n + b) = (W^T q) . n + q . b, where the last part is
the same for all keys and falls out of the softmax. So the normalised tokens are made in parts, three times: for their
mean, of which the mean query is made; for the logits; and for their mean weighted by the mean query's probabilities, of
which what it attended to is made. At a head_dim of 64 that is 1 / 43 of the products that make all keys and values.
What is kept is 2 x heads numbers a token until the context tokens are drawn, then their keys and values.
"""

from collections.abc import Iterator

import torch
from torch import nn

from .attention_backend import StripContext
from .attention_precision import without_autocast
from .context_tokens import ContextTokens, draw_context_tokens, exact_tokens
from .linear_products import is_plain
from .token_grid import TokenGrid


def obstacle_to_streamed_context(layer: nn.Module) -> str | None:
    """Why the context tokens of a layer cannot be found without its keys, in a few words; `None` where they can."""
    qkv = layer.attention.qkv
    if is_plain(qkv):
        return None
    return (
        f"its qkv is no plain linear layer ({type(qkv).__name__} of {type(qkv.weight).__name__}), with context tokens"
    )


def strip_contexts(
    layer: nn.Module, hidden_states: torch.Tensor, grid: TokenGrid, most_tokens: int
) -> list[StripContext]:
    """The context tokens of a layer, of each image.

    Args:
        layer: in evaluation mode, without `obstacle_to_streamed_context`.
        hidden_states: (M, hidden_size) packed tokens, what the layer gets.
        grid: where they are; it has context tokens.
        most_tokens: so many tokens are read at a time.
    """
    images = range(grid.batch_size)
    with without_autocast(hidden_states.device.type):
        observed = [_Observed(layer, hidden_states, grid, image, most_tokens) for image in images]
    exact = exact_tokens(torch.cat([image.scores for image in observed]), grid)
    context = draw_context_tokens(grid, exact, layer.attention.draw)
    return [_strip_context(layer, hidden_states, context, observed[image], image) for image in images]


class _Observed:
    """What CLS and the mean query of an image attend to.

    Attributes:
        scores: (patch tokens,) attention probability from both, mean over them and over heads.
        mean_query: (heads, head_dim), as a layer's queries are.
        of_mean: (heads, head_dim), what it gets from all tokens of the image, of at least float32.
    """

    def __init__(
        self, layer: nn.Module, hidden_states: torch.Tensor, grid: TokenGrid, image: int, most_tokens: int
    ) -> None:
        attention, num_globals = layer.attention, grid.num_global_tokens
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        tokens = hidden_states[slice(*grid.image_offsets[image : image + 2])]  # (G + patch tokens, hidden_size)

        def parts() -> Iterator[tuple[slice, torch.Tensor]]:
            for start in range(0, len(tokens), most_tokens):
                part = slice(start, start + most_tokens)
                yield part, layer.norm1(tokens[part]).to(dtype)

        weight = attention.qkv.weight.to(dtype).view(3, attention.num_heads, attention.head_dim, -1)
        bias = weight.new_zeros(3 * len(tokens[0])) if attention.qkv.bias is None else attention.qkv.bias.to(dtype)
        bias = bias.view(3, attention.num_heads, attention.head_dim)
        counts = weight.new_ones(len(tokens))
        if grid.weights is not None:
            counts[num_globals:] = grid.weights.split(grid.counts)[image]
        shares = counts / counts[num_globals:].sum()
        shares[:num_globals] = 0
        observers = torch.stack(
            [layer.norm1(tokens[0]).to(dtype), sum(shares[part] @ norms for part, norms in parts())]
        )
        # The queries as the layer has them, in its dtype: (CLS and mean, heads, head_dim).
        queries = (torch.einsum("oi,hdi->ohd", observers, weight[0]) + bias[0]).to(hidden_states.dtype)
        self.mean_query = queries[1]
        asked = torch.einsum("ohd,hdi->ohi", queries.to(dtype), weight[1]).flatten(0, 1) * attention.scaling
        logits = weight.new_empty(len(tokens), len(asked))  # (G + patch tokens, 2 * heads)
        for part, norms in parts():
            torch.mm(norms, asked.mT, out=logits[part])
        logits += counts.log()[:, None]
        probabilities = logits.sub_(logits.amax(dim=0)).exp_()  # in place: there are as many as tokens
        probabilities /= probabilities.sum(dim=0)
        self.scores = probabilities[num_globals:].mean(dim=1)
        of_mean = sum(probabilities[part, attention.num_heads :].mT @ norms for part, norms in parts())
        self.of_mean = torch.einsum("hi,hdi->hd", of_mean, weight[2]) + bias[2]


def _strip_context(
    layer: nn.Module, hidden_states: torch.Tensor, context: ContextTokens, observed: _Observed, image: int
) -> StripContext:
    start = sum(context.counts[:image])
    entries, attention = slice(start, start + context.counts[image]), layer.attention
    qkv = attention.qkv(layer.norm1(hidden_states[context.tokens[entries]]))
    _, key, value = qkv.view(-1, 3, attention.num_heads, attention.head_dim).unbind(1)
    places = (states[entries] for states in (context.weights, context.block_rows, context.block_columns))
    return StripContext(key, value, *places, observed.mean_query, observed.of_mean)
