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
from .prune_score_operator import has_prune_logits_kernel, write_prune_logits
from .token_strips import TokenStrip


class PruneLogits:
    """Collects the logits of the global queries of one image, strip by strip.

    Args:
        scale: factor on the logits.
        kind: the score, see `prune_scores`.
        num_tokens: patch tokens of all strips. Their logits have one tensor: many small ones, freed, would stay in the
            heap, beside the kept tokens that are gathered next.
    """

    def __init__(self, scale: float, kind: str, num_tokens: int) -> None:
        self._scale, self._kind, self._num_tokens = scale, kind, num_tokens
        self._logits: torch.Tensor | None = None  # (heads, queries, num_tokens)
        self._end = 0  # of the tokens that have theirs
        self._normaliser: torch.Tensor | None = None  # (heads, queries), log-sum-exp over all keys so far

    def add(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, strip: TokenStrip) -> None:
        """The logits of one strip.

        Args:
            query: (heads, G, head_dim) of the global tokens.
            key, value: (heads, M, head_dim) of all tokens of the strip.
            strip: where they are.
        """
        query = query[:, :1] if self._kind == "cls_attention" else query
        if self._logits is None:
            self._logits = query.new_empty((*query.shape[:2], self._num_tokens), dtype=torch.float32)
        start, end = strip.own
        logits = self._logits[:, :, self._end : self._end + end - start]
        self._write(query, key[:, start:end], self._logits, self._end)
        self._end += end - start
        if strip.weights is not None:
            first = start - strip.num_global_tokens
            logits += strip.weights[first : first + end - start].float().log()
        self._normalise_by(logits)
        if strip.is_first:  # the global tokens see themselves
            of_globals = query.new_empty((*query.shape[:2], strip.num_global_tokens), dtype=torch.float32)
            self._write(query, key[:, : strip.num_global_tokens], of_globals, 0)
            self._normalise_by(of_globals)
        if self._kind == "attention_value":  # the probability times a norm is that of a logit raised by its logarithm
            logits += value[:, start:end].float().norm(dim=-1).log()[:, None]

    def _write(self, query: torch.Tensor, key: torch.Tensor, logits: torch.Tensor, first: int) -> None:
        """Writes the logits of some keys to the columns from `first` on."""
        if has_prune_logits_kernel(query):
            write_prune_logits(query, key, logits, first, self._scale)
            return
        logits = logits[:, :, first : first + key.shape[1]]
        with maybe_autocast(query.device.type, enabled=False):
            for head in range(len(query)):  # one head at a time: no float32 copy of all keys of a strip
                torch.mm(query[head].float(), key[head].float().T, out=logits[head]).mul_(self._scale)

    def _normalise_by(self, logits: torch.Tensor) -> None:
        normaliser, known = logits.logsumexp(dim=2), self._normaliser
        self._normaliser = normaliser if known is None else torch.logaddexp(known, normaliser)

    def add_nothing(self, query: torch.Tensor) -> None:
        """A part without keys; (heads, G, head_dim) of the global tokens."""
        queries = 1 if self._kind == "cls_attention" else query.shape[1]
        self._normaliser = query.new_full((len(query), queries), -torch.inf, dtype=torch.float32)
        self._logits = query.new_empty(len(query), queries, 0, dtype=torch.float32)

    def scores(self, processes: Processes | None = None) -> torch.Tensor:
        """(patch tokens,) float32 of what was added, in the grid's order; the logits are used up.

        Args:
            processes: that have a part of the image's keys each.
        """
        normaliser = self._normaliser
        if processes is not None:
            normaliser = torch.stack(processes.gather(normaliser)).logsumexp(dim=0)
        return self._logits.sub_(normaliser[:, :, None]).exp_().mean(dim=1).mean(dim=0)
