# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Overlap of predicted and true masks, from pixel counts alone.

The rule for empty masks: where an image has no pixel of the label and none is predicted, its Dice and IoU are 1; where
only one of both is empty, they are 0. Pooled Dice, the measure of SegPath's authors, adds up the pixels of all images
first and needs no rule; it is undefined where the whole set has neither.
"""

from collections.abc import Sequence

import numpy as np

from ..bootstrap import bootstrap_interval

METRICS = ("dice_pooled", "dice_mean", "iou_mean")


def overlap_counts(prediction: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pixels of both, of the prediction and of the truth.

    Args:
        prediction: (height, width) bool.
        truth: (height, width) bool.

    Returns:
        (3,) int64.

    Raises:
        ValueError: masks of different sizes.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"the prediction is {prediction.shape}, the truth {truth.shape}: both take one size.")
    prediction, truth = prediction.astype(bool), truth.astype(bool)
    return np.array([(prediction & truth).sum(), prediction.sum(), truth.sum()], dtype=np.int64)


def dice_of(counts: np.ndarray, empty: float = 1.0) -> np.ndarray:
    """(..., 3) pixels of both, prediction and truth -> Dice (...); `empty` where there are neither."""
    both, total = counts[..., 0], counts[..., 1] + counts[..., 2]
    return np.where(total > 0, 2 * both / np.maximum(total, 1), empty)


def iou_of(counts: np.ndarray, empty: float = 1.0) -> np.ndarray:
    """(..., 3) pixels of both, prediction and truth -> IoU (...); `empty` where there are neither."""
    both, union = counts[..., 0], counts[..., 1] + counts[..., 2] - counts[..., 0]
    return np.where(union > 0, both / np.maximum(union, 1), empty)


def evaluate_segmentation(
    counts: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[str],
    label_names: Sequence[str],
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, float | int | None]:
    """All metrics, of each label and over the labels, with bootstrap intervals.

    Args:
        counts: (images, 3), see `overlap_counts`; of the label that the image is annotated for.
        labels: (images,) which label that is.
        groups: the slide of each image: the bootstrap draws whole slides.
        label_names: of the labels.
        samples: bootstrap resamples; 0 leaves the intervals out.
        seed: of the bootstrap.

    Returns:
        For each of `METRICS` `NAME_LABEL`, and `NAME`, the mean over the labels; beside each `_low` and `_high` (95 %).
        `num_images` and `num_groups`, each also by label. Undefined numbers are None; of one group there is no
        interval.

    Raises:
        ValueError: there is nothing to evaluate.
    """
    if not len(counts):
        raise ValueError("there is nothing to evaluate: the split holds no images.")
    labels = np.asarray(labels)
    names, group_of = np.unique(np.asarray(groups), return_inverse=True)
    per_group = np.zeros((len(names), len(label_names), 6))
    sums = np.column_stack([counts, dice_of(counts), iou_of(counts), np.ones(len(counts))])
    np.add.at(per_group, (group_of, labels), sums)
    endings = ["", *(f"_{name}" for name in label_names)]
    tables = {"": _metrics_of_sums(per_group.sum(axis=0))}
    if samples and len(names) > 1:
        _, tables["_low"], tables["_high"] = bootstrap_interval(
            lambda drawn: _metrics_of_sums(per_group[drawn].sum(axis=0)), len(names), samples, seed=seed
        )
    results: dict[str, float | int | None] = {}
    for column, metric in enumerate(METRICS):
        for row, ending in enumerate(endings):
            for kind, table in tables.items():
                value = float(table[row, column])
                results[f"{metric}{ending}{kind}"] = value if np.isfinite(value) else None
    results |= {"num_images": len(counts), "num_groups": len(names)}
    if len(label_names) > 1:
        for label, name in enumerate(label_names):
            results[f"num_images_{name}"] = int((labels == label).sum())
            results[f"num_groups_{name}"] = len(np.unique(group_of[labels == label]))
    return results


def _metrics_of_sums(sums: np.ndarray) -> np.ndarray:
    """(labels, 6) sums of counts, Dice, IoU and images -> (1 + labels, 3), first the mean over labels that occur."""
    images = np.where(sums[:, 5] > 0, sums[:, 5], np.nan)
    by_label = np.column_stack([dice_of(sums[:, :3], empty=np.nan), sums[:, 3] / images, sums[:, 4] / images])
    defined = np.isfinite(by_label)
    means = np.where(defined, by_label, 0).sum(axis=0) / np.where(defined.any(axis=0), defined.sum(axis=0), np.nan)
    return np.vstack([means, by_label])
