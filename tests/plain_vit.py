# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The whole network written out for one image in float64 and raster order, from the definition alone."""

import itertools
import math
from typing import NamedTuple

import torch
from torch.nn import functional


class PlainOutput(NamedTuple):
    """Everything of one image, in raster order.

    Attributes:
        last_hidden_state: (G + K, hidden_size) after the final norm.
        pooler_output: (pooled_size,).
        positions: the (row, column) of the kept patch tokens.
        prune_scores: score by (row, column), or None.
        hidden_states: (tokens, hidden_size) before the first and after each layer.
        attentions: (heads, tokens, tokens) of each layer.
    """

    last_hidden_state: torch.Tensor
    pooler_output: torch.Tensor
    positions: list
    prune_scores: dict | None
    hidden_states: list
    attentions: list


def plain_forward(model, pixels, patch_mask=None):
    """Runs one (channels, height, width) image; `patch_mask` is (rows, columns) bool."""
    config = model.config
    weights = {name: parameter.double() for name, parameter in model.state_dict().items()}
    rows, columns = (side // config.patch_size for side in pixels.shape[1:])
    positions = [
        token for token in itertools.product(range(rows), range(columns)) if patch_mask is None or patch_mask[token]
    ]
    tokens = _embed(config, weights, pixels.double(), rows, columns, positions)
    hidden_states, attentions, prune_scores = [tokens], [], None
    for index in range(config.num_hidden_layers):
        layer = {
            name.split(f"layers.{index}.")[1]: value for name, value in weights.items() if f"layers.{index}." in name
        }
        tokens, probabilities, values = _layer(config, layer, tokens, positions)
        hidden_states.append(tokens)
        attentions.append(probabilities)
        if config.prune_ratio > 0 and index + 1 == config.prune_after_layer:
            prune_scores = _scores(config, probabilities, values, positions)
            count = len(positions) - math.floor(config.prune_ratio * len(positions))
            kept = sorted(sorted(positions, key=lambda token: (-prune_scores[token], token))[:count])
            global_tokens = config.num_global_tokens
            patch_tokens = [tokens[global_tokens + positions.index(token)] for token in kept]
            tokens, positions = torch.cat([tokens[:global_tokens], torch.stack(patch_tokens)]), kept
    tokens = _norm(config, weights, "norm", tokens)
    pooled = tokens[0]
    if config.pooling == "cls_mean":
        pooled = torch.cat([pooled, tokens[config.num_global_tokens :].mean(dim=0)])
    return PlainOutput(tokens, pooled, positions, prune_scores, hidden_states, attentions)


def _embed(config, weights, pixels, rows, columns, positions):
    prefix = config.num_prefix_position_embeddings
    stored = weights["embeddings.position_embeddings"][0]
    side = config.image_size // config.patch_size
    image = stored[prefix:].view(side, side, -1)
    resampled = torch.einsum("ri,cj,ijd->rcd", cubic_weights(rows, side), cubic_weights(columns, side), image)
    table = torch.cat([stored[:prefix], resampled.flatten(0, 1)])
    tokens = [weights["embeddings.cls_token"][0, 0]]
    if config.num_register_tokens:
        tokens += list(weights["embeddings.register_tokens"][0])
    tokens[:prefix] = [token + position for token, position in zip(tokens, table[:prefix], strict=False)]
    projection = weights["embeddings.patch_embeddings.projection.weight"].flatten(1)
    size = config.patch_size
    for row, column in positions:
        patch = pixels[:, row * size : (row + 1) * size, column * size : (column + 1) * size].flatten()
        token = projection @ patch + weights["embeddings.patch_embeddings.projection.bias"]
        tokens.append(token + table[prefix + row * columns + column])
    return torch.stack(tokens)


def cubic_weights(new_size, old_size):
    """(new_size, old_size) weights of antialiased bicubic resampling (Keys' kernel, a = -0.5), written out."""
    scale = old_size / new_size

    def kernel(x):
        x = abs(x)
        return (1.5 * x - 2.5) * x * x + 1 if x < 1 else ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0

    weights = torch.tensor(
        [
            [kernel((old + 0.5 - scale * (new + 0.5)) / max(scale, 1.0)) for old in range(old_size)]
            for new in range(new_size)
        ],
        dtype=torch.float64,
    )
    return weights / weights.sum(dim=1, keepdim=True)


def _layer(config, layer, tokens, positions):
    """One pre-norm layer: (tokens, attention probabilities, values)."""
    width, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    projected = _norm(config, layer, "norm1", tokens) @ layer["attention.qkv.weight"].T
    if config.qkv_bias:
        projected = projected + layer["attention.qkv.bias"]
    pattern = _pattern(config, positions)
    probabilities, values, attended = [], [], []
    for head in range(config.num_attention_heads):
        query, key, value = (
            projected[:, part * width + head * head_dim : part * width + (head + 1) * head_dim] for part in range(3)
        )
        logits = (query @ key.T / math.sqrt(head_dim)).masked_fill(~pattern, -math.inf)
        probabilities.append(torch.exp(logits - logits.logsumexp(dim=1, keepdim=True)))
        values.append(value)
        attended.append(probabilities[-1] @ value)
    branch = torch.cat(attended, dim=1) @ layer["attention.projection.weight"].T + layer["attention.projection.bias"]
    tokens = tokens + branch * layer.get("layer_scale1.lambda1", 1.0)
    hidden = _norm(config, layer, "norm2", tokens) @ layer["mlp.fc1.weight"].T + layer["mlp.fc1.bias"]
    if config.mlp_type == "swiglu":
        gate, hidden = hidden[:, : config.intermediate_size], hidden[:, config.intermediate_size :]
        hidden = gate / (1 + torch.exp(-gate)) * hidden
    else:
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
    branch = hidden @ layer["mlp.fc2.weight"].T + layer["mlp.fc2.bias"]
    tokens = tokens + branch * layer.get("layer_scale2.lambda1", 1.0)
    return tokens, torch.stack(probabilities), torch.stack(values)


def _pattern(config, positions):
    """(tokens, tokens) bool, True where the query (first axis) sees the key."""
    tokens = [None] * config.num_global_tokens + list(positions)
    window = config.window_size

    def sees(query, key):
        if query is None or key is None or window is None:
            return True
        return all(abs(a // window - b // window) <= config.neighbor_radius for a, b in zip(query, key, strict=True))

    return torch.tensor([[sees(query, key) for key in tokens] for query in tokens])


def _scores(config, probabilities, values, positions):
    queries = 1 if config.prune_score == "cls_attention" else config.num_global_tokens
    received = probabilities[:, :queries]  # (heads, global queries, keys)
    if config.prune_score == "attention_value":
        received = received * values.norm(dim=2)[:, None]
    scores = received.mean(dim=(0, 1))[config.num_global_tokens :].tolist()
    return dict(zip(positions, scores, strict=True))


def _norm(config, weights, name, tokens):
    return functional.layer_norm(
        tokens, tokens.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], config.layer_norm_eps
    )
