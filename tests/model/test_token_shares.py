# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""How block rows are dealt, and what a process without a group is told."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import random_pixels, small_model

from sparsepath_vit import SparsePathViTModel
from sparsepath_vit.model.processes import common
from sparsepath_vit.model.token_shares import deal_rows, deal_rows_anew, in_proportion


def largest(row_ends, first_rows):
    return max(row_ends[end] - row_ends[start] for start, end in itertools.pairwise(first_rows))


@given(rows=st.lists(st.integers(0, 50), min_size=1, max_size=20), number=st.integers(1, 6))
def test_every_process_gets_rows_and_about_as_many_tokens(rows, number):
    number, row_ends = min(number, len(rows)), [0, *itertools.accumulate(rows)]
    first_rows = deal_rows(row_ends, number)
    assert (first_rows[0], first_rows[-1]) == (0, len(rows))
    assert all(start < end for start, end in itertools.pairwise(first_rows))
    if len(rows) >= 3 * number and min(rows) > 25:  # each gets a whole row more or less
        assert largest(row_ends, first_rows) <= row_ends[-1] / number + max(rows)


def test_rows_stay_where_they_are_until_they_are_uneven():
    assert deal_rows([0, 10, 20, 30, 40], 2) == (0, 2, 4)
    assert deal_rows_anew([0, 6, 12, 17, 22], (0, 2, 4)) == (0, 2, 4)  # 12 of 22: 1.09 of the mean
    assert deal_rows_anew([0, 12, 24, 26, 28], (0, 2, 4)) == (0, 1, 4)
    assert deal_rows_anew([0, 28, 28, 28, 28], (0, 2, 4)) == (0, 2, 4)  # one row has all: no deal is better


def test_ranges_have_in_common():
    assert common((0, 5), (3, 9)) == (3, 5)
    assert common((0, 5), (5, 9)) is None


def test_progress_in_proportion():
    calls = []
    tell = in_proportion(calls.append, 7, 100)
    for _ in range(7):
        tell(1)
    assert sum(calls) == 100 and len(calls) == 7
    calls.clear()
    in_proportion(calls.append, 0, 100)
    assert calls == [100]


def test_without_a_process_group():
    model = small_model(SparsePathViTModel)
    with pytest.raises(RuntimeError, match="torchrun"), model.split_over_processes():
        pass
    with torch.no_grad():
        model(random_pixels(1, 9, 9))
