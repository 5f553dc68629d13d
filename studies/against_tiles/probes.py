# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Linear probes whose penalty is chosen inside the training folds, and paired differences with intervals."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

from sparsepath_vit.tasks.bootstrap import bootstrap_interval
from sparsepath_vit.tasks.classification.linear_probe import LinearHead, ProbeSettings, fit_head

PENALTIES = (1.0, 1e1, 1e2, 1e3, 1e4)  # 1 / C of scikit-learn
BOOTSTRAP_SAMPLES = 2000
UNLIKELY = 1e-12  # a class that the training folds lack


@dataclass(frozen=True)
class Probe:
    """What heads said of items of groups that they had not seen.

    Attributes:
        probabilities: (seeds, items, classes), one division into folds a seed.
        labels: (items,) int64.
        groups: (items,) int64, 0 and up; items of one group are not independent.
    """

    probabilities: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    def scores(self, items: np.ndarray | None = None) -> np.ndarray:
        """(2,) balanced accuracy and log-loss of some items (all by default), means over the seeds."""
        items = np.arange(len(self.labels)) if items is None else items
        labels, probabilities = self.labels[items], self.probabilities[:, items]
        is_right = probabilities.argmax(axis=-1) == labels
        accuracy = np.mean([is_right[:, labels == label].mean() for label in np.unique(labels)])
        of_label = np.take_along_axis(probabilities, labels[None, :, None], axis=2)
        return np.array([accuracy, -np.log(of_label).mean()])


def cross_validated(
    features: np.ndarray, labels: np.ndarray, groups: Sequence[object], num_folds: int = 5, num_seeds: int = 5
) -> Probe:
    """Heads on all folds but one, their penalty chosen by log-loss in grouped folds of these.

    Args:
        features: (items, features).
        labels: (items,) class indices.
        groups: (items,) what must not be on both sides of a split, such as the block of tissue or the image.
        num_folds: of the outer division.
        num_seeds: how many outer divisions.
    """
    _, of_item = np.unique(np.asarray(groups), return_inverse=True)
    num_classes = int(labels.max()) + 1
    probabilities = np.full((num_seeds, len(labels), num_classes), np.nan)
    for seed in range(num_seeds):
        folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
        for train, held_out in folds.split(features, labels, of_item):
            penalty = chosen_penalty(features[train], labels[train], of_item[train], num_classes)
            head = balanced_head(features[train], labels[train], num_classes, penalty)
            probabilities[seed, held_out] = softmax(head, features[held_out])
    return Probe(probabilities, labels, of_item)


def chosen_penalty(features: np.ndarray, labels: np.ndarray, groups: np.ndarray, num_classes: int) -> float:
    """Of `PENALTIES` the one with the least log-loss in grouped folds; of equals the strongest."""
    folds = list(GroupKFold(min(4, len(np.unique(groups)))).split(features, labels, groups))

    def loss(penalty: float) -> float:
        total = 0.0
        for train, held_out in folds:
            if len(np.unique(labels[train])) < 2:
                continue
            head = balanced_head(features[train], labels[train], num_classes, penalty)
            of_label = softmax(head, features[held_out])[np.arange(len(held_out)), labels[held_out]]
            total -= np.log(of_label).sum()
        return total

    return min(reversed(PENALTIES), key=loss)


def balanced_head(features: np.ndarray, labels: np.ndarray, num_classes: int, penalty: float) -> LinearHead:
    """A head for classes that are equally frequent: the shares of the training labels are taken out of its bias.

    With few items a class that is rare in the training folds is frequent in the one held out: a head that knows the
    shares, and under a strong penalty little else, would be worse than chance.
    """
    head = fit_head(features, labels, num_classes, ProbeSettings(), penalty)
    shares = np.bincount(labels, minlength=num_classes) / len(labels)
    return LinearHead(head.weight, head.bias - np.log(np.where(shares > 0, shares, 1.0)))


def softmax(head: LinearHead, features: np.ndarray) -> np.ndarray:
    """(items, classes) probabilities, none of them 0."""
    logits = head.logits(features)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.maximum(exponentials / exponentials.sum(axis=1, keepdims=True), UNLIKELY)


def score_with_interval(probe: Probe, items: np.ndarray | None = None) -> dict[str, float]:
    """Balanced accuracy and log-loss with 95 % intervals; whole groups are drawn."""
    return _with_intervals(("balanced_accuracy", "log_loss"), probe, probe.scores, items)


def difference_with_interval(probe: Probe, other: Probe, items: np.ndarray | None = None) -> dict[str, float]:
    """How much larger balanced accuracy and log-loss are than those of another probe of the same items.

    Paired: both are asked about the same draw of groups, so what is common to both cancels.
    """
    return _with_intervals(
        ("balanced_accuracy", "log_loss"), probe, lambda drawn: probe.scores(drawn) - other.scores(drawn), items
    )


def _with_intervals(
    names: Sequence[str], probe: Probe, statistic: Callable[[np.ndarray], np.ndarray], items: np.ndarray | None
) -> dict[str, float]:
    items = np.arange(len(probe.labels)) if items is None else items
    by_group = [items[probe.groups[items] == group] for group in np.unique(probe.groups[items])]

    def of_draw(drawn: np.ndarray) -> np.ndarray:
        return statistic(np.concatenate([by_group[group] for group in drawn]))

    _, low, high = bootstrap_interval(of_draw, len(by_group), BOOTSTRAP_SAMPLES)
    found = {}
    for name, value, lowest, highest in zip(names, statistic(items), low, high, strict=True):
        found |= {name: value, f"{name}_low": lowest, f"{name}_high": highest}
    return {name: round(float(value), 4) for name, value in found.items()}
