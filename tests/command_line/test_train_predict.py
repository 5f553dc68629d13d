# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import csv

import h5py
import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from sparsepath import console
from sparsepath.app import app


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setattr(console, "console", Console(width=200))
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize("command", ["train", "predict"])
def test_help_has_examples(invoke, command):
    result = invoke(command, "--help")
    assert result.exit_code == 0 and "Example" in result.output


def test_from_embeddings_to_predictions(invoke, tmp_path):
    features = tmp_path / "features"
    features.mkdir()
    (features / "settings.json").write_text('{"mpp": 0.5}')
    rows = ["slide,grade,case"]
    generator = np.random.default_rng(0)
    for number in range(8):
        with h5py.File(features / f"s{number}.h5", "w") as file:
            file["features"] = (generator.standard_normal((5, 4)) + 4 * (number % 2)).astype(np.float32)
        rows.append(f"s{number},{('benign', 'cancer')[number % 2]},c{number}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    options = ("--features", features, "--target", "grade", "--patient", "case", "--out", tmp_path / "model")
    result = invoke("train", tmp_path / "labels.csv", *options, "--folds", 2)
    assert result.exit_code == 0, result.output
    assert "8 slides, 8 patients, 2 folds; classes benign, cancer" in result.output
    assert "balanced_accuracy 1.000 [" in result.output
    result = invoke("predict", features, "--model", tmp_path / "model", "--out", tmp_path / "predictions.csv")
    assert result.exit_code == 0, result.output
    with open(tmp_path / "predictions.csv", newline="") as file:
        predictions = {row["slide"]: row["prediction"] for row in csv.DictReader(file)}
    assert predictions == {f"s{number}": ("benign", "cancer")[number % 2] for number in range(8)}
