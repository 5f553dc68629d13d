# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import time

import psutil
import pytest
import torch
from set_clock import SetClock

from sparsepath_vit.runtime import measure
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


@pytest.fixture
def clock(monkeypatch):
    clock = SetClock()
    monkeypatch.setattr(measure, "time", clock)
    return clock


def test_short_work_is_called_many_times_a_measurement(clock):
    calls = []

    def call():
        calls.append(1)
        clock.sleep(0.01)

    seconds, peak = repeatedly_measured(call, "cpu", repeats=2)
    assert seconds == pytest.approx([0.01, 0.01])
    assert len(calls) - 2 in (2 * 10, 2 * 11)  # a tenth of a second each
    assert peak > 0


def test_long_work_is_called_once_a_measurement(clock):
    calls = []
    repeatedly_measured(lambda: calls.append(clock.sleep(0.11)), "cpu", repeats=1)
    assert len(calls) == 3


def test_the_rate_of_matrix_products_counts_two_operations_per_multiply_add(clock, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", lambda left, right: clock.sleep(0.05))
    rate = matrix_flops_per_second(100, 20, 30, torch.float32, "cpu", repeats=1)
    assert rate == pytest.approx(2 * 100 * 20 * 30 / 0.05)


def test_quartiles_of_one_measurement_are_that_measurement():
    described = describe_seconds([2.0])
    assert (
        described["seconds_lower_quartile"] == described["seconds_median"] == described["seconds_upper_quartile"] == 2
    )
    assert describe_seconds([1.0, 2.0, 3.0, 10.0])["seconds_median"] == 2.5
