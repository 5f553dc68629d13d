# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import csv

import numpy as np
import pytest
import torch
from PIL import Image
from places import SHARED_DATA
from run_script import load_study
from small_models import small_model

from sparsepath_vit import SparsePathViTImageProcessor, SparsePathViTModel
from sparsepath_vit.tasks.classification.roi_files import save_roi_dataset
from sparsepath_vit.tasks.classification.rois import Roi, RoiDataset
from studies.resolution_sweep import sweep as resolution_sweep
from studies.resolution_sweep.plan import VARIANTS, SweepSettings, plan
from studies.variants import pruning_order

REAL_TISSUE = SHARED_DATA / "rois/cmu1_1120x1120.png"
SIDE, LOW = 64, 16
SPLITS = ("train", "train", "train", "validation", "test", "test")

script = load_study("resolution_sweep")


def tissue_image(number):
    """(SIDE, SIDE, 3): real tissue where it is there, smooth noise else."""
    generator = np.random.default_rng(number)
    if REAL_TISSUE.exists():
        with Image.open(REAL_TISSUE) as image:
            left, top = generator.integers(0, 1120 - SIDE, size=2).tolist()
            return np.asarray(image.convert("RGB").crop((left, top, left + SIDE, top + SIDE)), dtype=float)
    coarse = generator.integers(90, 200, size=(8, 8, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=float)


def planted(folder, num_regions):
    """Two classes that differ in the direction of stripes of one pixel: their mean, a smaller image, shows neither."""
    (folder / "images").mkdir()
    stripes = np.where(np.arange(SIDE) % 2, 30.0, -30.0)
    rois = []
    for number in range(num_regions):
        label, slide = number % 2, number // 2
        texture = stripes[:, None, None] if label else stripes[None, :, None]
        image = np.clip(tissue_image(number) * 0.7 + 35 + texture, 0, 255).astype(np.uint8)
        Image.fromarray(image).save(folder / "images" / f"{number}.png")
        split = SPLITS[slide % len(SPLITS)]
        rois.append(Roi(f"{number}", f"slide{slide}", f"images/{number}.png", 0, 0, SIDE, SIDE, None, label, split))
    dataset = RoiDataset(tuple(rois), ("columns", "rows"), "planted", folder)
    save_roi_dataset(dataset, folder / "dataset")
    return folder / "dataset"


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    return planted(tmp_path_factory.mktemp("planted"), 60)


@pytest.fixture(scope="module")
def small_dir(tmp_path_factory):
    """Enough to run on, not to learn from."""
    return planted(tmp_path_factory.mktemp("small"), 24)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    small_model(SparsePathViTModel, num_hidden_layers=3, pooling="cls_mean").save_pretrained(folder)
    SparsePathViTImageProcessor(patch_size=4).save_pretrained(folder)
    return folder


@pytest.fixture
def sweep(run_script, small_dir, checkpoint, tmp_path):
    """Runs the script and returns the rows of its table."""

    def run(*arguments, output_dir=tmp_path / "sweep", sizes=f"{LOW},{SIDE}", data=small_dir):
        common = ["--dataset_dir", str(data), "--model_name_or_path", str(checkpoint), "--sizes", sizes]
        common += ["--output_dir", str(output_dir), "--device", "cpu", "--bootstrap_samples", "20", "--l2", "1"]
        run_script(script, *common, *arguments)
        return read(output_dir / "sweep.csv")

    return run


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_detail_that_only_full_resolution_shows_is_learnt_there_and_shuffled_labels_are_not(
    sweep, dataset_dir, tmp_path
):
    flags = ["--parts", "resolution", "--variants", "sparse", "--repeats", "0", "--batch_size", "8"]
    rows = sweep(*flags, data=dataset_dir)
    accuracy = {(row["view"], int(row["size"])): float(row["accuracy"]) for row in rows}
    assert accuracy["field_of_view", SIDE] >= 0.95
    assert accuracy["field_of_view", LOW] <= 0.75
    assert accuracy["resolution", SIDE] >= 0.95
    assert accuracy["resolution", LOW] <= 0.75  # as many tokens, but no detail
    assert accuracy["pixels", LOW] >= 0.8  # few tokens, all detail
    (share,) = read(tmp_path / "sweep" / "shares.csv")
    assert float(share["gain"]) == pytest.approx(accuracy["field_of_view", SIDE] - accuracy["field_of_view", LOW])
    assert float(share["from_resolution"]) + float(share["from_tokens"]) == pytest.approx(float(share["gain"]))
    assert float(share["from_resolution"]) > 0.2
    flags += ["--views", "field_of_view", "--shuffle_labels"]
    shuffled = sweep(*flags, data=dataset_dir, output_dir=tmp_path / "shuffled")
    assert 0.2 <= float(shuffled[-1]["accuracy"]) <= 0.8  # 20 regions: within three standard deviations of a half


def test_all_variants_and_ablations_are_measured_once_and_drawn(sweep, tmp_path, monkeypatch):
    flags = ["--tile_size", "16", "--windows", "4,8", "--prune_ratios", "0,0.9", "--prune_layers", "1,8"]
    flags += ["--views", "field_of_view", "--repeats", "1", "--batch_size", "8", "--window_size", "4"]
    rows = sweep(*flags, sizes="16,32")
    assert [row["variant"] for row in rows[:7]] == list(VARIANTS)
    assert [row["part"] for row in rows[14:]] == ["window"] * 2 + ["prune_ratio"] * 2 + ["prune_layer"]  # no 8th layer
    assert all(row["status"] == "ok" and float(row["seconds"]) > 0 for row in rows)
    features = {row["variant"]: row["accuracy"] for row in rows[7:14]}
    assert len(set(features.values())) > 1
    figures = {path.name for path in (tmp_path / "sweep").glob("*.png")}
    assert figures == {"accuracy.png", "memory.png", "ablations.png"}

    def must_not_run(*arguments):
        raise AssertionError("measured again")

    table = tmp_path / "sweep" / "sweep.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-2]))  # as if stopped two rows earlier
    measure, measured = resolution_sweep._measure, []
    monkeypatch.setattr(resolution_sweep, "_measure", lambda row, *rest: measured.append(row) or measure(row, *rest))
    again = sweep(*flags, sizes="16,32")
    assert [(row.part, row.prune_ratio) for row in measured] == [("prune_ratio", 0.9), ("prune_layer", 0.6)]
    assert [row["accuracy"] for row in again] == [row["accuracy"] for row in rows]
    monkeypatch.setattr(resolution_sweep, "_measure", must_not_run)
    sweep(*flags, sizes="16,32")
    with pytest.raises(AssertionError, match="measured again"):
        sweep(*flags, "--seed", "1", sizes="16,32")  # another task: its rows are not those that are there


def test_sizes_that_lack_memory_are_marked_and_can_be_tried_again(sweep, checkpoint, tmp_path):
    flags = ["--parts", "resolution", "--views", "field_of_view", "--variants", "dense,sparse", "--repeats", "0"]
    rows = sweep(*flags, "--max_memory_gib", "0.001", "--attention", "eager")
    status = {(row["variant"], int(row["size"])): row["status"] for row in rows}
    assert status == {
        ("dense", LOW): "ok",
        ("sparse", LOW): "ok",
        ("dense", SIDE): "out of memory",
        ("sparse", SIDE): "out of memory",
    }
    assert "GiB are free" in rows[-1]["note"]
    rows = sweep(*flags, "--attention", "eager", "--retry_failed")
    assert [row["status"] for row in rows] == ["ok"] * 4


def test_memory_that_runs_out_while_running_is_marked_and_other_errors_are_not_hidden(sweep, monkeypatch, tmp_path):
    flags = ["--parts", "window", "--windows", "4,8", "--repeats", "0"]
    original = resolution_sweep.probe

    def short_of_memory(dataset, model, *rest):
        if model.config.window_size == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return original(dataset, model, *rest)

    monkeypatch.setattr(resolution_sweep, "probe", short_of_memory)
    rows = sweep(*flags, sizes="16")
    assert [row["status"] for row in rows] == ["out of memory", "ok"]

    def broken(*arguments):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(resolution_sweep, "probe", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        sweep(*flags, sizes="16", output_dir=tmp_path / "broken")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "224"], "larger than the regions"),
        (["--variants", "sprase"], "sprase unknown: choose from dense"),
        (["--prune_after_layer", "9"], "prune_after_layer=9"),
    ],
)
def test_impossible_requests_are_explained(sweep, arguments, message):
    with pytest.raises(SystemExit, match=message):
        sweep("--repeats", "0", "--parts", "resolution", *arguments)


