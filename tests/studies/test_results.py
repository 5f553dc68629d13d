# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import pytest

from studies.results import append_rows


def test_rows_are_appended_to_those_of_earlier_runs(tmp_path):
    path = tmp_path / "results" / "results.csv"
    append_rows(path, [{"model": "a", "seconds": 1}])
    append_rows(path, [{"model": "b", "seconds": 2.5}])
    assert path.read_text().split() == ["model,seconds", "a,1", "b,2.5"]
    assert [entry.name for entry in path.parent.iterdir()] == ["results.csv"]


def test_earlier_rows_are_empty_in_new_columns(tmp_path):
    path = tmp_path / "results.csv"
    append_rows(path, [{"model": "a", "seconds": 1}])
    append_rows(path, [{"model": "b", "compiled": True, "seconds": 2}])
    assert path.read_text().split() == ["model,compiled,seconds", "a,,1", "b,True,2"]


def test_a_file_of_something_else_is_left_alone(tmp_path):
    path = tmp_path / "results.csv"
    append_rows(path, [{"model": "a", "accuracy": 1}])
    with pytest.raises(ValueError, match=r"has the columns \['accuracy'\], which the new rows lack"):
        append_rows(path, [{"model": "b", "seconds": 2}])
    assert path.read_text().split() == ["model,accuracy", "a,1"]
