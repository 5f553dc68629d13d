# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import csv

import pytest
import torch
from run_script import load_script

from sparsepath_vit.analysis import benchmark_attention

benchmark = load_script("benchmark")
MODEL = ("model", "--architecture", "vit-tiny-14-reg4", "--repeats", "1", "--dtype", "float32", "--device", "cpu")


def test_each_model_is_checked_timed_and_recorded(tmp_path, run_script):
    output = tmp_path / "results.csv"
    run_script(benchmark, *MODEL, "--sizes", "56,112", "--window-size", "2", "--output", str(output))
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["size"], row["model"]) for row in rows] == [
        (size, name) for size in ("56", "112") for name in benchmark.PEERS
    ]
    assert all(float(row["seconds_median"]) > 0 and row["commit"] and row["torch"] for row in rows)
    by_name = {row["model"]: row for row in rows if row["size"] == "112"}
    assert float(by_name["pruned"]["tflop"]) < float(by_name["sparse"]["tflop"]) < float(by_name["timm"]["tflop"])
    assert by_name["sparse"]["window_size"] == "2"


def test_rows_are_appended_to_those_of_earlier_runs(tmp_path):
    path = tmp_path / "results.csv"
    benchmark.append_rows(path, [{"model": "a", "seconds": 1}])
    benchmark.append_rows(path, [{"model": "b", "seconds": 2}])
    assert path.read_text().split() == ["model,seconds", "a,1", "b,2"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.csv"]


def test_a_model_that_computes_something_else_is_not_timed():
    config = benchmark.architecture("vit-tiny-14-reg4").build_config(num_hidden_layers=2)
    network = benchmark.random_timm_network(config, torch.float32)
    ours = benchmark.converted(network, config)
    dense = benchmark.architecture("vit-tiny-14-reg4").build_config(window_size=None)
    benchmark.check_against_timm(ours, network, dense)
    with torch.no_grad():
        ours.encoder.layers[1].attention.qkv.weight[0] += 0.1
    with pytest.raises(SystemExit, match="not timed: differs from timm"):
        benchmark.check_against_timm(ours, network, dense)


def test_unknown_models_are_named(run_script):
    with pytest.raises(SystemExit, match="natten unknown: choose from timm"):
        run_script(benchmark, *MODEL, "--peers", "natten")


def test_attentions_are_checked_timed_and_recorded(tmp_path, run_script):
    output = tmp_path / "attention.csv"
    arguments = ["attention", "--tokens", "400", "--windows", "4", "--heads", "2", "--head-dim", "16", "--repeats", "2"]
    arguments += ["--dtype", "float32", "--device", "cpu", "--backward", "--output", str(output)]
    run_script(benchmark, *arguments, "--contenders", "block_sparse,sdpa_dense,reference")
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 2  # kept shares, contenders, directions
    assert {row["tokens"] for row in rows} == {"409", "169"}
    assert all(float(row["difference_to_float64"]) < 2e-5 for row in rows)


def test_an_attention_over_another_pattern_is_not_timed():
    case = benchmark.AttentionCase(400, 4, 1.0, 2, 16, torch.float32, "cpu")
    grid = case.grid()
    dense = torch.nn.functional.scaled_dot_product_attention
    with pytest.raises(ValueError, match=r"block_sparse differs from float64 attention.*not timed"):
        benchmark_attention.check(dense, "block_sparse", case, grid)


def test_without_timm_each_row_still_says_what_was_run(tmp_path, run_script):
    """Regression: the model's config was that of the sparse row, which took over the pruned run's ratio."""
    output = tmp_path / "results.csv"
    run_script(benchmark, *MODEL, "--sizes", "56", "--peers", "sparse,pruned", "--output", str(output))
    with output.open() as file:
        assert [row["prune_ratio"] for row in csv.DictReader(file)] == ["0.0", "0.6"]
