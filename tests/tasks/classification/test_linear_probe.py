# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import small_model

from sparsepath_vit import SparsePathViTModel
from sparsepath_vit.tasks.classification.linear_probe import ProbeSettings, fit_head, merge_head, probe_features
from sparsepath_vit.tasks.classification.rois import Roi, RoiDataset

SETTINGS = ProbeSettings(bootstrap_samples=0)


def dataset_of(labels, splits, slides=None, slide_level=False, names=("a", "b", "c")):
    slides = [str(index) for index in range(len(labels))] if slides is None else slides
    rois = tuple(
        Roi(f"roi{index}", slide, "file", 0, 0, 8, 8, None, int(label), split)
        for index, (label, split, slide) in enumerate(zip(labels, splits, slides, strict=True))
    )
    return RoiDataset(rois, names, "task", Path(), slide_level)


def features_of(labels, noise, seed=0, width=6):
    """Class means far apart in offset and scale, and noise."""
    generator = np.random.default_rng(seed)
    means = generator.normal(size=(3, width)) * [1, 100, 1, 1, 0.01, 1] + 50
    scale = np.array([1, 100, 1, 1, 0.01, 0.0])  # the last feature is nearly constant within a class
    return means[labels] + noise * scale * generator.normal(size=(len(labels), width))


SPLITS = ["train"] * 60 + ["validation"] * 30 + ["test"] * 30
LABELS = np.arange(120) % 3


class TestHead:
    @pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
    def test_it_is_the_regularised_maximum_of_the_likelihood(self, solver):
        """No step in any direction on standardised features improves the objective."""
        features, labels = features_of(LABELS, 1.0), LABELS
        settings = replace(SETTINGS, solver=solver, sgd_epochs=3000, sgd_learning_rate=0.5)
        head = fit_head(features, labels, 3, settings, l2=2.0)
        scale, mean = features.std(axis=0), features.mean(axis=0)
        weight = torch.tensor(head.weight * scale, requires_grad=True)
        bias = torch.tensor(head.bias + head.weight @ mean, requires_grad=True)
        logits = torch.from_numpy((features - mean) / scale) @ weight.T + bias
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="sum")
        (loss + weight.square().sum()).backward()  # l2 / 2 per weight
        assert weight.grad.abs().max() < 2e-2
        assert bias.grad.abs().max() < 2e-2

    def test_two_classes(self):
        labels = LABELS % 2
        head = fit_head(features_of(LABELS % 2, 0.1), labels, 2, SETTINGS, 1.0)
        assert head.weight.shape == (2, 6)
        assert np.array_equal(head.logits(features_of(labels, 0.1)).argmax(1), labels)

    def test_a_class_that_was_never_seen_is_never_predicted(self):
        labels = np.where(LABELS == 1, 2, LABELS)
        head = fit_head(features_of(labels, 0.5), labels, 4, SETTINGS, 1.0)
        predictions = head.logits(np.random.default_rng(0).normal(50, 1000, (500, 6))).argmax(1)
        assert set(predictions) == {0, 2}

    def test_one_class_or_broken_features_are_refused(self):
        with pytest.raises(ValueError, match="holds 1 of 3 classes"):
            fit_head(np.ones((4, 6)), np.zeros(4, int), 3, SETTINGS, 1.0)
        features = features_of(LABELS, 1.0)
        features[3, 2] = np.nan
        with pytest.raises(ValueError, match="not finite"):
            fit_head(features, LABELS, 3, SETTINGS, 1.0)

    def test_merged_into_a_model_it_gives_the_same_logits_after_saving(self, tmp_path):
        from transformers import AutoModelForImageClassification

        model = small_model(SparsePathViTModel, patch_size=16, image_size=64, pooling="cls_mean")
        inputs = {"pixel_values": torch.randn(3, 3, 64, 48)}
        with torch.no_grad():
            pooled = model(**inputs).pooler_output.numpy()
        head = fit_head(np.repeat(pooled, 2, axis=0) + np.eye(6, 64), np.arange(6) % 3, 3, SETTINGS, 1.0)
        merge_head(model, head, ("one", "two", "three")).save_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float32)
        with torch.no_grad():
            logits = loaded(**inputs).logits
        torch.testing.assert_close(logits.double(), torch.from_numpy(head.logits(pooled)), atol=1e-4, rtol=1e-4)
        assert loaded.config.id2label == {0: "one", 1: "two", 2: "three"}
        assert model.config.num_labels != 3 or model.config.id2label[0] != "one"  # the encoder's own config stays


