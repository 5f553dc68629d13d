# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import csv

import pytest

pytest.importorskip("bokeh", reason="needs the extra view")

from scripts import benchmark_viewer


def test_what_is_timed_is_recorded_with_the_machine(monkeypatch, run_script, tmp_path):
    monkeypatch.setattr(benchmark_viewer, "in_browser", lambda url: None)
    out = tmp_path / "viewer.csv"
    run_script(benchmark_viewer, "--tokens", "400", "--channels", "32", "--out", str(out))
    with out.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["tokens"] == "400" and row["features_bytes"] == str(400 * 32 * 2) and row["machine"] and row["commit"]
    assert row["first_picture_in_browser_seconds"] == ""
    for name in ("open_seconds", "tile_median_seconds", "click_median_seconds"):
        assert 0 < float(row[name]) < 60
