# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What the global tokens attend to in the last layer, for every patch token, without a matrix of all pairs.

A logit is the product of a query and a key, and a key a projection of a normalised token. The query is multiplied into
the projection once, so that a token costs one row of a small product: memory is global tokens x heads x tokens.
"""

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from ..model.encoder_sparsepath_vit import EncoderOutput
    from ..model.modeling_sparsepath_vit import SparsePathViTModel
    from ..model.token_pruning import EncodedTokens

KINDS = ("mean", "heads")
_CHUNK_TOKENS = 4096


class AttentionOfImage(NamedTuple):
    """Attention of the G global tokens of one image to its K patch tokens of the last layer, in raster order.

    Attributes:
        positions: (K, 2) int64 row and column.
        probabilities: (K, G) float32, the mean over heads; or (K, G, heads). What is missing to 1 goes to the global
            tokens.
    """

    positions: torch.Tensor
    probabilities: torch.Tensor


class GlobalAttention:
    """Listens to one forward: pass it as `after_layer` to `model.encode`, then ask for the images.

    Args:
        model: in evaluation mode.
        kind: "mean" of all heads, or "heads" for each of them.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, model: "SparsePathViTModel", kind: str = "mean") -> None:
        self._kind = checked_kind(kind)
        self._layer = model.encoder.layers[-1]
        self._before_last = len(model.encoder.layers) - 1
        self._logits: list[torch.Tensor] = []

    def __call__(self, number: int, tokens: "EncodedTokens") -> "EncodedTokens":
        """The tokens, unchanged."""
        if number == self._before_last:
            packed = tokens.hidden_states.reshape(tokens.grid.num_tokens, -1)
            offsets = tokens.grid.image_offsets
            self._logits = [
                self._image_logits(packed[start:end], tokens.grid.num_global_tokens) for start, end in pairwise(offsets)
            ]
        return tokens

    def _image_logits(self, tokens: torch.Tensor, num_global_tokens: int) -> torch.Tensor:
        """(tokens, hidden_size), global tokens first -> (tokens, G, heads) float32, but for a term common to all."""
        attention = self._layer.attention
        heads, head_dim, hidden_size = attention.num_heads, attention.head_dim, tokens.shape[-1]
        normalised = self._layer.norm1(tokens[:num_global_tokens])
        query, _, _ = attention.query_key_value(normalised[None])  # (1, heads, G, head_dim)
        # The bias of the keys adds the same to all logits of a query: softmax does not see it.
        key_projection = attention.qkv.weight[hidden_size : 2 * hidden_size].view(heads, head_dim, hidden_size)
        directions = torch.einsum("hgd,hdc->cgh", query[0].float(), key_projection.float()) * attention.scaling
        logits = torch.empty(len(tokens), num_global_tokens, heads, device=tokens.device)
        for start in range(0, len(tokens), _CHUNK_TOKENS):
            chunk = self._layer.norm1(tokens[start : start + _CHUNK_TOKENS]).float()
            logits[start : start + len(chunk)] = torch.tensordot(chunk, directions, dims=1)
        return logits

    def of_image(self, encoded: "EncoderOutput", index: int) -> AttentionOfImage:
        """The attention in image `index` of the batch that was encoded."""
        grid, logits = encoded.last.grid, self._logits[index]
        first = sum(grid.counts[:index])
        own = slice(first, first + grid.counts[index])
        if len(logits) != grid.num_global_tokens + grid.counts[index]:  # pruned between this layer and the one before
            logits = self._kept(encoded, index, logits)
        if grid.weights is not None:
            logits[grid.num_global_tokens :] += grid.weights[own].float().log()[:, None, None].to(logits.device)
        probabilities = logits.softmax(dim=0)[grid.num_global_tokens :]  # (K, G, heads)
        if self._kind == "mean":
            probabilities = probabilities.mean(dim=-1)
        positions = torch.stack([grid.rows[own], grid.columns[own]], dim=-1)
        order = torch.argsort(positions[:, 0] * grid.grid_sizes[index][1] + positions[:, 1])
        return AttentionOfImage(positions[order], probabilities[order.to(probabilities.device)])

    def _kept(self, encoded: "EncoderOutput", index: int, logits: torch.Tensor) -> torch.Tensor:
        pruning, num_global_tokens = encoded.last.pruning, encoded.last.grid.num_global_tokens
        first = sum(pruning.grid.counts[:index])
        kept = pruning.kept[(pruning.kept >= first) & (pruning.kept < first + pruning.grid.counts[index])] - first
        return torch.cat([logits[:num_global_tokens], logits[num_global_tokens:][kept.to(logits.device)]])


def checked_kind(kind: str) -> str:
    """`kind` itself. Raises ValueError where it is none of `KINDS`."""
    if kind not in KINDS:
        raise ValueError(f"attention={kind!r} is unknown: 'mean' stores the mean of all heads, 'heads' each of them.")
    return kind
