# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import time

import psutil
import torch

from sparsepath_vit.runtime.measure import (
    describe_run,
    describe_seconds,
    matrix_flops_per_second,
    measured,
    repeatedly_measured,
)


def test_memory_that_is_given_back_still_counts_towards_the_peak():
    before = psutil.Process().memory_info().rss
    with measured() as measurement:
        held = torch.ones(64 * 2**20)  # 256 MiB, written to
        time.sleep(0.1)
        del held
    assert measurement.peak_bytes - before > 200 * 2**20
    assert measurement.seconds >= 0.1


def test_a_run_is_described_by_commit_versions_and_machine():
    described = describe_run()
    assert described["torch"] == torch.__version__
    assert all(described.values())


def test_short_work_is_called_many_times_a_measurement():
    calls = []

    def call():
        calls.append(1)
        time.sleep(0.01)

    seconds, peak = repeatedly_measured(call, "cpu", repeats=2)
    assert all(0.01 <= one < 0.05 for one in seconds) and len(seconds) == 2
    assert len(calls) - 2 >= 2 * 4  # a busy machine sleeps longer, and needs fewer calls
    assert peak > 0


def test_long_work_is_called_once_a_measurement():
    calls = []
    repeatedly_measured(lambda: calls.append(time.sleep(0.11)), "cpu", repeats=1)
    assert len(calls) == 3


def test_the_rate_of_matrix_products_counts_two_operations_per_multiply_add(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", lambda left, right: time.sleep(0.05))
    rate = matrix_flops_per_second(100, 20, 30, torch.float32, "cpu", repeats=1)
    assert 0.5 <= rate * 0.05 / (2 * 100 * 20 * 30) <= 1.0


def test_quartiles_of_one_measurement_are_that_measurement():
    described = describe_seconds([2.0])
    assert (
        described["seconds_lower_quartile"] == described["seconds_median"] == described["seconds_upper_quartile"] == 2
    )
    assert describe_seconds([1.0, 2.0, 3.0, 10.0])["seconds_median"] == 2.5
