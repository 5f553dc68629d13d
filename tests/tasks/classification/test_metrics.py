# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from sparsepath_vit.tasks.bootstrap import bootstrap_interval
from sparsepath_vit.tasks.classification.metrics import (
    METRICS,
    confusion_matrix,
    evaluate_predictions,
    metrics_of_confusion,
)

classes = st.integers(0, 4)


@given(st.lists(st.tuples(classes, classes), min_size=2, max_size=40))
def test_metrics_are_those_of_scikit_learn(pairs):
    labels, predictions = map(np.array, zip(*pairs, strict=True))
    found = dict(zip(METRICS, metrics_of_confusion(confusion_matrix(labels, predictions, 5)), strict=True))
    recalls = [np.mean(predictions[labels == label] == label) for label in np.unique(labels)]
    assert found["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predictions))
    assert found["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert found["f1_macro"] == pytest.approx(sklearn.metrics.f1_score(labels, predictions, average="macro"))
    if len({*labels, *predictions}) > 1:
        kappa = sklearn.metrics.cohen_kappa_score(labels, predictions, labels=range(5), weights="quadratic")
        assert found["quadratic_kappa"] == pytest.approx(kappa)
    else:
        assert np.isnan(found["quadratic_kappa"])


def test_the_confusion_matrix_has_labels_as_rows():
    assert confusion_matrix([0, 0, 2], [1, 1, 0], 3).tolist() == [[0, 2, 0], [0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    "labels, predictions, message",
    [([0, 1], [0], "2 labels do not fit 1"), ([0, 3], [0, 0], "labels reach from 0 to 3"), ([0], [-1], "predictions")],
)
def test_labels_that_fit_nothing_are_refused(labels, predictions, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(labels, predictions, 3)


class TestBootstrap:
    def test_the_interval_of_a_mean_is_that_of_the_normal_distribution(self):
        values = np.random.default_rng(1).normal(5, 2, 400)
        mean, low, high = bootstrap_interval(lambda drawn: values[drawn].mean(), len(values), samples=4000)
        error = values.std() / np.sqrt(len(values))
        assert mean == pytest.approx(values.mean(), abs=0.02)
        assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.1 * error)
        assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.1 * error)

    def test_several_numbers_at_once_some_of_them_undefined(self):
        mean, low, high = bootstrap_interval(lambda drawn: np.array([1.0, np.nan]), 3, samples=10)
        assert (mean[0], low[0], high[0]) == (1, 1, 1)
        assert np.isnan([mean[1], low[1], high[1]]).all()

    def test_it_depends_on_the_seed_only(self):
        values = np.arange(10.0)
        intervals = [
            [float(end) for end in bootstrap_interval(lambda drawn: values[drawn].mean(), 10, 50, seed=seed)]
            for seed in (0, 0, 1)
        ]
        assert intervals[0] == intervals[1] != intervals[2]

    @pytest.mark.parametrize("arguments", [(0,), (3, 0), (3, 10, 1.0)])
    def test_nothing_to_resample_is_refused(self, arguments):
        with pytest.raises(ValueError, match="an interval needs"):
            bootstrap_interval(lambda drawn: 0.0, *arguments)


class TestEvaluation:
    def test_images_of_one_slide_are_drawn_together(self):
        """100 copies of 4 slides are as uncertain as 4 slides."""
        labels, predictions = [0, 1, 0, 1], [0, 1, 1, 0]
        alone = evaluate_predictions(labels, predictions, "ab")
        slides = [name for name in "wxyz" for _ in range(100)]
        together = evaluate_predictions(np.repeat(labels, 100), np.repeat(predictions, 100), "ab", slides)
        apart = evaluate_predictions(np.repeat(labels, 100), np.repeat(predictions, 100), "ab")
        assert (together["accuracy_low"], together["accuracy_high"]) == (alone["accuracy_low"], alone["accuracy_high"])
        assert apart["accuracy_high"] - apart["accuracy_low"] < 0.2
        assert (together["num_items"], together["num_groups"]) == (400, 4)

    def test_the_result_is_json(self):
        result = evaluate_predictions([0, 0, 0], [0, 0, 0], ["only", "other"])
        assert json.loads(json.dumps(result, allow_nan=False))["quadratic_kappa"] is None
        assert result["accuracy"] == result["accuracy_low"] == 1

    def test_one_slide_alone_has_no_interval(self):
        result = evaluate_predictions([0, 1], [0, 1], "ab", ["slide", "slide"])
        assert result["accuracy"] == 1
        assert "accuracy_low" not in result

    def test_nothing_to_evaluate_is_an_error(self):
        with pytest.raises(ValueError, match="holds no items"):
            evaluate_predictions([], [], "ab")
