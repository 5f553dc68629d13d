# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Cells, the draw and the list of context tokens against their definition, and that the draw has no bias."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stratified_definition import cell_side as side_by_definition
from stratified_definition import (
    context_with,
    contexts_of,
    grid_with,
    number_of_place,
    ones,
    random_scores,
    random_weights,
)
from token_batches import Batch, batches, sees

from sparsepath_vit import TokenGrid
from sparsepath_vit.model.context_tokens import draw_context_tokens, exact_tokens, num_exact_tokens
from sparsepath_vit.model.stratified_sampling import cell_side, draw_from_cells

NUMBERS = st.sampled_from([1, 3, 5, 9, 20, 1000])


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 2000))
def test_cells_are_the_smallest_that_suffice(rows, columns, number):
    side = cell_side((rows, columns), number)
    assert side == side_by_definition(rows, columns, number)
    assert math.ceil(rows / side) * math.ceil(columns / side) <= number


@pytest.mark.parametrize("rows, number, side", [(50, 961, 2), (50, 2500, 1), (73, 961, 3), (245, 961, 8)])
def test_sides_of_square_grids(rows, number, side):
    assert cell_side((rows, rows), number) == side


def places_and_weights(grid, context, image):
    """{(row, column): what it stands for} of an image's context tokens."""
    indices = {int(packed): index for index, packed in enumerate(grid.patch_indices())}
    start = sum(context.counts[:image])
    entries = slice(start, start + context.counts[image])
    counted = {}
    for token, weight in zip(context.tokens[entries].tolist(), context.weights[entries].tolist(), strict=True):
        if weight:
            place = int(grid.rows[indices[token]]), int(grid.columns[indices[token]])
            assert int(grid.images()[indices[token]]) == image and place not in counted
            counted[place] = weight
    return counted


@given(batches(), NUMBERS, st.integers(0, 99), st.booleans())
def test_context_tokens_follow_the_definition_and_are_those_of_each_image_alone(batch, number, seed, is_weighted):
    batch = batch._replace(num_context_tokens=number)
    weights = random_weights(batch, seed) if is_weighted else ones(batch)
    grid = grid_with(batch, weights) if is_weighted else batch.grid()
    scores = random_scores(batch, seed)
    context = context_with(batch, grid, scores, draw_number=seed)
    if context is None:
        assert grid.is_dense
        return
    window = batch.window_size or max(grid.canvas_size)
    expected = contexts_of(batch, weights, scores, seed)
    for image in range(len(batch.sizes)):
        counted = places_and_weights(grid, context, image)
        assert counted == expected[image]
        assert sum(counted.values()) == sum(weights[image].values()) and len(counted) <= context.counts[image] <= number
    drawn = context.weights > 0
    patch_of = {int(packed): index for index, packed in enumerate(grid.patch_indices())}
    patches = torch.tensor([patch_of[token] for token in context.tokens[drawn].tolist()], dtype=torch.int64)
    assert torch.equal(context.block_rows[drawn], grid.rows[patches] // window)
    assert torch.equal(context.block_columns[drawn], grid.columns[patches] // window)


def test_exact_tokens_are_the_highest_and_of_equal_ones_the_first():
    grid = TokenGrid.create([(24, 24), (3, 4)], num_global_tokens=1, window_size=4, num_context_tokens=40)
    assert num_exact_tokens(grid) == (20, 0)  # the second image has a context token for each of its tokens
    scores = torch.zeros(588)
    scores[[7, 300]] = torch.tensor([0.5, 1.0])
    assert exact_tokens(scores, grid).tolist() == [300, 7, *range(7), *range(8, 19)]
    many = TokenGrid.create([(40, 40)], num_global_tokens=1, window_size=4, num_context_tokens=1024)
    assert num_exact_tokens(many) == (63,)


@given(st.integers(0, 2**40), st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 2**20)), min_size=1))
def test_the_hash_is_that_of_unbounded_integers(seed, places):
    """One token a cell: all are drawn. The times are compared through the draw of pairs."""
    rows, columns = (torch.tensor(part) for part in zip(*places, strict=True))
    pairs = torch.zeros(len(places), dtype=torch.int64)
    drawn = draw_from_cells(pairs, 1, rows, columns, None, seed=seed)
    numbers = [number_of_place(row, column, seed) for row, column in places]
    assert drawn.tokens.tolist() == [numbers.index(max(numbers))]


