# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import urllib.request

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sparsepath import console
from sparsepath.app import app

pytest.importorskip("bokeh", reason="needs the extra view")

from sparsepath_vit.slides.view import SlideViewer

runner = CliRunner()


@pytest.fixture
def invoke(monkeypatch):
    """Runs the command; the page is asked for once instead of until Ctrl-C."""
    monkeypatch.setattr(console, "console", Console(width=200))
    answers = []

    def wait(viewer):
        answers.append(urllib.request.urlopen(viewer.url, timeout=20).status)
        viewer.stop()

    monkeypatch.setattr(SlideViewer, "wait", wait)

    def run(*arguments):
        result = runner.invoke(app, ["view", *map(str, arguments)], env={"COLUMNS": "200"})
        return result, answers

    return run


def test_a_slide_is_embedded_and_shown(invoke, small_slide, model_folder, tmp_path):
    options = ("--no-browser", "--out", tmp_path / "out", "--device", "cpu")
    result, answers = invoke(small_slide, "--model", model_folder, *options)
    assert result.exit_code == 0, result.output
    assert answers == [200] and "http://127.0.0.1:" in result.output and "1 slides embedded" in result.output
    result, answers = invoke(small_slide, "--embedding", tmp_path / "out", "--no-browser")
    assert result.exit_code == 0 and answers == [200, 200]


def test_the_address_is_opened(invoke, small_slide, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    result, _ = invoke(small_slide)
    assert result.exit_code == 0 and opened[0] in result.output


def test_a_model_and_an_embedding_are_one_too_many(invoke, small_slide, model_folder):
    result, answers = invoke(small_slide, "--model", model_folder, "--embedding", "some.h5", "--no-browser")
    assert isinstance(result.exception, ValueError) and "not embedded yet" in str(result.exception) and not answers
