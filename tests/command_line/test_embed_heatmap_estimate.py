# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import h5py
import pytest
from accelerate import PartialState
from rich.console import Console
from slide_files import stained_image, write_pyramid
from typer.testing import CliRunner

from sparsepath import console
from sparsepath.app import app

runner = CliRunner()


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setattr(console, "console", Console(width=200))
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


@pytest.mark.parametrize("command", ["embed", "heatmap", "estimate"])
def test_help_has_examples(invoke, command):
    result = invoke(command, "--help")
    assert result.exit_code == 0 and "Example" in result.output


def test_embed_then_heatmap(invoke, small_slide, model_folder, tmp_path):
    options = ("--model", model_folder, "--device", "cpu")
    result = invoke("embed", small_slide, "--out", tmp_path / "out", "--region-size", 256, "--dense", *options)
    assert result.exit_code == 0, result.output
    assert "1 slides embedded" in result.output and "in the model" in result.output and "peak memory" in result.output
    with h5py.File(tmp_path / "out/small.h5") as file:
        assert len(file["features"]) > 1 and "patch_features" in file
    result = invoke("heatmap", small_slide, tmp_path / "out/small.h5", "--value", "kept", "--out", tmp_path / "maps")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {"small_kept.png", "small_kept.geojson"}


def test_embed_says_by_its_exit_code_that_a_slide_failed(invoke, small_slide, model_folder, tmp_path):
    (tmp_path / "notes.svs").write_text("only text")
    options = ("--model", model_folder, "--out", tmp_path / "out", "--device", "cpu", "--whole-slide")
    result = invoke("embed", small_slide, tmp_path / "notes.svs", *options)
    assert result.exit_code == 1 and "1 failed" in result.output and "failures.csv" in result.output
    assert (tmp_path / "out/small.h5").exists()


def test_only_the_first_of_several_processes_ends_with_an_error(invoke, model_folder, tmp_path, monkeypatch):
    """When another one ended first, torchrun stopped the first process, which had not printed its report yet."""
    (tmp_path / "notes.svs").write_text("only text")
    monkeypatch.setattr(PartialState, "is_main_process", False)
    options = ("--model", model_folder, "--out", tmp_path / "out", "--device", "cpu")
    result = invoke("embed", tmp_path / "notes.svs", *options)
    assert (result.exit_code, result.stdout) == (0, "")


def test_the_resolution_asked_for_is_not_the_slides_own(invoke, model_folder, tmp_path):
    path = write_pyramid(tmp_path / "unstated.tiff", stained_image(640, 512, [(64, 96, 384, 256)]), mpp=None)
    options = ("--model", model_folder, "--device", "cpu", "--region-size", 256)
    refused = invoke("embed", path, "--out", tmp_path / "out", "--mpp", 0.5, *options)
    assert refused.exit_code == 1
    reason = (tmp_path / "out/failures.csv").read_text()
    assert "does not state its resolution" in reason and "--slide-mpp 0.25" in reason
    assert invoke("embed", path, "--out", tmp_path / "out", "--slide-mpp", 0.5, *options).exit_code == 0


def test_estimate_prints_tokens_flops_time_and_memory(invoke, small_slide, model_folder):
    for subject in ((small_slide, "--whole-slide"), ("--size", 320)):
        result = invoke("estimate", *subject, "--model", model_folder, "--device", "cpu", "--prune-ratio", 0.25)
        assert result.exit_code == 0, result.output
        for word in ("tissue tokens", "after pruning", "TFLOP", "time in the model", "peak memory"):
            assert word in result.output
    assert "400 (100% of all)" in result.output and "300" in result.output
    result = invoke("estimate", "--size", 320, "--model", model_folder, "--device", "cpu", "--processes", 2)
    assert "peak memory, each of 2 processes" in result.output


def test_estimate_knows_published_models_by_their_hub_id_and_says_what_it_takes(invoke):
    """Regression: the Hub was asked for a configuration that is timm's, and a wrong name was one of `architecture`."""
    assert invoke("estimate", "--size", 28, "--model", "bioptimus/H0-mini", "--device", "cpu").exit_code == 0
    error = invoke("estimate", "--size", 28, "--model", "uni3").exception
    assert str(error).startswith(
        "model='uni3' is no folder here, and no Hub id (owner/name): architecture='uni3' is unknown"
    )
