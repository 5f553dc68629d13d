# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Whole slides shared out over two real processes, which write what one writes."""

import h5py
import numpy as np
import pytest
import torch
from accelerate import PartialState, debug_launcher
from slide_files import stained_image, write_pyramid
from torch import distributed

from sparsepath_vit.slides import EmbedSettings, Slide, embed_slides, split_embedder
from sparsepath_vit.slides.store import SlideWriter

WHOLE = EmbedSettings(whole_slide=True, dense=True)


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    """Two slides, a file that is none, and a slide that has fewer rows of blocks than there are processes."""
    folder = tmp_path_factory.mktemp("slides")
    for number, (width, height) in enumerate([(640, 512), (500, 700)]):
        image = stained_image(width, height, [(64, 32, width - 150, height - 100)], seed=number)
        write_pyramid(folder / f"slide{number}.tiff", image)
    (folder / "broken.svs").write_text("no slide")
    write_pyramid(folder / "flat.tiff", stained_image(640, 120, [(64, 8, 400, 100)]))
    return folder


def embed_together(slides, model, out, change=None):
    """One of two processes; `change` is called with its number first."""
    torch.set_num_threads(1)
    PartialState._reset_state()
    split_embedder._TOKENS_AT_ONCE = 100  # several pieces a slide
    if change is not None:
        change(distributed.get_rank())
    report = embed_slides([slides], model, out, WHOLE, workers=1, dtype="float32", split_slide=True)
    (out / f"report of {distributed.get_rank()}").write_text(f"{report.done} {report.skipped} {len(report.failed)}")


def assert_same_files(found, expected, names=("slide0", "slide1")):
    for name in names:
        with h5py.File(found / f"{name}.h5") as file, h5py.File(expected / f"{name}.h5") as wanted:
            assert sorted(file) == sorted(wanted) and file.attrs["source"] == wanted.attrs["source"]
            for key in wanted:
                assert file[key].dtype == wanted[key].dtype and file[key].shape == wanted[key].shape, key
                assert all(np.array_equal(file[key].attrs[each], value) for each, value in wanted[key].attrs.items())
                if wanted[key].dtype.kind == "i":
                    assert (file[key][:] == wanted[key][:]).all(), key
                else:  # the features of patch tokens are float16
                    tolerance = 2e-3 if key == "patch_features" else 1e-5
                    difference = np.abs(file[key][:].astype(float) - wanted[key][:])
                    assert difference.max() <= tolerance * np.abs(wanted[key][:]).max(), key


@pytest.fixture(scope="module")
def of_one_process(slides, model_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    embed_slides([slides], model_folder, out, WHOLE, device="cpu", dtype="float32")
    return out


def test_two_processes_write_what_one_writes(slides, model_folder, tmp_path, of_one_process):
    debug_launcher(embed_together, (slides, model_folder, tmp_path), num_processes=2)
    assert_same_files(tmp_path, of_one_process)
    failures = (tmp_path / "failures.csv").read_text().splitlines()
    assert len(failures) == 3 and "1 rows of blocks for 2 processes" in "".join(failures)
    assert {(tmp_path / f"report of {rank}").read_text() for rank in (0, 1)} == {"2 0 2"}
    debug_launcher(embed_together, (slides, model_folder, tmp_path), num_processes=2)
    assert (tmp_path / "report of 1").read_text() == "0 2 2"


def cannot_read_slide0(rank):
    """The second process cannot: its disk is gone."""
    read_region = Slide.read_region

    def failing(self, *arguments, **settings):
        if rank == 1 and "slide0" in str(self.path):
            raise OSError("the network folder is gone")
        return read_region(self, *arguments, **settings)

    Slide.read_region = failing


def cannot_write_slide0(rank):
    """The first process cannot, in the middle of what the second one sends."""
    append = SlideWriter.append

    def failing(self, **rows):
        if "slide0" in str(self._path) and "features" not in rows:
            raise RuntimeError("cannot be written")
        append(self, **rows)

    SlideWriter.append = failing


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            cannot_read_slide0,
            "OtherProcessError: Process 1 of 2 stopped all of them: OSError: the network folder is gone",
        ),
        (cannot_write_slide0, "RuntimeError: cannot be written"),
    ],
    ids=["reading", "writing"],
)
def test_what_fails_in_one_process_is_one_row_and_the_next_slide_follows(
    slides, model_folder, tmp_path, of_one_process, change, reason
):
    debug_launcher(embed_together, (slides, model_folder, tmp_path, change), num_processes=2)
    assert_same_files(tmp_path, of_one_process, ["slide1"])
    assert not (tmp_path / "slide0.h5").exists()
    (row,) = [row for row in (tmp_path / "failures.csv").read_text().splitlines() if "slide0" in row]
    assert reason in row
    assert {(tmp_path / f"report of {rank}").read_text() for rank in (0, 1)} == {"1 0 3"}


class TestRefused:
    def refusal(self, slides, model_folder, tmp_path, settings=WHOLE):
        with pytest.raises(ValueError) as error:
            embed_slides([slides], model_folder, tmp_path / "out", settings, device="cpu", split_slide=True)
        assert not (tmp_path / "out").exists()
        return str(error.value)

    def test_a_single_process(self, slides, model_folder, tmp_path):
        assert "torchrun" in self.refusal(slides, model_folder, tmp_path)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"whole_slide": False}, "--whole-slide"),
            ({"tile_size": 64}, "tile_size=64"),
            ({"dense": True, "attention": "mean"}, "attention='mean'"),
        ],
        ids=["regions", "tiles", "attention"],
    )
    def test_what_needs_the_tokens_of_all(self, slides, model_folder, tmp_path, monkeypatch, settings, message):
        settings = EmbedSettings(**{"whole_slide": True, **settings})
        monkeypatch.setattr(PartialState(), "num_processes", 2)
        assert message in self.refusal(slides, model_folder, tmp_path, settings)
