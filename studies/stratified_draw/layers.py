# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Where the error of a draw comes from: layer by layer along the dense model, so that errors do not add up."""

from collections.abc import Iterator, Mapping

import torch
from torch.nn.functional import linear

from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel

from .draws import DrawRule, LayerState, Tokens, draw
from .forward import Settings, attend, block_attention, finish_layer

_QUERIES = 96  # evenly spaced, whose attention probabilities are looked at


@torch.inference_mode()
def layer_errors(
    model: SparsePathViTModel, pixel_values: torch.Tensor, rules: Mapping[str, DrawRule], num_samples: int
) -> Iterator[dict[str, float | str]]:
    """One row for each layer and rule.

    Args:
        model, pixel_values: as for `run`.
        rules: the rules by name.
        num_samples: context tokens.

    Yields:
        `layer` (counted from 1) and `rule`; `error`, the mean norm of what the rule changes in the attention branch of
        a patch token, over that of the dense branch less its mean; `common_error`, the norm of the mean change over
        the same; `largest_share`, the attention probability that one patch token gets on average over queries, in the
        head where it is largest; `largest_norm`, of a patch token at the layer's input, over the median.
    """
    hidden_states = model.embeddings(pixel_values, model.token_grid(pixel_values))[0]
    tokens, before = Tokens.full(tuple(side // model.config.patch_size for side in pixel_values.shape[-2:])), None
    added = torch.zeros(len(hidden_states))
    for number, layer in enumerate(model.encoder.layers):
        query, key, value = (states[0] for states in layer.attention.query_key_value(layer.norm1(hidden_states)[None]))
        chosen = torch.cat([query[:, :1], query[:, 1 :: len(tokens.rows) // _QUERIES + 1]], dim=1)
        probabilities = (chosen @ key.transpose(-1, -2) * key.shape[-1] ** -0.5).softmax(dim=-1)[..., 1:]
        mass = probabilities[:, 0].mean(dim=0)
        norms = hidden_states[1:].norm(dim=1)
        found_here = {
            "layer": number + 1,
            "largest_share": probabilities[:, 1:].mean(dim=1).max().item(),
            "largest_norm": (norms.max() / norms.median()).item(),
        }
        dense = attend(query, key, value, added)
        branch = _branch(layer, dense[:, 1:])
        spread = (branch - branch.mean(dim=0)).norm(dim=1).mean()
        for name, rule in rules.items():
            drawn = draw(tokens, LayerState(number, mass, before, key[:, 1:], value[:, 1:]), rule, num_samples, 8, 0)
            found, _ = block_attention(query, key, value, added, tokens, drawn, Settings(rule, num_samples))
            error = _branch(layer, found) - branch
            errors = {"error": error.norm(dim=1).mean() / spread, "common_error": error.mean(dim=0).norm() / spread}
            yield found_here | {"rule": name} | {of: value.item() for of, value in errors.items()}
        hidden_states, before = finish_layer(layer, hidden_states, dense), mass


def _branch(layer: torch.nn.Module, attended: torch.Tensor) -> torch.Tensor:
    """(T, features), what attention adds to the residual stream, but for a constant."""
    branch = linear(attended.transpose(0, 1).flatten(1), layer.attention.projection.weight)
    return layer.layer_scale1(branch) if layer.config.use_layerscale else branch
