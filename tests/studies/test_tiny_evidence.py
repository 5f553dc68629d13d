# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The evidence script on small regions of real tissue, laid out as the shared data are."""

import csv

import numpy as np
import pytest
from PIL import Image
from run_script import load_study
from skimage.data import immunohistochemistry
from small_models import small_model

from sparsepath_vit import SparsePathViTImageProcessor, SparsePathViTModel
from studies.regions import OSTEOSARCOMA, osteosarcoma_regions

tiny_evidence = load_study("tiny_evidence")


def with_glass(left, top, share):
    """A square of the bundled tissue image, its own gaps stained, whose right side is empty slide."""
    pixels = immunohistochemistry()[top : top + 160, left : left + 160] // 2 + np.array([120, 60, 90], np.uint8)
    pixels[:, round(160 * (1 - share)) :] = 238
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    (folder / "data" / "rois").mkdir(parents=True)
    with_glass(0, 0, 0.5).save(folder / "data" / tiny_evidence.CMU1, quality=95)
    for number, label in enumerate(("non_tumor", "non_viable_tumor", "viable_tumor")):
        (folder / "data" / OSTEOSARCOMA / label).mkdir(parents=True)
        for block in range(2):
            name = f"Case-{number}-A{block}-100-200_{block}.jpg"
            with_glass(100 * number, 150 * block, 0.3 * block).save(
                folder / "data" / OSTEOSARCOMA / label / name, quality=95
            )
    model = small_model(SparsePathViTModel, patch_size=8, image_size=64)
    model.save_pretrained(folder / "checkpoint")
    SparsePathViTImageProcessor(patch_size=8).save_pretrained(folder / "checkpoint")
    return (
        *("--data_dir", str(folder / "data"), "--checkpoint", str(folder / "checkpoint")),
        *("--sizes", "64", "--fidelity_sizes", "64,128", "--windows", "2,16", "--output_dir", str(folder / "out")),
    )


@pytest.fixture(scope="module")
def folder(arguments):
    """Where everything was written, by one run over all parts."""
    output_dir = tiny_evidence.Path(arguments[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tiny_evidence", *arguments])
        tiny_evidence.main()
    return output_dir


def rows_of(folder, name):
    with (folder / "results" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_maps_and_curves_are_drawn(folder):
    names = {path.name for path in (folder / "figures").iterdir()}
    assert names == {f"tiny_{name}.png" for name in ("prune_maps_cmu1", "prune_maps_osteosarcoma", "fidelity", "probe")}


def test_only_images_with_tissue_and_background_have_a_curve(folder):
    rows = rows_of(folder, "tiny_tissue")
    assert {row["image"] for row in rows} == {tiny_evidence.CMU1.name} | {
        f"Case-{n}-A1-100-200_1.jpg" for n in range(3)
    }
    assert len(rows) == 4 * 2 * 3  # images, weights, kinds of score
    cmu1 = [row for row in rows if row["image"] == tiny_evidence.CMU1.name]
    assert all(0.4 < float(row["background_share"]) < 0.6 for row in cmu1)
    assert all(0 <= float(row["auroc"]) <= 1 for row in rows)


def test_a_window_over_the_whole_grid_is_dense(folder):
    rows = {(row["size"], row["window_size"]): row for row in rows_of(folder, "tiny_fidelity")}
    assert float(rows["64", "16"]["cls_cosine"]) == pytest.approx(1.0, abs=1e-4)
    assert float(rows["128", "2"]["patch_cosine"]) < 0.999


def test_the_probe_compares_weights_variants_and_the_histogram(folder):
    rows = rows_of(folder, "tiny_probe")
    assert [row["features"] for row in rows] == ["colour histogram", *["trained", "random"] * 3]
    assert all(row["regions"] == "6" and len(row["predictions"]) == 6 for row in rows)
    low, value, high = (float(rows[1][f"balanced_accuracy{end}"]) for end in ("_low", "", "_high"))
    assert low <= value <= high


def test_measured_rows_are_not_measured_again(folder, arguments, run_script, monkeypatch):
    before = {path.name: path.read_bytes() for path in (folder / "results").iterdir()}
    rows = rows_of(folder, "tiny_tissue")
    path = folder / "results" / "tiny_tissue.csv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))  # as if the run had been stopped before its last row
    runs = []
    run_model = tiny_evidence.evidence.run_model
    monkeypatch.setattr(
        tiny_evidence.evidence,
        "run_model",
        lambda *given, **settings: runs.append(settings) or run_model(*given, **settings),
    )
    run_script(tiny_evidence, *arguments, "--parts", "tissue,fidelity,probe")
    assert [settings["prune_score"] for settings in runs] == [rows[-1]["prune_score"]]
    assert {path.name: path.read_bytes() for path in (folder / "results").iterdir()} == before


def test_the_block_of_a_region_is_its_name_without_coordinates(tmp_path):
    for label, name in (
        ("viable", "Case-3-A15-2939-11262_112.jpg"),
        ("non_tumor", "Case-48-P5-C18-17610-25605_104.jpg"),
    ):
        (tmp_path / OSTEOSARCOMA / label).mkdir(parents=True)
        (tmp_path / OSTEOSARCOMA / label / name).touch()
    files, labels, blocks = osteosarcoma_regions(tmp_path)
    assert [file.parent.name for file in files] == ["non_tumor", "viable"] and labels.tolist() == [0, 1]
    assert blocks == ["Case-48-P5-C18", "Case-3-A15"]
    with pytest.raises(ValueError, match="holds no classification/osteosarcoma_roi"):
        osteosarcoma_regions(tmp_path / "none")


def test_removed_background_is_counted_among_the_lowest_scores():
    scores = np.array([0.9, 0.1, 0.8, 0.2, 0.3])
    is_tissue = np.array([True, False, True, True, False])
    removed = tiny_evidence.evidence.removed_background_share
    assert removed(scores, is_tissue, 0.4) == 0.5
    assert removed(scores, is_tissue, 0.6) == pytest.approx(2 / 3)


def test_unknown_parts_are_named(arguments, run_script):
    with pytest.raises(SystemExit, match="--parts maps2 unknown: choose from maps, tissue"):
        run_script(tiny_evidence, *arguments, "--parts", "maps2")
