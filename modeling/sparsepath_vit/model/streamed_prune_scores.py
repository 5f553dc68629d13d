# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The prune scores of an image whose keys exist one strip at a time: `prune_scores` of `token_pruning.py`, in parts.

A probability needs the logits of all keys. So the logits of the global queries are kept until the last strip: heads x G
float32 a token, 864 bytes for UNI2-h, whose hidden states have 3,072 in bfloat16. The kept tokens, which are gathered
afterwards, take more at a prune ratio of 0.6. Making the keys a second time would cost a twelfth of the layer's matrix
products.
"""

import torch
from transformers.utils.generic import maybe_autocast

from .processes import Processes
from .token_strips import TokenStrip


class PruneLogits:
    """Collects the logits of the global queries of one image, strip by strip.

    Args:
        scale: factor on the logits.
        kind: the score, see `prune_scores`.
    """

    def __init__(self, scale: float, kind: str) -> None:
        self._scale, self._kind = scale, kind
        self._logits: list[torch.Tensor] = []  # (heads, queries, S) of each strip
        self._normaliser: torch.Tensor | None = None  # (heads, queries), log-sum-exp over all keys so far

    def add(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, strip: TokenStrip) -> None:
        """The logits of one strip.

        Args:
            query: (heads, G, head_dim) of the global tokens.
            key, value: (heads, M, head_dim) of all tokens of the strip.
            strip: where they are.
        """
        start, end = strip.global_keys
        query = query[:, :1] if self._kind == "cls_attention" else query
        logits = query.new_empty((*query.shape[:2], end - start), dtype=torch.float32)
        with maybe_autocast(query.device.type, enabled=False):
            for head in range(len(query)):  # one head at a time: no float32 copy of all keys of a strip
                torch.mm(query[head].float(), key[head, start:end].float().T, out=logits[head]).mul_(self._scale)
        of_own = logits[:, :, strip.own[0] - start :]
        if strip.weights is not None:
            first = strip.own[0] - strip.num_global_tokens
            of_own += strip.weights[first : first + of_own.shape[2]].float().log()
        normaliser, known = logits.logsumexp(dim=2), self._normaliser
        self._normaliser = normaliser if known is None else torch.logaddexp(known, normaliser)
        if self._kind == "attention_value":  # the probability times a norm is that of a logit raised by its logarithm
            of_own += value[:, slice(*strip.own)].float().norm(dim=-1).log()[:, None]
        self._logits.append(of_own)

    def add_nothing(self, query: torch.Tensor) -> None:
        """A part without keys; (heads, G, head_dim) of the global tokens."""
        queries = 1 if self._kind == "cls_attention" else query.shape[1]
        self._normaliser = query.new_full((len(query), queries), -torch.inf, dtype=torch.float32)
        self._logits.append(query.new_empty(len(query), queries, 0, dtype=torch.float32))

    def scores(self, processes: Processes | None = None) -> torch.Tensor:
        """(patch tokens,) float32 of what was added, in the grid's order; the logits are used up.

        Args:
            processes: that have a part of the image's keys each.
        """
        normaliser, scores = self._normaliser, []
        if processes is not None:
            normaliser = torch.stack(processes.gather(normaliser)).logsumexp(dim=0)
        for logits in self._logits:
            probabilities = logits.sub_(normaliser[:, :, None]).exp_()
            scores.append(probabilities.mean(dim=1).mean(dim=0))
        return torch.cat(scores)
