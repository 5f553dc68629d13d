# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import csv
import sys

import numpy as np
import pytest
from panda_files import PandaFolder
from PIL import Image
from run_script import load_study
from small_models import small_model

from sparsepath_vit import SparsePathViTImageProcessor, SparsePathViTModel
from sparsepath_vit.tasks.classification.roi_files import load_roi_dataset
from sparsepath_vit.tasks.panda.rois import PandaSettings, prepare_panda
from studies.prune_agreement import agreement as prune_agreement
from studies.prune_agreement.agreement import agreement, haematoxylin, summarise_agreement, token_labels


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Slides whose single region holds all kinds of tissue; one of them benign throughout."""
    folder = tmp_path_factory.mktemp("panda")
    panda = PandaFolder(folder / "panda")
    for number in range(4):
        panda.add(f"radboud{number}", [1, 2, 3, 0, 4, 5, 1, 2, 3], size=120, side=40, isup=number % 2)
        panda.add(f"karolinska{number}", [1, 2, 1, 2, 2, 1, 0, 1, 2], "karolinska", size=120, side=40, isup=number % 2)
    panda.add("benign", [2, 2, 2, 2], size=120, side=60)
    panda.write_csv()
    settings = PandaSettings(task="cancer", roi_size=120, min_coverage=0.0)
    prepare_panda(folder / "panda", folder / "prepared", settings, allow_subset=True)
    return folder / "prepared"


@pytest.fixture(scope="module")
def model():
    return small_model(SparsePathViTModel, prune_ratio=0.6)


@pytest.fixture(scope="module")
def processor():
    return SparsePathViTImageProcessor(patch_size=4)


def test_a_token_has_the_label_of_most_of_its_pixels():
    labels = np.zeros((20, 30), np.uint8)  # shown in half as many pixels: 10 x 15, tokens of 4 -> 3 x 4, of 8 px here
    labels[:8, :8] = 3
    labels[:8, 8:16] = [2, 2, 2, 4, 4, 4, 4, 4]
    labels[8:16, :8] = [1, 1, 1, 1, 1, 5, 5, 5]
    labels[8:12, 8:16] = 5
    labels[8:11, 16:24] = 5
    labels[16:20, 24:30] = 2  # the last token lies in the image with 4 x 6 of its pixels
    found = token_labels(labels, "radboud", 4, (10, 15))
    assert found.is_tissue.astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1]]
    assert found.is_target["cancer"].astype(int).tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert found.is_target["epithelium"].astype(int).tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
    karolinska = token_labels(labels // 3, "karolinska", 4, (10, 15))
    assert set(karolinska.is_target) == {"cancer"}  # its "benign" is stroma, too


def test_background_is_no_tissue_whatever_its_share_is_compared_with():
    found = token_labels(np.zeros((8, 8), np.uint8), "karolinska", 4, (8, 8))
    assert not found.is_tissue.any()
    assert not found.is_target["cancer"].any()


def test_agreement_of_perfect_inverse_and_random_orders():
    is_target = np.arange(1000) % 4 == 0
    perfect = agreement(is_target.astype(float), is_target)
    assert perfect["auroc"] == 1
    assert perfect["recall_at_0.1"] == pytest.approx(0.4)
    assert perfect["recall_at_0.3"] == 1
    inverse = agreement(-is_target.astype(float), is_target)
    assert (inverse["auroc"], inverse["recall_at_0.7"]) == (0, 0)
    random = agreement(np.random.default_rng(0).random(1000), is_target)
    assert random["auroc"] == pytest.approx(0.5, abs=0.06)
    assert random["recall_at_0.4"] == pytest.approx(0.4, abs=0.08)


def test_haematoxylin_is_high_where_nuclei_are():
    image = np.full((8, 12, 3), 255, np.uint8)
    image[:4, :4] = (70, 60, 140)  # nuclei
    image[:4, 4:8] = (230, 120, 170)  # eosin
    values = haematoxylin(image, 4)
    assert values.shape == (2, 3)
    assert values.argmax() == 0
    assert values[0, 0] > 2 * values[0, 1]


def test_each_order_is_measured_in_each_region(prepared, model, processor):
    dataset = load_roi_dataset(prepared)
    rows, problems = prune_agreement.measure_agreement(dataset, model, processor)
    assert {(row["provider"], row["target"]) for row in rows} == {
        ("radboud", "cancer"),
        ("radboud", "epithelium"),
        ("karolinska", "cancer"),
    }
    assert {problem.kind for problem in problems} == {"one_kind_of_cancer", "one_kind_of_epithelium"}
    assert {problem.item for problem in problems} == {"benign_0"}
    by_order = {
        order: {(row["roi_id"], row["target"]): row["auroc"] for row in rows if row["order"] == order}
        for order in prune_agreement.ORDERS
    }
    for key, value in by_order["score"].items():
        assert by_order["inverse"][key] == pytest.approx(1 - value)
    assert np.mean(list(by_order["random"].values())) == pytest.approx(0.5, abs=0.1)
    shares = [row["target_share"] for row in rows if row["provider"] == "karolinska"]
    assert shares == pytest.approx([0.5] * len(shares), abs=0.02)  # four of eight squares; glass is no tissue


def test_scores_are_those_of_the_model_and_glass_does_not_count(prepared, model, processor, monkeypatch):
    """A score that finds cancer perfectly, and glass even better, has AUROC 1: glass takes no part."""
    dataset = load_roi_dataset(prepared)
    index = next(number for number, roi in enumerate(dataset.rois) if roi.attributes["provider"] == "karolinska")
    labels = prune_agreement.annotation_of(dataset, dataset.rois[index])
    tokens = token_labels(labels, "karolinska", 4, (120, 120))
    planted = np.where(tokens.is_tissue, tokens.is_target["cancer"], 2.0)
    monkeypatch.setattr(prune_agreement, "region_scores", lambda *arguments: planted)
    rows, _ = prune_agreement.measure_agreement(dataset, model, processor, [index])
    assert {row["order"]: row["auroc"] for row in rows}["score"] == 1


def test_a_missing_mask_is_named_and_counted(prepared, model, processor):
    dataset = load_roi_dataset(prepared)
    slide = dataset.rois[0].slide_id
    mask = dataset.root / "train_label_masks" / f"{slide}_mask.tiff"
    hidden = mask.rename(mask.with_suffix(".hidden"))
    try:
        rows, problems = prune_agreement.measure_agreement(dataset, model, processor, [0])
    finally:
        hidden.rename(mask)
    assert not rows
    assert [(problem.kind, problem.item) for problem in problems] == [("unusable_mask_or_slide", f"{slide}_0")]
    assert mask.name in problems[0].reason


def test_intervals_draw_slides():
    rows = [
        {"provider": "radboud", "target": "cancer", "order": "score", "slide_id": f"s{number // 50}", "auroc": value}
        | {f"recall_at_{rate:g}": value for rate in prune_agreement.KEEP_RATES}
        for number, value in enumerate([0.2] * 50 + [0.8] * 50)
    ]
    summary = summarise_agreement(rows, samples=200)
    assert [line["provider"] for line in summary] == ["radboud", "all"]
    assert summary[0]["auroc"] == pytest.approx(0.5)
    # Two slides: the interval reaches from one to the other, which that of 100 independent regions would not.
    assert (summary[0]["auroc_low"], summary[0]["auroc_high"]) == pytest.approx((0.2, 0.8))
    assert (summary[0]["regions"], summary[0]["slides"]) == (100, 2)


def test_the_script_writes_tables_and_pictures(prepared, model, processor, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "checkpoint")
    processor.save_pretrained(tmp_path / "checkpoint")
    script = load_study("prune_agreement")
    flags = ["--dataset_dir", prepared, "--model_name_or_path", tmp_path / "checkpoint", "--device", "cpu"]
    flags += ["--output_dir", tmp_path / "out", "--bootstrap_samples", "20"]
    monkeypatch.setattr(sys, "argv", ["prune_agreement", *map(str, flags)])
    script.main()
    with (tmp_path / "out" / "summary.csv").open() as file:
        summary = list(csv.DictReader(file))
    assert {line["provider"] for line in summary} == {"radboud", "karolinska", "all"}
    assert {line["order"] for line in summary} == set(prune_agreement.ORDERS)
    assert all(0 <= float(line["auroc_low"]) <= float(line["auroc"]) <= float(line["auroc_high"]) for line in summary)
    (picture,) = (path for path in (tmp_path / "out").glob("*.png") if path.name != "agreement.png")
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    colours = {tuple(colour) for colour in pixels.reshape(-1, 3)}
    assert {(102, 153, 204), (200, 30, 40)} <= colours  # benign tissue and cancer of the annotation
    assert (tmp_path / "out" / "agreement.png").exists()
    assert "one_kind_of_cancer" in (tmp_path / "out" / "problems.csv").read_text()
