# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Cells, the draw and the list of context tokens against their definition, and that the draw has no bias."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stratified_definition import cell_side as side_by_definition
from stratified_definition import context_of, draw, grid_with, number_of_place, ones, random_weights
from token_batches import Batch, batches, sees

from sparsepath_vit import TokenGrid
from sparsepath_vit.model.stratified_sampling import cell_side, draw_from_cells

NUMBERS = st.sampled_from([1, 3, 5, 9, 20, 1000])


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 2000), st.sampled_from([None, 1, 3, 8, 12]))
def test_cells_are_the_smallest_that_suffice_and_nest_with_blocks(rows, columns, number, window_size):
    side = cell_side((rows, columns), number, window_size)
    assert side == side_by_definition(rows, columns, number, window_size)
    assert math.ceil(rows / side) * math.ceil(columns / side) <= number


@pytest.mark.parametrize(
    "rows, number, window_size, side",
    [(50, 1024, 8, 2), (50, 2500, 8, 1), (50, 64, 8, 8), (50, 36, 8, 16), (245, 1024, 8, 8), (50, 300, None, 3)],
)
def test_sides_below_equal_to_and_above_the_block(rows, number, window_size, side):
    assert cell_side((rows, rows), number, window_size) == side


@given(batches(), NUMBERS, st.integers(0, 99), st.booleans())
def test_context_tokens_follow_the_definition_in_block_major_order(batch, number, seed, is_weighted):
    batch = batch._replace(num_context_tokens=number)
    weights = random_weights(batch, seed) if is_weighted else ones(batch)
    grid = grid_with(batch, weights) if is_weighted else batch.grid()
    context = grid.context_tokens()
    if context is None:
        assert grid.is_dense
        return
    counted = context.weights > 0
    num_drawn = int(counted.sum())
    assert counted[:num_drawn].all() and (context.tokens[num_drawn:] == sum(grid.counts)).all()
    tokens = context.tokens[:num_drawn]
    assert tokens.tolist() == sorted(tokens.tolist())
    places = zip(*(part[tokens].tolist() for part in (grid.images(), grid.rows, grid.columns)), strict=True)
    actual = dict(zip(places, context.weights.tolist(), strict=False))
    expected = [context_of(batch, image, weights[image]) for image in range(len(batch.sizes))]
    assert actual == {(image, *token): total for image, one in enumerate(expected) for token, total in one.items()}
    for token in range(sum(grid.counts)):  # those of a token's block lie between its entry and the next
        entry = int(grid.blocks[token])
        inside = tokens[context.offsets[entry] : context.offsets[entry + 1]]
        assert torch.equal(inside, tokens[grid.blocks[tokens] == entry])


@given(batches(), NUMBERS, st.integers(0, 99))
def test_an_image_of_a_batch_has_the_context_tokens_it_has_alone(batch, number, seed):
    batch = batch._replace(num_context_tokens=number)
    weights = random_weights(batch, seed)

    def drawn(grid):
        context = grid.draw_context_tokens()
        tokens = context.tokens[context.weights > 0]
        return list(
            zip(
                *(part[tokens].tolist() for part in (grid.images(), grid.rows, grid.columns)),
                context.weights.tolist(),
                strict=False,
            )
        )

    together = drawn(grid_with(batch, weights))
    for image, size in enumerate(batch.sizes):
        present = None if batch.present is None else batch.present[image : image + 1]
        alone = batch._replace(sizes=[size], present=present)
        expected = [(image, *rest) for _, *rest in drawn(grid_with(alone, weights[image : image + 1]))]
        assert [one for one in together if one[0] == image] == expected


@given(st.integers(0, 2**40), st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 2**20)), min_size=1))
def test_the_hash_is_that_of_unbounded_integers(seed, places):
    """One token a cell: all are drawn. The times are compared through the draw of pairs."""
    rows, columns = (torch.tensor(part) for part in zip(*places, strict=True))
    pairs = torch.zeros(len(places), dtype=torch.int64)
    drawn = draw_from_cells(pairs, 1, rows, columns, None, seed=seed)
    numbers = [number_of_place(row, column, seed) for row, column in places]
    assert drawn.tokens.tolist() == [numbers.index(max(numbers))]


