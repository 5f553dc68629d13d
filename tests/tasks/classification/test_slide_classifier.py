# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json

import h5py
import numpy as np
import pytest
import torch

from sparsepath_vit.tasks.classification import (
    load_slide_classifier,
    predict_slides,
    read_bags,
    read_labelled_bags,
    save_slide_classifier,
    train_slide_classifier,
)
from sparsepath_vit.tasks.classification.attention_mil import fit_attention_mil

WIDTH = 8
SETTINGS = {"mpp": 0.5, "tile_size": 224, "weights": "abc", "prune_ratio": 0.6}


def write_slides(folder, patients=8, slides_of_patient=2, signal="mean", seed=0):
    """Slides of two classes, by patient; the class shows in all rows, or in one of 40 only."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps(SETTINGS))
    rows = []
    for patient in range(patients):
        label = patient % 2
        own = generator.standard_normal(WIDTH) * 0.3  # what slides of a patient share
        for number in range(slides_of_patient):
            name = f"p{patient}_s{number}"
            bag = generator.standard_normal((40, WIDTH)) + own
            if signal == "mean":
                bag[:, 0] += 3 * label
            else:
                bag[generator.integers(40), 0] += 12 * label
            with h5py.File(folder / f"{name}.h5", "w") as file:
                file["features"] = bag.astype(np.float32)
            rows.append(f"{name}.svs,{('low', 'high')[label]},case{patient}")
    return rows


def write_table(path, rows):
    path.write_text("\n".join(["slide,grade,case", *rows]) + "\n")
    return path


@pytest.fixture
def labelled(tmp_path):
    rows = write_slides(tmp_path / "features")
    return read_labelled_bags(write_table(tmp_path / "labels.csv", rows), tmp_path / "features", "grade", "case")


def test_bags_have_label_and_patient_of_their_row(labelled):
    assert labelled.names[:3] == ("p0_s0", "p0_s1", "p1_s0") and labelled.label_names == ("high", "low")
    assert labelled.labels[:3].tolist() == [1, 1, 0] and labelled.groups[:3].tolist() == ["case0", "case0", "case1"]
    assert labelled.bag(0).shape == (40, WIDTH) and labelled.means().shape == (16, WIDTH)
    assert "labels=(16,) int64" in repr(labelled)


@pytest.mark.parametrize("kind", ["linear", "abmil"])
def test_what_can_be_told_is_told_and_shuffled_labels_are_not(labelled, kind):
    metrics = train_slide_classifier(labelled, kind, folds=4, samples=200).metrics
    assert metrics["balanced_accuracy"] > 0.8 and metrics["auroc"] > 0.9 and metrics["num_folds"] == 4
    assert metrics["num_groups"] == 8 and metrics["balanced_accuracy_low"] <= metrics["balanced_accuracy"]
    shuffled = labelled.__class__(**{**vars(labelled), "labels": np.tile([0, 0, 1, 1], 4)[::-1].copy()})
    shuffled = shuffled.__class__(**{**vars(shuffled), "labels": np.repeat([0, 1, 1, 0, 0, 1, 1, 0], 2)})
    assert train_slide_classifier(shuffled, kind, folds=4, samples=0).metrics["auroc"] < 0.8


def test_attention_finds_the_one_tile_that_tells(tmp_path):
    """The mean over 40 tiles hides it; this is what attention pooling is for."""
    rows = write_slides(tmp_path / "features", patients=24, signal="one")
    bags = read_labelled_bags(write_table(tmp_path / "labels.csv", rows), tmp_path / "features", "grade", "case")
    result = train_slide_classifier(bags, "abmil", folds=3, samples=0)
    assert result.metrics["auroc"] > 0.9
    index = int(np.flatnonzero(bags.labels == bags.label_names.index("high"))[0])
    bag = bags.bag(index)
    assert result.classifier.attention(bag).argmax() == bag[:, 0].argmax()


def test_no_fold_shares_a_patient_with_its_training(labelled, monkeypatch):
    from sparsepath_vit.tasks.classification import slide_classifier

    seen = []
    fit = slide_classifier._fit
    monkeypatch.setattr(
        slide_classifier, "_fit", lambda bags, indices, *rest: seen.append(indices) or fit(bags, indices, *rest)
    )
    train_slide_classifier(labelled, folds=4, samples=0)
    *folds, everything = seen
    assert len(folds) == 4 and len(everything) == 16
    for train in folds:
        held_out = np.setdiff1d(np.arange(16), train)
        assert not set(labelled.groups[train]) & set(labelled.groups[held_out])


@pytest.mark.parametrize("kind", ["linear", "abmil"])
def test_a_saved_classifier_predicts_the_same(labelled, kind, tmp_path):
    result = train_slide_classifier(labelled, kind, folds=2, samples=50)
    save_slide_classifier(result, labelled, tmp_path / "classifier")
    again = load_slide_classifier(tmp_path / "classifier")
    expected = [result.classifier.probabilities(labelled.bag(index)) for index in range(len(labelled))]
    found = predict_slides(again, read_bags(tmp_path / "features"))
    assert np.allclose(found, expected, atol=1e-6) and np.allclose(found.sum(axis=1), 1)
    card = (tmp_path / "classifier/README.md").read_text()
    assert "| high | 8 | 4 |" in card and "`tile_size`: 224" in card and "95 %" in card and "no medical device" in card
    rows = (tmp_path / "classifier/predictions.csv").read_text().splitlines()
    assert rows[0] == "slide,patient,label,prediction,probability_high,probability_low" and len(rows) == 17


def test_features_of_other_settings_are_refused(labelled, tmp_path):
    classifier = train_slide_classifier(labelled, folds=2, samples=0).classifier
    write_slides(tmp_path / "other")
    (tmp_path / "other/settings.json").write_text(json.dumps({**SETTINGS, "mpp": 1.0}))
    with pytest.raises(ValueError, match=r"mpp: 0\.5 trained on, 1\.0 here"):
        predict_slides(classifier, read_bags(tmp_path / "other"))


def test_training_is_the_same_in_every_run(labelled):
    bags = [labelled.bag(index) for index in range(4)]
    labels = np.array([0, 1, 0, 1])
    one, other = (fit_attention_mil(bags, labels, 2, epochs=2, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("rows", "target", "words"),
    [
        (["p0_s0,high,1"], "stage", "no column 'stage'"),
        (["p0_s0,high,1", "p0_s1,high,1"], "grade", "labels of 1 classes"),
        (["p0_s0,high,1", "p0_s0.svs,low,1"], "grade", "line 3: the slide p0_s0 stands in two rows"),
        (["p0_s0,high,1", "p1_s0,low,"], "grade", "line 3: the column 'case' is empty"),
    ],
)
def test_tables_that_cannot_be_meant_are_refused(tmp_path, rows, target, words):
    write_slides(tmp_path / "features")
    table = write_table(tmp_path / "labels.csv", rows)
    with pytest.raises(ValueError, match=words):
        read_labelled_bags(table, tmp_path / "features", target, "case")


def test_slides_that_are_not_embedded_are_named(tmp_path, caplog):
    rows = [*write_slides(tmp_path / "features"), "absent.svs,low,case9"]
    bags = read_labelled_bags(write_table(tmp_path / "labels.csv", rows), tmp_path / "features", "grade")
    assert len(bags) == 16 and "1 slides" in caplog.text and "absent.svs" in caplog.text
    assert len(set(bags.groups)) == 16  # without patients each slide is its own


def test_too_few_patients_of_a_class_are_named(tmp_path):
    rows = write_slides(tmp_path / "features", patients=3)
    bags = read_labelled_bags(write_table(tmp_path / "labels.csv", rows), tmp_path / "features", "grade", "case")
    with pytest.raises(ValueError, match=r"high: 1, low: 2.* two of each class"):
        train_slide_classifier(bags)
