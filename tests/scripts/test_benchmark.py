# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import csv
import sys

import pytest
from run_script import load_script

from studies.benchmarks import memory
from studies.benchmarks.model import PEERS

benchmark = load_script("benchmark")
MODEL = ("model", "--architecture", "vit-tiny-14-reg4", "--repeats", "1", "--dtype", "float32", "--device", "cpu")


def test_each_model_is_checked_timed_and_recorded(tmp_path, run_script):
    output = tmp_path / "results.csv"
    run_script(benchmark, *MODEL, "--sizes", "56,112", "--window-size", "2", "--out", str(output))
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["size"], row["model"]) for row in rows] == [(size, name) for size in ("56", "112") for name in PEERS]
    assert all(float(row["seconds_median"]) > 0 and row["commit"] and row["torch"] for row in rows)
    by_name = {row["model"]: row for row in rows if row["size"] == "112"}
    assert float(by_name["pruned"]["tflop"]) < float(by_name["sparse"]["tflop"]) < float(by_name["timm"]["tflop"])
    assert by_name["sparse"]["window_size"] == "2"
    for row in rows:
        assert bool(row["tiles_per_batch"]) == row["model"].startswith("tiles_")
        seconds_of_tiles = [float(peer["seconds_median"]) for peer in rows if peer["size"] == row["size"]][:2]
        ratio = float(row["seconds_median"]) / min(seconds_of_tiles)
        assert float(row["times_tiles"]) == pytest.approx(ratio, rel=0.02, abs=1e-3)
    for row in rows:  # recorded with four digits or more
        floor_seconds = float(row["tflop"]) / float(row["matrix_tflop_per_second"])
        assert float(row["share_of_matrix_floor"]) == pytest.approx(
            floor_seconds / float(row["seconds_median"]), abs=1e-3
        )


def test_unknown_models_are_named(run_script):
    with pytest.raises(SystemExit, match="error: peers holds natten: it takes tiles_timm, tiles_transformers, timm"):
        run_script(benchmark, *MODEL, "--peers", "natten")


def test_a_device_or_number_of_threads_that_is_not_there_is_named(run_script):
    with pytest.raises(SystemExit, match="error: device='gpu' is unknown: it takes cpu"):
        run_script(benchmark, "attention", "--device", "gpu")
    for name in ("threads", "repeats"):
        with pytest.raises(SystemExit, match=f"error: {name}=0 is not possible: one at least"):
            run_script(benchmark, *MODEL, f"--{name}", "0")


def test_kinds_of_quantisation_are_named_and_torchao_is_asked_for(run_script, monkeypatch):
    with pytest.raises(SystemExit, match="error: kinds holds int3: it takes none, int8-weights, int8, float8-weights"):
        run_script(benchmark, "quantised", "--kinds", "none,int3")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(SystemExit, match="error: torchao is needed to quantise: pip install torchao"):
        run_script(benchmark, "quantised", "--kinds", "int8")


def test_attentions_are_checked_timed_and_recorded(tmp_path, run_script):
    output = tmp_path / "attention.csv"
    arguments = ["attention", "--tokens", "400", "--windows", "4", "--heads", "2", "--head-dim", "16", "--repeats", "2"]
    arguments += ["--dtype", "float32", "--device", "cpu", "--backward", "--out", str(output)]
    run_script(benchmark, *arguments, "--peers", "block_sparse,sdpa_dense,reference")
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2  # kept shares, peers, directions
    assert {row["tokens"] for row in rows} == {"409", "169"}
    assert all(float(row["difference_to_float64"]) < 2e-5 for row in rows)


def test_without_timm_each_row_still_says_what_was_run(tmp_path, run_script):
    """Regression: the model's config was that of the sparse row, which took over the pruned run's ratio."""
    output = tmp_path / "results.csv"
    run_script(benchmark, *MODEL, "--sizes", "56", "--peers", "sparse,pruned", "--out", str(output))
    with output.open() as file:
        assert [float(row["prune_ratio"]) for row in csv.DictReader(file)] == [0.0, 0.6]


def test_dense_peers_are_left_out_of_large_images(tmp_path, run_script):
    output = tmp_path / "results.csv"
    peers = ["--peers", "dense,pruned", "--dense-up-to", "60"]
    run_script(benchmark, *MODEL, "--sizes", "56,112", *peers, "--out", str(output))
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["size"], row["model"]) for row in rows] == [("56", "dense"), ("56", "pruned"), ("112", "pruned")]


def test_peaks_of_memory_are_recorded(tmp_path, run_script):
    output = tmp_path / "memory.csv"
    arguments = [
        "memory",
        "--architecture",
        "vit-tiny-14-reg4",
        "--layers",
        "2",
        "--sizes",
        "448",
        "--dtype",
        "float32",
    ]
    settings = ["--prune-ratios", "0.6", "--prune-after-layer", "1", "--processes", "2", "--context-tokens", "0"]
    run_script(benchmark, *arguments, *settings, "--out", str(output))
    with output.open() as file:
        (row,) = csv.DictReader(file)
    assert (row["layers"], row["tokens"], row["prune_ratio"]) == ("2", str(32 * 32 + 5), "0.6")
    assert row["num_context_tokens"] == "0"
    assert int(row["hidden_states_bytes"]) == (32 * 32 + 5) * 192 * 4 and int(row["pixels_bytes"]) == 3 * 448**2
    assert float(row["times_hidden_states"]) == pytest.approx(
        int(row["peak_growth_bytes"]) / int(row["hidden_states_bytes"]), abs=1e-3
    )
    assert int(row["process_peak_bytes"]) > int(row["peak_growth_bytes"]) + int(row["weights_bytes"])


def test_peaks_of_memory_are_taken_with_context_tokens(tmp_path, run_script, monkeypatch):
    output, configurations = tmp_path / "memory.csv", []

    def measure(cases):
        """In this process: only what the models are made of counts here."""
        for case in cases:
            configurations.append(memory._model(case).config)
            yield memory._measure(case, 0, "")

    monkeypatch.setattr(benchmark, "measure_memory", measure)
    settings = ["--architecture", "vit-tiny-14-reg4", "--layers", "1", "--sizes", "224", "--prune-ratios", "0"]
    run_script(benchmark, "memory", *settings, "--context-tokens", "0,64", "--out", str(output))
    with output.open() as file:
        assert [row["num_context_tokens"] for row in csv.DictReader(file)] == ["0", "64"]
    assert [config.num_context_tokens for config in configurations] == [0, 64]
