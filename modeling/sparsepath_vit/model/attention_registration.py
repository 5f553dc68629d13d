# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Registers block-local attention with Transformers, as the attention implementation "block_sparse".

Importing this file does it. The layers import the name from here, so that no model is built without it.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .attention_operator import attention_with_logsumexp
from .context_tokens import ContextTokens
from .token_grid import TokenGrid

ATTENTION_NAME = "block_sparse"


def block_sparse_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    token_grid: TokenGrid | None = None,
    context_tokens: ContextTokens | None = None,
    with_logsumexp: bool = False,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`block_attention` with the signature Transformers' `AttentionInterface` asks for.

    Args:
        module: the attention module; unused.
        query, key, value: (batch, heads, tokens, head_dim).
        attention_mask: must be `None`: the grid says which tokens are present.
        scaling: factor on the logits.
        dropout: share of attention probabilities set to zero.
        token_grid: where the tokens are.
        context_tokens: what the layer's queries see beyond their neighbourhood.
        with_logsumexp: whether the log-sum-exps of logits are wanted, which prune scores are made of.
        **kwargs: arguments of other implementations.

    Returns:
        (batch, tokens, heads, head_dim), and `None` in place of attention weights, or what was wanted, as
        `attention_with_logsumexp` returns it.

    Raises:
        ValueError: a mask was given, or no grid.
    """
    if token_grid is None:
        raise ValueError(
            "token_grid is missing: block_sparse attention needs a TokenGrid that says where the tokens are. "
            'For models other than SparsePathViT use attn_implementation="sdpa".'
        )
    if attention_mask is not None:
        raise ValueError(
            f"attention_mask of shape {tuple(attention_mask.shape)} was given beside token_grid: block_sparse takes "
            "None. Say which tokens are absent with patch_mask, from which the grid is made."
        )
    settings = {"context": context_tokens, "scale": scaling, "dropout": dropout}
    output, logsumexp = attention_with_logsumexp(query, key, value, token_grid, **settings)
    return output.transpose(1, 2), logsumexp if with_logsumexp else None


AttentionInterface.register(ATTENTION_NAME, block_sparse_attention_forward)
# Without a mask of its own a padding mask would be dropped silently; with it, the function above refuses it.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
