# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import errno
import json
import multiprocessing
import os
import resource
import signal
import time

import h5py
import numpy as np
import pytest

from sparsepath_vit.slides.store import EmbeddingStore, StoreError, remove_stale_files, write_atomically

SETTINGS = {"mpp": 0.5, "region_size": 1120, "model": {"hidden_size": 32}, "sizes": (1, 2)}
SOURCE = {"file": "a.svs", "bytes": 7, "mpp": None, "boxes": []}


def fill(store, name="a", rows=(3, 5), source=SOURCE):
    generator = np.random.default_rng(0)
    with store.writer(name, source) as writer:
        for count in rows:
            features = generator.standard_normal((count, 32)).astype(np.float32)
            writer.append(features=features, coords=np.arange(2 * count).reshape(count, 2), labels=["tumour"] * count)
        writer.describe("coords", {"patch_size": 1120, "patch_size_level0": 2240})
    return store.path_of(name)


def test_file_holds_what_was_appended(tmp_path):
    path = fill(EmbeddingStore(tmp_path / "out", SETTINGS))
    with h5py.File(path) as file:
        expected = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
        assert (file["features"][:] == expected).all() and file["features"].dtype == np.float32
        assert file["coords"][:].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
        assert dict(file["coords"].attrs) == {"patch_size": 1120, "patch_size_level0": 2240}
        assert file["labels"].asstr()[:].tolist() == ["tumour"] * 8
        assert json.loads(file.attrs["source"]) == SOURCE and json.loads(file.attrs["settings"])["mpp"] == 0.5
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.h5", "settings.json"]


def test_same_input_gives_the_same_bytes(tmp_path):
    first = fill(EmbeddingStore(tmp_path / "one", SETTINGS)).read_bytes()
    time.sleep(1.1)  # HDF5 could store times in seconds
    assert fill(EmbeddingStore(tmp_path / "two", SETTINGS)).read_bytes() == first


def test_done_is_done_with_the_same_settings_and_source_only(tmp_path):
    store = EmbeddingStore(tmp_path, SETTINGS)
    assert not store.is_done("a", SOURCE)
    fill(store)
    assert EmbeddingStore(tmp_path, SETTINGS).is_done("a", SOURCE)
    with pytest.raises(StoreError, match=r"a\.h5 was made from .*'bytes': 7.*, not from .*'bytes': 8"):
        store.is_done("a", {**SOURCE, "bytes": 8})


CONTENT = {**SOURCE, "content": "one", "place": "here"}


def test_slide_that_changed_where_it_lies_is_made_again_and_another_one_of_its_name_is_refused(tmp_path, caplog):
    store = EmbeddingStore(tmp_path, SETTINGS)
    fill(store, source=CONTENT)
    assert store.is_done("a", CONTENT) and store.is_done("a", {**CONTENT, "place": "moved"})
    assert not caplog.text
    assert not store.is_done("a", {**CONTENT, "content": "two"}) and "its slide has changed since" in caplog.text
    assert not store.is_done("a", {**CONTENT, "content": "two", "bytes": 8})
    for change in ({"content": "two", "place": "there"}, {"content": "two", "mpp": 0.5}, {"bytes": 8}):
        with pytest.raises(StoreError, match="If these are two slides"):
            store.is_done("a", {**CONTENT, **change})


def test_file_of_an_earlier_version_counts_as_done_and_says_so(tmp_path, caplog):
    store = EmbeddingStore(tmp_path, SETTINGS)
    before = fill(store).read_bytes()
    assert store.is_done("a", CONTENT)
    assert "does not say what its slide held" in caplog.text and store.path_of("a").read_bytes() == before
    with pytest.raises(StoreError, match="was made from"):
        store.is_done("a", {**CONTENT, "bytes": 8})