def test_each_draw_is_another_and_weights_of_one_change_nothing():
    grid = TokenGrid.create([(24, 24)], num_global_tokens=1, window_size=4, num_context_tokens=72)
    weighted = grid.select(torch.arange(576), [576], torch.ones(576, dtype=torch.int64))
    tokens = [draw_context_tokens(grid, draw=draw).tokens for draw in range(4)]
    assert torch.equal(draw_context_tokens(weighted).tokens, tokens[0]) and len(tokens[0]) == 36
    same = [(one == other).float().mean() for i, one in enumerate(tokens) for other in tokens[:i]]
    assert max(same) < 0.3  # by chance 1 / 16
    assert torch.equal(draw_context_tokens(grid, draw=2).tokens, tokens[2])


def test_tokens_of_weight_zero_are_never_drawn():
    rows, columns = torch.arange(12) // 4, torch.arange(12) % 4
    weights = torch.tensor([0, 0, 1, 0, 0, 0, 0, 0, 5, 0, 0, 2])
    drawn = draw_from_cells(rows, 4, rows, columns, weights, seed=0)
    assert drawn.tokens[0] == 2 and drawn.tokens[1] == 12 and drawn.tokens[2] in (8, 11) and drawn.tokens[3] == 12
    assert drawn.weights.tolist() == [1, 0, 7, 0]


def test_each_token_of_a_cell_is_drawn_as_often_as_its_share_of_the_weight():
    """Chi-squared over 2,000 seeds: its mean is the degrees of freedom, its standard deviation their double's root."""
    weights = {(row, column): 1 + (3 * row + column) % 7 for row in range(4) for column in range(4)}
    rows, columns = (torch.tensor(part) for part in zip(*weights, strict=True))
    times = Counter()
    for seed in range(2000):
        drawn = draw_from_cells(
            torch.zeros_like(rows), 1, rows, columns, torch.tensor(list(weights.values())), seed=seed
        )
        times[int(drawn.tokens[0])] += 1
    total = sum(weights.values())
    expected = [2000 * weight / total for weight in weights.values()]
    statistic = sum((times[token] - mean) ** 2 / mean for token, mean in enumerate(expected))
    assert abs(statistic - 15) < 4 * math.sqrt(2 * 15)


@pytest.mark.parametrize("number", [144 + 63, 2 * 36, 2 * 9], ids=["cells of 2 x 2", "4 x 4", "8 x 8"])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_numerator_and_denominator_of_a_query_are_unbiased(number, is_weighted):
    """Over 2,000 draws the mean of both sums is that over all keys, within 4 standard errors."""
    batch = Batch([(24, 24)], None, 4, 1, 1, number)
    weights = random_weights(batch, 3) if is_weighted else ones(batch)
    grid = grid_with(batch, weights)
    query = (9, 13)
    tokens = list(zip(grid.rows.tolist(), grid.columns.tolist(), strict=True))
    is_near = torch.tensor([sees(batch, query, token) for token in tokens])
    chosen = exact_tokens(torch.rand(len(tokens), generator=torch.Generator().manual_seed(1)), grid)
    generator = torch.Generator().manual_seed(0)
    exponentials = torch.randn(len(tokens), generator=generator, dtype=torch.float64).exp()
    values = torch.stack([exponentials, exponentials * torch.randn(len(tokens), generator=generator)], dim=1)
    exact = values * grid.weights[:, None]
    estimates = []
    for draw in range(2000):
        context = draw_context_tokens(grid, chosen, draw)
        patches = context.tokens - 1  # behind one global token; the last entry of an empty cell weighs nothing
        is_far = ~is_near[patches] & (context.weights > 0)
        far = (values[patches] * context.weights[:, None])[is_far]
        estimates.append(exact[is_near].sum(dim=0) + far.sum(dim=0))
    estimates = torch.stack(estimates)
    standard_error = estimates.std(dim=0) / 2000**0.5
    assert (standard_error > 0).all()
    assert ((estimates.mean(dim=0) - exact.sum(dim=0)).abs() < 4 * standard_error).all()


def test_cells_without_a_sample_are_refused():
    with pytest.raises(ValueError, match=r"num_samples=0 is not possible: it must be at least 1"):
        cell_side((3, 3), 0)


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match=r"num_context_tokens=-1 is not possible: it must be at least 0"):
        TokenGrid.create([(3, 3)], num_global_tokens=1, window_size=2, num_context_tokens=-1)
