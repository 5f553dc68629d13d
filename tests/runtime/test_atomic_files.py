# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A file or folder is there in full or not at all, whenever its process is killed."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from sparsepath_vit.runtime.atomic_files import (
    atomic_folder,
    atomic_path,
    make_folder,
    remove_stale_files,
    restore_folder,
    write_atomically,
)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_made_with_its_parents_and_a_file_in_its_place_is_named(tmp_path):
    assert make_folder(tmp_path / "a" / "b") == make_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    (tmp_path / "a" / "file").touch()
    for name in ("file", "file/below/it"):
        with pytest.raises(
            NotADirectoryError, match=rf"^out='.*a/{name}' is no folder: .*a/file is a file\. Name a folder"
        ):
            make_folder(tmp_path / "a" / name)


def test_a_file_gets_its_name_when_the_block_ends(tmp_path):
    path = tmp_path / "map.png"
    path.write_text("earlier")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "earlier"
    assert path.read_text() == "new" and names_in(tmp_path) == ["map.png"]


def test_an_error_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "map.png"
    write_atomically(path, "earlier")
    with pytest.raises(OSError, match="disk"), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError("disk")
    assert path.read_text() == "earlier" and names_in(tmp_path) == ["map.png"]


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "replaced"])
def test_a_folder_takes_the_place_of_an_earlier_one(tmp_path, is_there):
    path = tmp_path / "deep" / "model"
    if is_there:
        path.mkdir(parents=True)
        (path / "earlier").touch()
    with atomic_folder(path) as temporary:
        (temporary / "weights").touch()
        assert (path / "earlier").exists() == is_there and not (path / "weights").exists()
    assert names_in(path) == ["weights"] and names_in(path.parent) == ["model"]


def test_an_error_leaves_the_earlier_folder_and_nothing_else(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "earlier").touch()
    with pytest.raises(OSError, match="disk"), atomic_folder(path) as temporary:
        (temporary / "half").touch()
        raise OSError("disk")
    assert names_in(path) == ["earlier"] and names_in(tmp_path) == ["model"]


def test_a_folder_is_restored_where_the_second_rename_fails(tmp_path, monkeypatch):
    path = tmp_path / "model"
    path.mkdir()
    (path / "earlier").touch()
    replace = os.replace
    monkeypatch.setattr(
        "os.replace", lambda source, target: 1 / 0 if Path(source).suffix == ".tmp" else replace(source, target)
    )
    with pytest.raises(ZeroDivisionError), atomic_folder(path):
        pass
    monkeypatch.undo()
    restore_folder(path)
    assert names_in(path) == ["earlier"]


def hold(path, is_folder, ready):
    with (atomic_folder if is_folder else atomic_path)(path) as temporary:
        (temporary / "half" if is_folder else temporary).write_text("half")
        ready.set()
        signal.pause()


@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
def test_what_a_killed_process_wrote_is_removed_and_what_a_running_one_writes_is_not(tmp_path, is_folder):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "out", is_folder, ready), daemon=True)
    process.start()
    assert ready.wait(120)
    remove_stale_files(tmp_path)
    assert names_in(tmp_path) == [f"out.{names_in(tmp_path)[0].split('.')[1]}.tmp"]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    if is_folder:
        with atomic_folder(tmp_path / "out"):  # who writes it again clears it away
            assert len(names_in(tmp_path)) == 1
    remove_stale_files(tmp_path)
    assert names_in(tmp_path) == (["out"] if is_folder else [])


def test_a_folder_that_was_moved_aside_by_a_killed_process_comes_back(tmp_path):
    (tmp_path / "model.host-1.old").mkdir()
    (tmp_path / "model.host-1.old" / "earlier").touch()
    remove_stale_files(tmp_path)  # it is all there is of the model
    restore_folder(tmp_path / "model")
    assert names_in(tmp_path) == ["model"] and names_in(tmp_path / "model") == ["earlier"]
    (tmp_path / "model.host-2.old").mkdir()
    restore_folder(tmp_path / "model")
    assert names_in(tmp_path / "model") == ["earlier"]
    remove_stale_files(tmp_path)
    assert names_in(tmp_path) == ["model"]


def test_names_that_are_not_ours_stay(tmp_path):
    for name in ("work.tmp", "notes.old", "a.b.tmp"):
        (tmp_path / name).touch()
    remove_stale_files(tmp_path)
    assert names_in(tmp_path) == ["a.b.tmp", "notes.old", "work.tmp"]
