# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The prune scores of an image whose keys exist one strip at a time: `prune_scores` of `token_pruning.py`, in parts.

A probability needs the logits of all keys. So the keys are made twice: before the strips, for the sum of exponentials
that a global query's probabilities are divided by, and with the strips. That is a twelfth of the matrix products of one
layer. Logits that wait for the last strip would be heads x G float32 a token: 864 bytes for UNI2-h, whose hidden states
have 3,072 in bfloat16.

A layer is a `SparsePathViTLayer`; the encoder, which defines it, is built on this file.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from .linear_products import WrittenProducts
from .processes import Processes
from .prune_score_operator import has_prune_logits_kernel, write_prune_logits
from .token_strips import TokenStrip


class StripScores:
    """The prune scores of one image, strip by strip.

    Args:
        layer: in evaluation mode, after which tokens are pruned.
        hidden_states: (M, hidden_size) packed tokens, what the layer gets; they are read before this returns.
        global_tokens: where the image's lie among them.
        strips: of the image; of several processes those of this one, which may be none.
        at_once: so many are read at a time.
        processes: that have a part of the image each.
    """

    def __init__(
        self,
        layer: nn.Module,
        hidden_states: torch.Tensor,
        global_tokens: slice,
        strips: Sequence[TokenStrip],
        at_once: int,
        processes: Processes | None = None,
    ) -> None:
        self._layer, self._kind = layer, layer.config.prune_score
        query = self._made_of(hidden_states[global_tokens], part=0)  # (heads, G, head_dim)
        self._query = query[:, :1] if self._kind == "cls_attention" else query
        # One tensor: many small ones, made between large ones that come and go, would keep holes in the memory.
        num_tokens = sum(strip.own[1] - strip.own[0] for strip in strips)
        self._scores, self._end = query.new_empty(num_tokens, dtype=torch.float32), 0
        # (heads, queries) each, put together once: a sum of many parts, one after the other, would round as often.
        parts = [query.new_full(self._query.shape[:2], -torch.inf, dtype=torch.float32)]
        for tokens, weights in _keys_of_globals(global_tokens, strips, at_once):
            parts.append(self._logits(self._made_of(hidden_states[tokens], part=1), weights).logsumexp(dim=2))
        self._logsumexp = torch.stack(parts).logsumexp(dim=0)
        if processes is not None:
            self._logsumexp = torch.stack(processes.gather(self._logsumexp)).logsumexp(dim=0)

    def add(self, key: torch.Tensor, value: torch.Tensor, strip: TokenStrip) -> None:
        """The scores of the own patch tokens of a strip.

        Args:
            key, value: (heads, M, head_dim) of all tokens of the strip.
            strip: where they are, the next one of the image.
        """
        own = slice(*strip.own)
        logits = self._logits(key[:, own], _own_weights(strip))
        if self._kind == "attention_value":  # the probability times a norm is that of a logit raised by its logarithm
            logits += value[:, own].float().norm(dim=-1).log()[:, None]
        start, self._end = self._end, self._end + logits.shape[2]
        self._scores[start : self._end] = logits.sub_(self._logsumexp[:, :, None]).exp_().mean(dim=1).mean(dim=0)

    def scores(self) -> torch.Tensor:
        """(patch tokens,) float32 of what was added, in the grid's order."""
        return self._scores

    def _made_of(self, tokens: torch.Tensor, part: int) -> torch.Tensor:
        """(tokens, hidden_size) -> their queries, keys or values (part 0, 1 or 2), (heads, tokens, head_dim)."""
        attention, width = self._layer.attention, tokens.shape[1]
        products = WrittenProducts(attention.qkv, self._layer.norm1(tokens))
        states = products.new_empty(len(tokens), width)
        products.write(slice(0, len(tokens)), slice(part * width, (part + 1) * width), states)
        return states.unflatten(1, (attention.num_heads, attention.head_dim)).transpose(0, 1)

    def _logits(self, key: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """(heads, queries, tokens) float32 of keys, (heads, tokens, head_dim), and what each stands for."""
        query, scale = self._query, self._layer.attention.scaling
        logits = query.new_empty((*query.shape[:2], key.shape[1]), dtype=torch.float32)
        if has_prune_logits_kernel(query):
            write_prune_logits(query, key, logits, 0, scale)
        else:
            with maybe_autocast(query.device.type, enabled=False):
                for head in range(len(query)):  # one head at a time: no float32 copy of all keys of a strip
                    torch.mm(query[head].float(), key[head].float().T, out=logits[head]).mul_(scale)
        return logits if weights is None else logits.add_(weights.float().log())


def _keys_of_globals(
    global_tokens: slice, strips: Sequence[TokenStrip], at_once: int
) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """Packed indices of all tokens of the strips, once each, in parts, and what they stand for, `None` for themselves.

    The global tokens are among those of the image's first strip.
    """
    if not strips:
        return
    if strips[0].is_first:
        yield global_tokens, None
    first, end = strips[0].own_in_batch[0], strips[-1].own_in_batch[1]
    weights = None if strips[0].weights is None else torch.cat([_own_weights(strip) for strip in strips])
    for start in range(first, end, at_once):
        part = slice(start, min(start + at_once, end))
        yield part, None if weights is None else weights[part.start - first : part.stop - first]


def _own_weights(strip: TokenStrip) -> torch.Tensor | None:
    """What the own patch tokens of a strip stand for; `None` where it is themselves."""
    first, end = (index - strip.num_global_tokens for index in strip.own)
    return None if strip.weights is None else strip.weights[first:end]
