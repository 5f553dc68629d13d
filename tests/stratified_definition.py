# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Stratified attention and pruning read word for word from their definition: loops over tokens, in Python numbers.

Nothing here calls the package: cells, hash, draw, keys and weights are computed anew.
"""

import itertools
import math

import torch
from token_batches import raster_tokens, sees, softmax

CONTEXT_SEED, REPRESENTATIVE_SEED = 0x5EED, 0xCE11


def cell_side(rows, columns, number, window_size):
    """The smallest s that gives at most `number` cells, then the next divisor or multiple of the window."""
    smallest = next(s for s in itertools.count(1) if math.ceil(rows / s) * math.ceil(columns / s) <= number)
    if window_size is None:
        return smallest
    return next(s for s in itertools.count(smallest) if window_size % s == 0 or s % window_size == 0)


def mixed(value):
    value ^= value >> 16
    value = value * 0x7FEB352D % 2**32
    value ^= value >> 15
    value = value * 0x846CA68B % 2**32
    return value ^ (value >> 16)


def number_of_place(row, column, seed):
    high, low = (mixed(mixed(mixed((2 * seed + half) % 2**32) ^ column) ^ row) for half in range(2))
    return high * 2**21 + low // 2**11


def draw(weights, side, seed):
    """{cell: (token, total weight)} of {(row, column): weight}."""
    cells = {}
    for row, column in weights:
        cells.setdefault((row // side, column // side), []).append((row, column))

    def time(token):
        return -math.log((number_of_place(*token, seed) + 1) / 2**53) / weights[token]

    return {cell: (min(tokens, key=time), sum(weights[token] for token in tokens)) for cell, tokens in cells.items()}


def context_of(batch, image, weights):
    """{token: total weight of its cell} of the context tokens of an image; `weights` is {(row, column): weight}."""
    if batch.num_context_tokens == 0:
        return {}
    side = cell_side(*batch.sizes[image], batch.num_context_tokens, batch.window_size)
    return dict(draw(weights, side, CONTEXT_SEED).values())


def keys_of(batch, query, weights, context):
    """{key: what it counts for} of a query; global tokens are given as (None, index)."""
    counted = {}
    for key, weight in weights.items():
        if sees(batch, query, key):
            counted[key] = weight
        elif key in context:
            counted[key] = context[key]
    return counted


def ones(batch):
    """A weight of 1 for each present token, of each image."""
    return [dict.fromkeys(batch.positions(image), 1) for image in range(len(batch.sizes))]


def random_weights(batch, seed, largest=9):
    generator = torch.Generator().manual_seed(seed)
    return [
        {token: int(torch.randint(1, largest + 1, (), generator=generator)) for token in image} for image in ones(batch)
    ]


def grid_with(batch, weights):
    """The batch's TokenGrid with these weights."""
    grid = batch.grid()
    places = zip(grid.images().tolist(), grid.rows.tolist(), grid.columns.tolist(), strict=True)
    tensor = torch.tensor([weights[image][row, column] for image, row, column in places])
    return grid.select(torch.arange(len(grid.rows)), grid.counts, tensor)


def image_bias(batch, image, weights):
    """[query][key]: the logarithm of what the key counts for, in raster order with the global tokens first."""
    tokens = raster_tokens(batch, image)
    context = context_of(batch, image, weights)
    rows = []
    for query in tokens:
        counted = keys_of(batch, query, weights, context)
        rows.append([0.0 if key is None else math.log(counted[key]) if key in counted else -math.inf for key in tokens])
    return rows


def attention_by_loop(query, key, value, batch, weights, scale):
    """(heads, M, head_dim) in raster order, float64: one softmax over all keys of a query."""
    query, key, value = (states.double().tolist() for states in (query, key, value))
    output, start = [[] for _ in query], 0
    for image in range(len(batch.sizes)):
        biases = image_bias(batch, image, weights[image])
        for head, rows in enumerate(output):
            for position, bias in enumerate(biases, start=start):
                seen = [(start + index, added) for index, added in enumerate(bias) if added > -math.inf]
                row = query[head][position]
                logits = [scale * sum(a * b for a, b in zip(row, key[head][other], strict=True)) + added
                          for other, added in seen]  # fmt: skip
                pairs = list(zip(softmax(logits), (value[head][other] for other, _ in seen), strict=True))
                rows.append([sum(weight * row[dim] for weight, row in pairs) for dim in range(len(row))])
        start += len(biases)
    return torch.tensor(output, dtype=torch.float64)


def biased_attention(query, key, value, batch, weights, scale):
    """The same as differentiable torch operations; (heads, M, head_dim) in raster order."""
    outputs, start = [], 0
    for image in range(len(batch.sizes)):
        bias = torch.tensor(image_bias(batch, image, weights[image]), dtype=torch.float64)
        tokens = slice(start, start + len(bias))
        image_query, image_key, image_value = (states[:, tokens].double() for states in (query, key, value))
        logits = image_query @ image_key.transpose(1, 2) * scale + bias
        outputs.append(logits.softmax(dim=-1) @ image_value)
        start += len(bias)
    return torch.cat(outputs, dim=1)


def left_after_pruning(weights, kept, side):
    """{token: weight} of the kept tokens and of one removed token a cell, of one image."""
    removed = {token: weight for token, weight in weights.items() if token not in kept}
    return {token: weights[token] for token in kept} | dict(draw(removed, side, REPRESENTATIVE_SEED).values())
