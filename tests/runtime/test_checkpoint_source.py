# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
from pathlib import Path

import pytest

from sparsepath_vit.runtime.checkpoint_source import existing_source
from sparsepath_vit.runtime.load_model import load_model


@pytest.mark.parametrize("source", ["./uni2-h", "../models/uni2-h", "~/uni2-h", "a/b/c", "uni2-h/", Path("uni2-h")])
def test_a_path_that_is_not_there_is_called_so(source, tmp_path, monkeypatch):
    """The Hub called it a malformed repository id."""
    monkeypatch.chdir(tmp_path)
    for take in (existing_source, load_model):
        with pytest.raises(FileNotFoundError, match="does not exist") as failure:
            take(source)
        assert str(tmp_path) in str(failure.value) and str(source) in str(failure.value)


def test_hub_ids_are_left_as_they_are():
    assert [existing_source(name) for name in ("MahmoodLab/UNI2-h", "gpt2")] == ["MahmoodLab/UNI2-h", "gpt2"]


def test_what_is_there_is_taken_with_the_home_folder_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert existing_source("~/owner/name") == str(tmp_path / "owner/name")
    assert existing_source("owner/name") == "owner/name"
