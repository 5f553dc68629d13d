# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Stratified attention and pruning read word for word from their definition: loops over tokens, in Python numbers.

Nothing here calls the package but `grid_with` and `context_with`, which make what it takes: cells, hash, draw, keys,
weights and correction are computed anew.
"""

import itertools
import math
from fractions import Fraction

import torch
from token_batches import raster_tokens, sees, softmax

from sparsepath_vit.model.context_tokens import draw_context_tokens, exact_tokens

CONTEXT_SEED, STEP_OF_DRAWS = 0x5EED, 0x9E3779B9
MOST_EXACT = 63


def cell_side(rows, columns, number):
    """The smallest s that gives at most `number` cells."""
    return next(s for s in itertools.count(1) if math.ceil(rows / s) * math.ceil(columns / s) <= number)


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


def exact_of(batch, image, scores):
    """The tokens of an image with the highest scores, {token: score}; none where every token is a context token."""
    if math.prod(batch.sizes[image]) <= batch.num_context_tokens:
        return []
    highest = sorted(scores, key=lambda token: -scores[token])
    return highest[: min(MOST_EXACT, batch.num_context_tokens // 2)]


def context_of(batch, image, weights, scores, draw_number=0):
    """{token: what it stands for} of the context tokens of an image; `weights` is {(row, column): weight}."""
    if batch.num_context_tokens == 0:
        return {}
    num_samples, exact = batch.num_context_tokens, exact_of(batch, image, scores)
    if math.prod(batch.sizes[image]) > num_samples:
        num_samples -= min(MOST_EXACT, num_samples // 2)
    side = cell_side(*batch.sizes[image], num_samples)
    others = {token: weight for token, weight in weights.items() if token not in exact}
    drawn = dict(draw(others, side, CONTEXT_SEED + STEP_OF_DRAWS * (draw_number + 1)).values())
    return drawn | {token: weights[token] for token in exact}


def contexts_of(batch, weights, scores, draw_number=0):
    """`context_of` of each image."""
    return [context_of(batch, image, weights[image], scores[image], draw_number) for image in range(len(batch.sizes))]


def random_scores(batch, seed=0):
    """{token: score} of each image."""
    generator = torch.Generator().manual_seed(seed)
    return [{token: torch.rand((), generator=generator).item() for token in image} for image in ones(batch)]


def scores_by_definition(query, key, batch, weights, scale):
    """{token: attention probability} of each image: of CLS and of the mean query, mean over both and over heads.

    `query` and `key` are (heads, M, head_dim) in raster order.
    """
    scores, start = [], 0
    for image in range(len(batch.sizes)):
        tokens = raster_tokens(batch, image)
        image_query, image_key = (one[:, start : start + len(tokens)].double() for one in (query, key))
        counts = torch.tensor([0 if token is None else weights[image][token] for token in tokens]).double()
        mean_query = (image_query * counts[:, None]).sum(dim=1, keepdim=True) / counts.sum()
        added = torch.tensor([0.0 if token is None else math.log(weights[image][token]) for token in tokens]).double()
        both = torch.cat([image_query[:, :1], mean_query], dim=1)
        received = (both @ image_key.mT * scale + added).softmax(dim=-1).mean(dim=(0, 1)).tolist()
        scores.append({token: one for token, one in zip(tokens, received, strict=True) if token is not None})
        start += len(tokens)
    return scores


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


def context_with(batch, grid, scores, draw_number=0):
    """The context tokens of a grid of the batch, as the package draws them; None where nobody would see them."""
    if not grid.has_context:
        return None
    places = zip(grid.images().tolist(), grid.rows.tolist(), grid.columns.tolist(), strict=True)
    tensor = torch.tensor([scores[image][row, column] for image, row, column in places])
    return draw_context_tokens(grid, exact_tokens(tensor, grid), draw_number)


def image_bias(batch, image, weights, context):
    """[query][key]: the logarithm of what the key counts for, in raster order with the global tokens first."""
    tokens = raster_tokens(batch, image)
    rows = []
    for query in tokens:
        counted = keys_of(batch, query, weights, context)
        rows.append([0.0 if key is None else math.log(counted[key]) if key in counted else -math.inf for key in tokens])
    return rows


def attention_by_loop(query, key, value, batch, weights, contexts, scale):
    """(heads, M, head_dim) in raster order, float64: one softmax over all keys of a query, and the correction."""
    query, key, value = (states.double().tolist() for states in (query, key, value))
    output, start = [[] for _ in query], 0

    def attend(row, head, bias):
        seen = [(start + index, added) for index, added in enumerate(bias) if added > -math.inf]
        logits = [scale * sum(a * b for a, b in zip(row, key[head][other], strict=True)) + added
                  for other, added in seen]  # fmt: skip
        pairs = list(zip(softmax(logits), (value[head][other] for other, _ in seen), strict=True))
        return [sum(weight * one[dim] for weight, one in pairs) for dim in range(len(row))]

    for image in range(len(batch.sizes)):
        tokens = raster_tokens(batch, image)
        biases = image_bias(batch, image, weights[image], contexts[image])
        total = sum(weights[image].values())
        for head, rows in enumerate(output):
            queries = query[head][start : start + len(tokens)]
            patches = [(weights[image][token], row) for token, row in zip(tokens, queries, strict=True) if token]
            mean = [sum(weight * row[dim] for weight, row in patches) / total for dim in range(len(queries[0]))]
            of_all = attend(mean, head, biases[0])  # the first query is a global token, which sees all
            for token, row, bias in zip(tokens, queries, biases, strict=True):
                attended = attend(row, head, bias)
                if token is not None and contexts[image]:
                    of_block = attend(mean, head, bias)
                    attended = [sum(parts) - less for *parts, less in zip(attended, of_all, of_block, strict=True)]
                rows.append(attended)
        start += len(biases)
    return torch.tensor(output, dtype=torch.float64)


def biased_attention(query, key, value, batch, weights, contexts, scale):
    """The same as differentiable torch operations; (heads, M, head_dim) in raster order."""
    outputs, start = [], 0
    for image in range(len(batch.sizes)):
        bias = torch.tensor(image_bias(batch, image, weights[image], contexts[image]), dtype=torch.float64)
        tokens = slice(start, start + len(bias))
        image_query, image_key, image_value = (states[:, tokens].double() for states in (query, key, value))
        logits = image_query @ image_key.transpose(1, 2) * scale + bias
        attended = logits.softmax(dim=-1) @ image_value
        if contexts[image]:
            first = batch.num_global_tokens
            counts = torch.tensor([weights[image][token] for token in batch.positions(image)]).double()
            mean = (image_query[:, first:] * counts[:, None]).sum(dim=1, keepdim=True) / counts.sum()
            of_mean = (mean @ image_key.mT * scale + bias).softmax(dim=-1) @ image_value
            correction = of_mean[:, :1] - of_mean[:, first:]
            attended = torch.cat([attended[:, :first], attended[:, first:] + correction], dim=1)
        outputs.append(attended)
        start += len(bias)
    return torch.cat(outputs, dim=1)


def left_after_pruning(weights, kept, side):
    """{token: weight} of the kept tokens and of one removed token a cell, of one image."""
    removed = {token: weight for token, weight in weights.items() if token not in kept}
    cells = {}
    for row, column in removed:
        cells.setdefault((row // side, column // side), []).append((row, column))
    left = {token: weights[token] for token in kept}
    for tokens in cells.values():
        total = sum(removed[token] for token in tokens)
        middle = [Fraction(sum(token[axis] * removed[token] for token in tokens), total) for axis in range(2)]
        nearest = min(tokens, key=lambda token: (sum((token[axis] - middle[axis]) ** 2 for axis in range(2)), token))
        left[nearest] = total
    return left
