# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The notebooks run as they are, and what they show is small and holds nothing of the machine they ran on."""

import nbformat
import pytest
from places import ROOT
from test_documentation import load_of_docs

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
# What a reader is told in the sentences between the cells, found again in what the cells print.
TOLD = {
    "from_image_to_prune_map": ("last_hidden_state (1, 1301, 192)", "last_hidden_state (1, 524, 192)"),
    "from_slides_to_classifier": (
        "16 slides, 64 regions, 0 failed",
        "features of 8 patients",
        "balanced accuracy 1.00",
    ),
}
MOST_BYTES = 300_000


def printed(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def test_there_is_a_notebook_for_each_of_the_promises():
    assert set(NAMES) == set(TOLD)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_notebooks_run(path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    notebook = load_of_docs("run_notebooks").executed(path)
    for told in TOLD[path.stem]:
        assert told in printed(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_what_is_kept_of_a_run_is_small_and_the_same_everywhere(path):
    assert path.stat().st_size <= MOST_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert all(cell.execution_count is None for cell in code)
    assert not {output.get("name") for cell in code for output in cell.outputs} - {"stdout", None}
    text = printed(notebook) + "".join(cell.source for cell in notebook.cells)
    assert not [word for word in text.split() if word.startswith(("/home", "/root", "/tmp", "/work", "C:\\"))]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_what_is_kept_is_what_the_sentences_tell(path):
    for told in TOLD[path.stem]:
        assert told in printed(nbformat.read(path, as_version=4)), "make notebooks"
