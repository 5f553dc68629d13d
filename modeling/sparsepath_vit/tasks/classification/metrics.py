# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Classification metrics with bootstrap intervals.

Every metric is a function of the confusion matrix alone, so a resample costs a sum of small matrices and no second pass
over the predictions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..bootstrap import bootstrap_interval

METRICS = ("accuracy", "balanced_accuracy", "f1_macro", "quadratic_kappa")


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_labels: int) -> np.ndarray:
    """Counts by (label, prediction).

    Args:
        labels: (items,) int in 0..num_labels - 1.
        predictions: (items,) int in the same range.
        num_labels: how many classes there are.

    Returns:
        (num_labels, num_labels) int64, rows are labels.

    Raises:
        ValueError: different lengths, or a class out of range.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    if labels.shape != predictions.shape:
        raise ValueError(f"{labels.size} labels do not fit {predictions.size} predictions: one prediction per label.")
    for name, classes in (("labels", labels), ("predictions", predictions)):
        if classes.size and not 0 <= classes.min() <= classes.max() < num_labels:
            raise ValueError(f"{name} reach from {classes.min()} to {classes.max()}: they lie in 0..{num_labels - 1}.")
    cells = np.bincount(labels.astype(np.int64) * num_labels + predictions, minlength=num_labels**2)
    return cells.reshape(num_labels, num_labels)


def metrics_of_confusion(confusion: np.ndarray) -> np.ndarray:
    """The values of `METRICS`, in that order, as scikit-learn defines them.

    Balanced accuracy averages over the classes that occur among the labels, F1 over those that occur among labels or
    predictions. Kappa has quadratic weights and is nan where only one class occurs at all.

    Args:
        confusion: (num_labels, num_labels), rows are labels.
    """
    total, correct = confusion.sum(), np.diag(confusion)
    if not total:
        return np.full(len(METRICS), np.nan)
    labelled, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    occurs = labelled > 0
    recall = correct[occurs] / labelled[occurs]
    involved = labelled + predicted
    f1 = 2 * correct[involved > 0] / involved[involved > 0]
    distance = np.subtract.outer(np.arange(len(confusion)), np.arange(len(confusion))) ** 2
    expected = (distance * np.outer(labelled, predicted)).sum() / total
    kappa = 1 - (distance * confusion).sum() / expected if expected else np.nan
    return np.array([correct.sum() / total, recall.mean(), f1.mean(), kappa])


def evaluate_predictions(
    labels: Sequence[int] | np.ndarray,
    predictions: Sequence[int] | np.ndarray,
    label_names: Sequence[str],
    groups: Sequence[str] | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """All metrics of a classifier, with intervals, as plain JSON values.

    Args:
        labels: (items,) class indices.
        predictions: (items,) class indices.
        label_names: of the classes.
        groups: the slide (or patient) of each item: items of one group are not independent, so the bootstrap draws
            whole groups. Every item is its own group by default.
        samples: bootstrap resamples; 0 leaves the intervals out.
        seed: of the bootstrap.

    Returns:
        For each of `METRICS` the value, and `NAME_mean`, `NAME_low` and `NAME_high` (95 %) of the bootstrap;
        `confusion_matrix` (rows are labels), `label_names`, `num_items` and `num_groups`. Undefined numbers are
        None; of a single group there is no interval.

    Raises:
        ValueError: no items, or labels and predictions that do not fit each other or `label_names`.
    """
    labels, predictions = np.asarray(labels, dtype=np.int64), np.asarray(predictions, dtype=np.int64)
    if not labels.size:
        raise ValueError("there is nothing to evaluate: the split holds no items.")
    groups = np.arange(labels.size) if groups is None else np.asarray(groups)
    _, group_of = np.unique(groups, return_inverse=True)
    num_groups, num_labels = group_of.max() + 1, len(label_names)
    confusion = confusion_matrix(labels, predictions, num_labels)
    results = dict(zip(METRICS, metrics_of_confusion(confusion), strict=True))
    if samples and num_groups > 1:
        per_group = np.zeros((num_groups, num_labels, num_labels), dtype=np.int64)
        np.add.at(per_group, (group_of, labels, predictions), 1)
        interval = bootstrap_interval(
            lambda drawn: metrics_of_confusion(per_group[drawn].sum(axis=0)), num_groups, samples, seed=seed
        )
        for ending, values in zip(("mean", "low", "high"), interval, strict=True):
            results |= {f"{name}_{ending}": value for name, value in zip(METRICS, values, strict=True)}
    results = {name: float(value) if np.isfinite(value) else None for name, value in results.items()}
    return results | {
        "confusion_matrix": confusion.tolist(),
        "label_names": list(label_names),
        "num_items": int(labels.size),
        "num_groups": int(num_groups),
    }
