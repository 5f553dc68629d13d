# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import dataclasses

import pytest
import torch

from studies.benchmarks import attention_peers
from studies.benchmarks.attention import DIRECTIONS, AttentionCase, check, time_case
from studies.benchmarks.attention_peers import attention_peer

CASE = AttentionCase(400, 4, 1.0, 2, 16, torch.float32, "cpu")


def test_an_attention_over_another_pattern_is_not_timed():
    grid = CASE.grid()
    ours, dense = attention_peer("block_sparse", grid), attention_peer("sdpa_dense", grid)
    assert check(ours, CASE, grid) < 2e-5
    with pytest.raises(ValueError, match=r"block_sparse differs from float64 attention.*not timed"):
        check(dataclasses.replace(ours, attend=dense.attend), CASE, grid)


def test_unknown_peers_are_named():
    with pytest.raises(ValueError, match="peers holds flash: it takes block_sparse, sdpa_dense"):
        time_case(CASE, ["flash"], repeats=1)


def test_peers_that_do_not_apply_are_left_out_and_the_log_says_why(caplog):
    large = dataclasses.replace(CASE, tokens=4900)
    with caplog.at_level("INFO"):
        rows = time_case(large, ["reference", "block_sparse"], repeats=1)
    assert [row["attention"] for row in rows] == ["block_sparse"]
    assert "reference left out at 4,909 tokens: it keeps all logits" in caplog.text


def test_a_peer_that_runs_out_of_memory_does_not_end_the_others(caplog, monkeypatch):
    def full(*states, **options):
        raise torch.OutOfMemoryError("the GPU is full")

    monkeypatch.setattr(attention_peers, "scaled_dot_product_attention", full)
    with caplog.at_level("INFO"):
        rows = time_case(CASE, ["sdpa_dense", "block_sparse"], repeats=1)
    assert [row["attention"] for row in rows] == ["block_sparse"]
    assert "sdpa_dense left out at 409 tokens: the GPU is full" in caplog.text


def test_useful_work_counts_pairs_and_five_more_products_in_the_backward():
    forward, both = time_case(CASE, ["block_sparse"], repeats=1, directions=DIRECTIONS)
    pairs = forward["keys_per_query"] * forward["tokens"]
    tflop = [row["useful_tflop_per_second"] * row["seconds_median"] for row in (forward, both)]
    assert tflop[0] == pytest.approx(4 * pairs * 2 * 16 / 1e12, rel=0.1)  # recorded with few digits
    assert tflop[1] == pytest.approx(3.5 * tflop[0], rel=0.2)


def test_what_is_kept_lies_together_where_it_is_clustered():
    def kept_neighbours(is_clustered):
        grid = dataclasses.replace(CASE, tokens=2500, kept_share=0.4, is_clustered=is_clustered).grid()
        assert grid.counts == (1000,)
        present = torch.zeros(50, 50)
        present[grid.rows, grid.columns] = 1.0
        return (present[1:] * present[:-1]).sum().item() / 1000

    assert kept_neighbours(False) < 0.5 < 0.9 < kept_neighbours(True)