class TestProbe:
    def test_a_signal_is_found(self):
        result = probe_features(dataset_of(LABELS, SPLITS), features_of(LABELS, 0.1), SETTINGS)
        assert result.metrics["accuracy"] == 1
        assert result.metrics["num_items"] == 30
        assert result.metrics["num_train"] == 60
        assert result.items[0] == "roi90"

    @pytest.mark.parametrize("slide_level", [False, True])
    def test_with_shuffled_labels_accuracy_is_at_chance(self, slide_level):
        """Whatever of the evaluated labels leaked into the fit would show here."""
        accuracies = []
        for seed in range(10):
            labels = np.arange(300) % 3
            splits = ["train"] * 150 + ["validation"] * 50 + ["test"] * 100
            dataset = dataset_of(labels, splits, slide_level=slide_level).with_shuffled_labels(seed)
            features = features_of(labels, 0.5, seed)
            accuracies.append(probe_features(dataset, features, SETTINGS).metrics["accuracy"])
        assert np.mean(accuracies) == pytest.approx(1 / 3, abs=0.05)  # standard error 0.015

    def test_cross_validation_predicts_every_image_by_a_head_that_did_not_see_it(self):
        """Noise features as wide as there are images separate any labels in training, and none held out."""
        labels = np.arange(60) % 2
        features = np.random.default_rng(0).normal(size=(60, 200))
        dataset = dataset_of(labels, [f"fold{1 + index % 5}" for index in range(60)], names=("a", "b"))
        result = probe_features(dataset, features, SETTINGS)
        assert 0.25 < result.metrics["accuracy"] < 0.75
        assert sorted(result.items) == sorted(roi.roi_id for roi in dataset.rois)
        assert result.metrics["num_folds"] == 5
        assert np.array_equal(result.head.logits(features).argmax(1), labels)  # the final head learnt from all

    def test_slides_are_classified_by_the_mean_of_their_rois(self):
        """Each ROI alone is noise; the mean over a slide tells its class."""
        slides = np.repeat(np.arange(60), 4)
        labels = slides % 3
        generator = np.random.default_rng(0)
        noise = generator.normal(size=(240, 6))
        for slide in range(60):
            noise[slides == slide] -= noise[slides == slide].mean(axis=0)
        features = np.eye(3, 6)[labels] * 0.5 + 5 * noise
        splits = np.where(slides < 30, "train", np.where(slides < 45, "validation", "test"))
        dataset = dataset_of(labels, splits.tolist(), slides.astype(str).tolist(), slide_level=True)
        result = probe_features(dataset, features, SETTINGS)
        assert result.metrics["accuracy"] == 1
        assert (result.metrics["num_items"], result.metrics["num_train"]) == (15, 30)
        by_roi = probe_features(replace(dataset, slide_level=False), features, SETTINGS)
        assert by_roi.metrics["accuracy"] < 0.7

    def test_the_penalty_is_chosen_on_the_validation_split(self):
        """Many noise features: little penalty fits them, the right one does not."""
        generator = np.random.default_rng(0)
        features = np.concatenate([features_of(LABELS, 2.0), generator.normal(size=(120, 300))], axis=1)
        dataset = dataset_of(LABELS, SPLITS)
        chosen = probe_features(dataset, features, SETTINGS)
        given = probe_features(dataset, features, replace(SETTINGS, l2=chosen.metrics["l2"]))
        assert np.array_equal(chosen.head.weight, given.head.weight)
        swapped = dataset_of(LABELS, ["train"] * 60 + ["test"] * 30 + ["validation"] * 30)
        scores = {
            l2: probe_features(swapped, features, replace(SETTINGS, l2=l2)).metrics["balanced_accuracy"]
            for l2 in (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
        }
        assert scores[chosen.metrics["l2"]] == max(scores.values())

    def test_the_split_that_chooses_is_not_reported(self):
        with pytest.raises(ValueError, match="eval_split='validation' is what the penalty would be chosen on"):
            probe_features(
                dataset_of(LABELS, SPLITS), features_of(LABELS, 1), replace(SETTINGS, eval_split="validation")
            )

    @pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
    def test_the_same_seed_gives_the_same_result(self, solver):
        settings = ProbeSettings(solver=solver, bootstrap_samples=50, sgd_batch_size=16, sgd_epochs=10)
        dataset, features = dataset_of(LABELS, SPLITS), features_of(LABELS, 2.0)
        first, again = (probe_features(dataset, features, settings) for _ in range(2))
        assert first.metrics == again.metrics
        assert np.array_equal(first.head.weight, again.head.weight)


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="solver='adam' is unknown: choose one of lbfgs, sgd"):
        ProbeSettings(solver="adam")
    with pytest.raises(ValueError, match="l2=-1 is not possible"):
        ProbeSettings(l2=-1)
