# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a model must beat: masks that need no learning, or a single number of it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from skimage.color import rgb2hed
from skimage.filters import threshold_otsu

from .data import SegmentationImages
from .metrics import METRICS, dice_of, evaluate_segmentation, overlap_counts

BASELINES = ("all_background", "haematoxylin_otsu", "haematoxylin_fitted")
_CANDIDATES = 200
_FITTING_IMAGES = 50  # a single number needs no more


def haematoxylin(image: np.ndarray) -> np.ndarray:
    """(height, width, 3) uint8 RGB -> (height, width) amount of haematoxylin by colour deconvolution (Ruifrok 2001)."""
    return rgb2hed(image)[..., 0]


def fitted_threshold(dataset: SegmentationImages) -> float:
    """The threshold on haematoxylin of the largest pooled Dice on these images."""
    amounts, truths = zip(*((haematoxylin(image), mask) for image, mask, _ in _arrays(dataset)), strict=True)
    pooled, truth = np.concatenate([a.ravel() for a in amounts]), np.concatenate([t.ravel() for t in truths])
    candidates = np.unique(np.quantile(pooled[::7], np.linspace(0, 1, _CANDIDATES)))
    scores = [float(dice_of(overlap_counts(pooled >= candidate, truth))) for candidate in candidates]
    return float(candidates[int(np.argmax(scores))])


def evaluate_baselines(
    train: SegmentationImages,
    evaluation: SegmentationImages,
    label_names: Sequence[str],
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """`METRICS` of each of `BASELINES` on the images that the model is evaluated on, with intervals.

    Args:
        train: what the fitted threshold is chosen on, one per label.
        evaluation: what all are evaluated on.
        label_names: of the labels.
        samples: bootstrap resamples.
        seed: of the bootstrap.
    """
    thresholds = {}
    for label in range(len(label_names)):
        pairs = [pair for pair in train.pairs if pair.label == label]
        some = pairs[:: -(-len(pairs) // _FITTING_IMAGES)]
        thresholds[label] = fitted_threshold(SegmentationImages(some))
    counts: dict[str, list[np.ndarray]] = {name: [] for name in BASELINES}
    labels, groups = [], []
    for number, (image, truth, label) in enumerate(_arrays(evaluation)):
        amount = haematoxylin(image)
        is_flat = amount.min() == amount.max()
        masks = {
            "all_background": np.zeros_like(truth),
            "haematoxylin_otsu": np.zeros_like(truth) if is_flat else amount >= threshold_otsu(amount),
            "haematoxylin_fitted": amount >= thresholds[label],
        }
        for name, mask in masks.items():
            counts[name].append(overlap_counts(mask, truth))
        labels.append(label)
        groups.append(evaluation.pair_of(number).group)
    results = {}
    for name in BASELINES:
        metrics = evaluate_segmentation(np.stack(counts[name]), np.array(labels), groups, label_names, samples, seed)
        results[name] = {key: value for key, value in metrics.items() if key.startswith(METRICS)}
    results["haematoxylin_fitted"]["thresholds"] = {label_names[label]: value for label, value in thresholds.items()}
    return results


def _arrays(dataset: SegmentationImages) -> Any:
    """(height, width, 3) image, (height, width) bool mask and label of every example."""
    for number in range(len(dataset)):
        example = dataset[number]
        yield example["image"].permute(1, 2, 0).numpy(), example["mask"].numpy().astype(bool), example["label"]