def test_labels_are_replaced_and_nothing_else(tmp_path):
    store = EmbeddingStore(tmp_path, SETTINGS)
    path = fill(store, rows=(2, 1))
    with h5py.File(path) as file:
        features, attributes = file["features"][:], dict(file.attrs)
    assert store.labels("a") == (None, ["tumour"] * 3)
    for labels in (("grade 3", ["benign", "", "tümor"]), (None, None), ("x", ["a", "b", "c"])):
        store.set_labels("a", *labels)
        assert store.labels("a") == labels
        with h5py.File(path) as file:
            assert (file["features"][:] == features).all() and dict(file.attrs) == attributes
            assert file["coords"].attrs["patch_size"] == 1120
    with pytest.raises(StoreError, match="holds 3 regions, and 2 labels were given"):
        store.set_labels("a", None, ["a", "b"])
    assert store.labels("a") == ("x", ["a", "b", "c"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.h5", "settings.json"]


def test_labels_on_a_full_disk_leave_the_old_file(tmp_path):
    store = EmbeddingStore(tmp_path, SETTINGS)
    whole = fill(store).read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) // 2, before[1]))
    try:
        with pytest.raises(OSError) as raised:
            store.set_labels("a", "grade 3", None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG and store.path_of("a").read_bytes() == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.h5", "settings.json"]


def test_what_was_left_out_is_listed_for_the_last_run(tmp_path):
    store = EmbeddingStore(tmp_path, SETTINGS)
    store.record_left_out([("b, c.svs", "a dead link")])
    assert (tmp_path / "left_out.csv").read_text() == 'path,reason\n"b, c.svs",a dead link\n'
    store.record_left_out([])
    assert not (tmp_path / "left_out.csv").exists()


def test_settings_are_not_mixed_and_the_difference_is_named(tmp_path):
    EmbeddingStore(tmp_path, SETTINGS)
    EmbeddingStore(tmp_path, dict(reversed(SETTINGS.items())))
    with pytest.raises(StoreError, match=r"\(mpp: 0\.5 there, 1\.0 now; overlap: None there, 3 now\)"):
        EmbeddingStore(tmp_path, {**SETTINGS, "mpp": 1.0, "overlap": 3})


def test_file_of_another_folder_is_not_taken_for_done(tmp_path):
    path = fill(EmbeddingStore(tmp_path / "one", SETTINGS))
    store = EmbeddingStore(tmp_path / "two", {**SETTINGS, "mpp": 1.0})
    store.path_of("a").write_bytes(path.read_bytes())
    with pytest.raises(StoreError, match="was not made with the settings of this folder"):
        store.is_done("a", SOURCE)


@pytest.mark.parametrize("content", [b"", b"\x89HDF", None], ids=["empty", "cut short", "foreign"])
def test_damaged_file_is_made_again(tmp_path, content, caplog):
    store = EmbeddingStore(tmp_path, SETTINGS)
    path = fill(store)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert not store.is_done("a", SOURCE)
    assert "is made again" in caplog.text
    assert fill(store).read_bytes() == whole


def test_damaged_settings_are_named(tmp_path):
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(StoreError, match=r"settings\.json is damaged"):
        EmbeddingStore(tmp_path, SETTINGS)


def test_regions_that_were_left_out_are_read_back(tmp_path):
    store = EmbeddingStore(tmp_path, SETTINGS)
    fill(store)
    with store.writer("b", SOURCE) as writer:
        writer.append(features=np.ones((1, 4)), skipped_regions=np.array([[1, 2, 3, 4], [5, 6, 7, 8]]))
    assert store.skipped_regions("a") == [] and store.skipped_regions("b") == [(1, 2, 3, 4), (5, 6, 7, 8)]


def test_nothing_stays_of_a_slide_that_fails(tmp_path):
    store = EmbeddingStore(tmp_path, SETTINGS)
    with pytest.raises(KeyError), store.writer("a", SOURCE) as writer:
        writer.append(features=np.ones((3, 4)))
        raise KeyError("a tile")
    assert [file.name for file in tmp_path.iterdir()] == ["settings.json"]


def test_old_file_stays_until_the_new_one_is_complete(tmp_path):
    store = EmbeddingStore(tmp_path, SETTINGS)
    whole = fill(store).read_bytes()
    with pytest.raises(KeyError), store.writer("a", SOURCE) as writer:
        writer.append(features=np.ones((3, 4)))
        raise KeyError("a tile")
    assert store.path_of("a").read_bytes() == whole


@pytest.mark.parametrize("limit", [0, 100, 2000, 100_000, 600_000, 1_000_000])
def test_full_disk_is_an_error_and_nothing_stays(tmp_path, limit):
    """HDF5 itself cannot close such a file, and crashes the process when it ends."""
    store = EmbeddingStore(tmp_path, SETTINGS)
    kept = fill(store, "kept").read_bytes()
    rows = np.ones((500, 256), np.float32)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError) as raised, store.writer("a", SOURCE) as writer:
            for _ in range(10):
                writer.append(features=rows, coords=rows[:, :2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kept.h5", "settings.json"]
    assert store.path_of("kept").read_bytes() == kept
    with store.writer("a", SOURCE) as writer:
        writer.append(features=rows)
    with h5py.File(store.path_of("a")) as file:
        assert (file["features"][:] == rows).all()


def write_forever(folder, ready):
    store = EmbeddingStore(folder, SETTINGS)
    with store.writer("a", SOURCE) as writer:
        while True:
            writer.append(features=np.ones((10, 32)))
            ready.set()


def test_killed_process_leaves_no_file_and_a_running_one_is_left_alone(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=write_forever, args=(tmp_path, ready), daemon=True)
    process.start()
    assert ready.wait(120)
    EmbeddingStore(tmp_path, SETTINGS)
    assert len(list(tmp_path.glob("*.tmp"))) == 1
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(list(tmp_path.glob("*.tmp"))) == 1 and not (tmp_path / "a.h5").exists()
    store = EmbeddingStore(tmp_path, SETTINGS)
    assert not list(tmp_path.glob("*.tmp")) and not store.is_done("a", SOURCE)


def test_temporary_names_carry_the_process(tmp_path):
    with EmbeddingStore(tmp_path, SETTINGS).writer("a", SOURCE):
        (temporary,) = tmp_path.glob("a.h5.*.tmp")
        assert f"-{os.getpid()}." in temporary.name and not temporary.name.endswith(".h5")


def test_only_temporary_files_are_removed(tmp_path):
    for name in ("a.h5", "notes.txt", "a.h5.other-1.tmp", "work.tmp"):
        (tmp_path / name).touch()
    remove_stale_files(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.h5", "notes.txt", "work.tmp"]


def test_failures_are_recorded_and_forgotten_when_tried_again(tmp_path):
    store = EmbeddingStore(tmp_path, SETTINGS)
    assert store.failures() == []
    store.record_failure("a.svs", 'no "tissue",\nnone at all')
    store.record_failure("b, c.svs", "empty")
    assert (tmp_path / "failures.csv").read_text().startswith("slide,reason\na.svs,")
    assert store.failures() == [("a.svs", 'no "tissue", none at all'), ("b, c.svs", "empty")]
    store.forget_failures(["a.svs", "z.svs"])
    assert store.failures() == [("b, c.svs", "empty")]
    store.forget_failures(["b, c.svs"])
    assert not (tmp_path / "failures.csv").exists()


def record_failures(folder, number):
    store = EmbeddingStore(folder, SETTINGS)
    for index in range(50):
        store.record_failure(f"{number}-{index}.svs", "reason " * 20)


def test_processes_add_failures_without_tearing_rows(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=record_failures, args=(tmp_path, number)) for number in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    slides = [slide for slide, _ in EmbeddingStore(tmp_path, SETTINGS).failures()]
    assert sorted(slides) == sorted(f"{number}-{index}.svs" for number in range(4) for index in range(50))


def test_write_atomically_replaces_or_leaves(tmp_path):
    write_atomically(tmp_path / "a.txt", "one")
    write_atomically(tmp_path / "a.txt", "two")
    assert (tmp_path / "a.txt").read_text() == "two"
    with pytest.raises(IsADirectoryError):
        (tmp_path / "folder").mkdir()
        write_atomically(tmp_path / "folder", "three")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "folder"]