def test_seeds_and_layers_decide_the_draw_and_weights_of_one_change_nothing():
    grid = TokenGrid.create([(24, 24)], num_global_tokens=1, window_size=4, num_context_tokens=36)
    weighted = grid.select(torch.arange(576), [576], torch.ones(576, dtype=torch.int64))
    shared = grid.draw_context_tokens()
    assert torch.equal(weighted.draw_context_tokens().tokens, shared.tokens)
    others = [grid.draw_context_tokens(seed=1), *(grid.draw_context_tokens(layer=layer) for layer in range(3))]
    tokens = [shared.tokens, *(other.tokens for other in others)]
    same = [(one == other).float().mean() for i, one in enumerate(tokens) for other in tokens[:i]]
    assert max(same) < 0.3  # by chance 1 / 16
    assert torch.equal(grid.draw_context_tokens(layer=2).tokens, tokens[-1])


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


@pytest.mark.parametrize("number", [144, 36, 9], ids=["cells below", "equal to", "above the block"])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_numerator_and_denominator_of_a_query_are_unbiased(number, is_weighted):
    """Over 2,000 draws the mean of both sums is that over all keys, within 4 standard errors."""
    batch = Batch([(24, 24)], None, 4, 1, 1, number)
    weights = random_weights(batch, 3) if is_weighted else ones(batch)
    grid = grid_with(batch, weights)
    query = (9, 13)
    tokens = list(zip(grid.rows.tolist(), grid.columns.tolist(), strict=True))
    is_near = torch.tensor([sees(batch, query, token) for token in tokens])
    generator = torch.Generator().manual_seed(0)
    exponentials = torch.randn(len(tokens), generator=generator, dtype=torch.float64).exp()
    values = torch.stack([exponentials, exponentials * torch.randn(len(tokens), generator=generator)], dim=1)
    exact = values * grid.weights[:, None]
    estimates = []
    for seed in range(2000):
        context = grid.draw_context_tokens(seed=seed)
        is_far = ~is_near[context.tokens]
        far = (values[context.tokens] * context.weights[:, None])[is_far]
        estimates.append(exact[is_near].sum(dim=0) + far.sum(dim=0))
    estimates = torch.stack(estimates)
    standard_error = estimates.std(dim=0) / 2000**0.5
    assert (standard_error > 0).all()
    assert ((estimates.mean(dim=0) - exact.sum(dim=0)).abs() < 4 * standard_error).all()


def test_a_draw_by_definition_covers_what_a_grid_draws_after_its_tokens_moved():
    grid = TokenGrid.create([(9, 7)], num_global_tokens=2, window_size=2, num_context_tokens=20)
    context = grid.context_tokens()
    assert grid.context_tokens() is context  # drawn once for all layers
    moved = grid.with_global_tokens(5).context_tokens()
    assert all(torch.equal(one, other) for one, other in zip(moved, context, strict=True))
    side = side_by_definition(9, 7, 20, 2)
    weights = {(row, column): 1 for row in range(9) for column in range(7)}
    places = set(zip(grid.rows[context.tokens].tolist(), grid.columns[context.tokens].tolist(), strict=True))
    assert places == {token for token, _ in draw(weights, side, 0x5EED).values()}


def test_cells_without_a_sample_are_refused():
    with pytest.raises(ValueError, match=r"num_samples=0 is not possible: it must be at least 1"):
        cell_side((3, 3), 0, 2)


def test_a_negative_number_is_refused():
    with pytest.raises(ValueError, match=r"num_context_tokens=-1 is not possible: it must be at least 0"):
        TokenGrid.create([(3, 3)], num_global_tokens=1, window_size=2, num_context_tokens=-1)