def test_the_plan_has_every_row_of_the_experiment():
    rows = plan(SweepSettings(sizes=(224, 3430)), depth=24, prune_after_layer=4)
    main = [row for row in rows if row.part == "resolution" and row.view == "field_of_view"]
    assert [(row.size, row.variant) for row in main] == [(size, name) for size in (224, 3430) for name in VARIANTS]
    assert {row.window_size for row in main if row.how.sparse} == {8}
    assert {row.prune_ratio for row in main if row.how.pruned} == {0.6}
    assert [row.window_size for row in rows if row.part == "window"] == [2, 4, 8, 16, 64]
    assert [row.prune_ratio for row in rows if row.part == "prune_ratio"] == [number / 10 for number in range(10)]
    assert [row.prune_after_layer for row in rows if row.part == "prune_layer"] == [1, 2, 4, 8]
    assert {row.size for row in rows if row.part != "resolution"} == {3430}


def test_the_order_of_pruning_can_be_turned_round_and_dealt_out_anew():
    model = small_model(SparsePathViTModel, prune_ratio=0.25)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def kept(order, images=pixels, seed=0):
        with pruning_order(model, order, seed):
            positions = model(images).patch_positions
        return [{tuple(place) for place in of_image.tolist()} for of_image in positions]

    scores = model(pixels).prune_scores
    lowest = [{(int(i) // 8, int(i) % 8) for i in row.argsort()[:48]} for row in scores]
    assert kept("inverse") == lowest
    random = kept("random")
    assert len({frozenset(places) for places in random}) == 3  # each image its own order
    assert kept("random", pixels[1:2]) == random[1:2]  # whatever else is in the batch
    assert kept("random", seed=1) != random
    assert kept("score") not in (random, lowest)
    assert not any(layer.attention._forward_hooks for layer in model.encoder.layers)
