# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import time

import psutil
import torch

from sparsepath_vit.analysis.measure import describe_run, measured


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
