# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Pruning against its definition: scores by a loop in float64, exactly K tokens, ties to the lower raster index."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import random_mask
from token_batches import Batch, batches, in_grid_order, raster_tokens, softmax

from sparsepath_vit import TokenGrid
from sparsepath_vit.model.token_pruning import kept_tokens, num_kept, prune_scores, scatter_to_map, select_tokens

HEADS, HEAD_DIM = 2, 4
KINDS = ("attention", "cls_attention", "attention_value")


def random_states(batch, seed, dtype=torch.float64):
    """Query, key and value, each (heads, M, head_dim) in raster order."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(len(raster_tokens(batch, image)) for image in range(len(batch.sizes)))
    return [
        (2.0 * torch.randn(HEADS, tokens, HEAD_DIM, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(3)
    ]


def scores_by_definition(query, key, value, batch, scale, kind):
    """{(image, row, column): score}: the attention from each global query, averaged over heads and global queries."""
    query, key, value = (states.double().tolist() for states in (query, key, value))
    scores, start = {}, 0
    for image in range(len(batch.sizes)):
        tokens = raster_tokens(batch, image)
        received = [0.0] * len(tokens)
        global_queries = 1 if kind == "cls_attention" else batch.num_global_tokens
        for head in range(HEADS):
            for global_query in range(start, start + global_queries):
                logits = [
                    scale * sum(a * b for a, b in zip(query[head][global_query], key[head][other], strict=True))
                    for other in range(start, start + len(tokens))
                ]
                for index, probability in enumerate(softmax(logits)):
                    norm = math.hypot(*value[head][start + index]) if kind == "attention_value" else 1.0
                    received[index] += probability * norm / (HEADS * global_queries)
        for token, score in zip(tokens, received, strict=True):
            if token is not None:
                scores[image, *token] = score
        start += len(tokens)
    return scores


def by_position(values, grid):
    keys = zip(grid.images().tolist(), grid.rows.tolist(), grid.columns.tolist(), strict=True)
    return dict(zip(keys, values.tolist(), strict=True))


def kept_by_definition(scores, batch, prune_ratio):
    """The (image, row, column) of the K highest scores of each image, ties to the lower raster index."""
    kept = []
    for image in range(len(batch.sizes)):
        present = batch.positions(image)
        count = len(present) - math.floor(prune_ratio * len(present))
        ranked = sorted(present, key=lambda token: (-scores[image, *token], token))
        kept.append(sorted(ranked[:count]))
    return kept


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(batch=batches(), seed=st.integers(0, 99))
def test_scores_follow_the_definition(kind, batch, seed):
    states = random_states(batch, seed, torch.float32)
    grid = batch.grid()
    grid_states = [in_grid_order(state, batch, grid) for state in states]
    scores = prune_scores(*grid_states, grid, scale=0.5, kind=kind)
    assert scores.dtype == torch.float32
    expected = scores_by_definition(*states, batch, 0.5, kind)
    assert by_position(scores, grid) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_does_not_round_the_scores(kind):
    """Regression: the logits were computed in bfloat16 under autocast."""
    batch = Batch([(5, 5)], None, 2, 1, 3)
    grid = batch.grid()
    states = [in_grid_order(state, batch, grid).bfloat16() for state in random_states(batch, 0)]
    expected = prune_scores(*states, grid, scale=0.5, kind=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(prune_scores(*states, grid, scale=0.5, kind=kind), expected)


def test_scores_carry_no_gradient():
    batch = Batch([(3, 3)], None, 2, 1, 2)
    grid = batch.grid()
    states = [in_grid_order(state, batch, grid).requires_grad_() for state in random_states(batch, 0)]
    assert not prune_scores(*states, grid, scale=1.0).requires_grad


@given(st.integers(1, 10_000), st.integers(0, 99))
def test_k_is_n_minus_the_floor_of_p_n(num_present, percent):
    kept = num_kept(num_present, percent / 100)
    assert kept == num_present - math.floor(percent / 100 * num_present)
    assert 1 <= kept <= num_present


@settings(max_examples=60)
@given(batches(), st.integers(0, 99), st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.9, 0.999]), st.sampled_from([2, 1000]))
def test_the_highest_scores_stay_and_ties_go_to_the_lower_raster_index(batch, seed, prune_ratio, levels):
    grid = batch.grid()
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (sum(grid.counts),), generator=generator) / levels
    kept, counts = kept_tokens(scores, grid, prune_ratio)
    expected = kept_by_definition(by_position(scores, grid), batch, prune_ratio)
    assert list(counts) == [len(tokens) for tokens in expected]
    assert kept.tolist() == sorted(kept.tolist())
    positions = zip(grid.images()[kept].tolist(), grid.rows[kept].tolist(), grid.columns[kept].tolist(), strict=True)
    assert sorted(positions) == [(image, *token) for image, tokens in enumerate(expected) for token in tokens]


def test_equal_scores_keep_the_first_tokens_in_raster_order_not_block_order():
    grid = TokenGrid.create([(4, 4)], num_global_tokens=1, window_size=2)
    kept, counts = kept_tokens(torch.zeros(16), grid, 0.625)
    assert counts == (6,)
    assert sorted((grid.rows[kept] * 4 + grid.columns[kept]).tolist()) == list(range(6))


@given(batches(), st.integers(0, 99), st.sampled_from([0.3, 0.8]))
def test_selected_tokens_are_the_kept_ones_and_all_global_tokens(batch, seed, prune_ratio):
    grid = batch.grid()
    generator = torch.Generator().manual_seed(seed)
    kept, counts = kept_tokens(torch.rand(sum(grid.counts), generator=generator), grid, prune_ratio)
    kept_grid = grid.select(kept, counts)
    labels = torch.full((grid.num_tokens, 3), -1)
    labels[grid.patch_indices()] = torch.stack([grid.images(), grid.rows, grid.columns], dim=1)
    labels[grid.global_indices(), 0] = torch.arange(len(batch.sizes)).repeat_interleave(batch.num_global_tokens)
    selected = select_tokens(labels.view(*grid.batch_shape, 3), grid, kept, kept_grid)
    assert selected.shape[:2] == kept_grid.batch_shape
    positions = iter(zip(kept_grid.rows.tolist(), kept_grid.columns.tolist(), strict=True))
    expected = []
    for image, count in enumerate(counts):
        expected += [[image, -1, -1]] * batch.num_global_tokens
        expected += [[image, *next(positions)] for _ in range(count)]
    assert selected.reshape(-1, 3).tolist() == expected


@given(batches(), st.integers(0, 99))
def test_scattering_fills_present_places_and_leaves_the_base_elsewhere(batch, seed):
    grid = batch.grid()
    tokens = torch.randn(*grid.batch_shape, 3, generator=torch.Generator().manual_seed(seed))
    rows, columns = grid.canvas_size
    base = torch.randn(len(batch.sizes), 3, rows, columns)
    for filled, empty in ((scatter_to_map(tokens, grid, -7.0), None), (scatter_to_map(tokens, grid, base), base)):
        expected = torch.full((len(batch.sizes), 3, rows, columns), -7.0) if empty is None else empty.clone()
        patch_tokens = iter(tokens.reshape(-1, 3)[grid.patch_indices()])
        for image, row, column in zip(grid.images().tolist(), grid.rows.tolist(), grid.columns.tolist(), strict=True):
            expected[image, :, row, column] = next(patch_tokens)
        assert torch.equal(filled, expected)


def test_each_image_of_a_batch_is_pruned_as_if_alone():
    batch = Batch([(6, 5), (4, 7), (6, 5)], random_mask(3, 6, 7, 0.8), 2, 1, 3)
    states = random_states(batch, 3)
    grid = batch.grid()
    scores = prune_scores(*(in_grid_order(state, batch, grid) for state in states), grid, scale=0.5)
    together = by_position(scores, grid)
    start = 0
    for image, size in enumerate(batch.sizes):
        end = start + len(raster_tokens(batch, image))
        alone = batch._replace(sizes=[size], present=batch.present[image : image + 1])
        alone_grid = alone.grid()
        alone_states = [in_grid_order(state[:, start:end], alone, alone_grid) for state in states]
        alone_scores = prune_scores(*alone_states, alone_grid, scale=0.5)
        for (_, row, column), score in by_position(alone_scores, alone_grid).items():
            assert together[image, row, column] == pytest.approx(score, rel=1e-6)
        start = end
