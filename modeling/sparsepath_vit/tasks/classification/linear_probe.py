# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A linear classifier on frozen features: fitted, evaluated with intervals, and merged into a model."""

import copy
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from ...model.configuration_sparsepath_vit import SparsePathViTConfig
from ...model.modeling_sparsepath_vit import SparsePathViTForImageClassification
from ...runtime.short_repr import ShortRepr
from .features import FeatureSettings, embed_rois
from .metrics import evaluate_predictions
from .rois import Partition, RoiDataset

if TYPE_CHECKING:
    from ...model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
    from ...model.modeling_sparsepath_vit import SparsePathViTModel

logger = logging.getLogger(__name__)

SOLVERS = ("lbfgs", "sgd")
_L2_CANDIDATES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
_UNSEEN_CLASS_BIAS = -1e4  # never the largest logit, and finite in float16


@dataclass(frozen=True)
class ProbeSettings:
    """How a linear probe is fitted and evaluated.

    Attributes:
        features: how each ROI is shown to the model.
        solver: "lbfgs" (logistic regression to convergence) or "sgd" (momentum, cosine schedule).
        l2: weight of the L2 penalty, as `1 / C` in scikit-learn; None chooses it by balanced accuracy on the validation
            split, and takes 1.0 where there is none (cross-validation).
        sgd_epochs: passes over the training features.
        sgd_learning_rate: at the start.
        sgd_batch_size: features per step.
        eval_split: the split that is reported: "test" or "validation".
        bootstrap_samples: for the intervals; 0 leaves them out.
        seed: of bootstrap and SGD.
    """

    features: FeatureSettings = field(default_factory=FeatureSettings)
    solver: str = "lbfgs"
    l2: float | None = None
    sgd_epochs: int = 100
    sgd_learning_rate: float = 0.1
    sgd_batch_size: int = 256
    eval_split: str = "test"
    bootstrap_samples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r} is unknown: choose one of {', '.join(SOLVERS)}.")
        if self.l2 is not None and not self.l2 >= 0:
            raise ValueError(f"l2={self.l2} is not possible: a penalty is 0 or more; leave it out to have it chosen.")


@dataclass(frozen=True, repr=False)
class LinearHead(ShortRepr):
    """A linear classifier of pooled features.

    Attributes:
        weight: (num_labels, pooled_size) float64.
        bias: (num_labels,) float64.
    """

    weight: np.ndarray
    bias: np.ndarray

    def logits(self, features: np.ndarray) -> np.ndarray:
        """(items, pooled_size) -> (items, num_labels)."""
        return features.astype(np.float64) @ self.weight.T + self.bias


@dataclass(frozen=True, repr=False)
class ProbeResult(ShortRepr):
    """What a probe found.

    Attributes:
        metrics: of `metrics.evaluate_predictions`, and `l2`, `num_train` and, where cross-validated, `num_folds`.
        head: fitted on the training split, or on everything where cross-validated.
        items: id of each evaluated ROI, or of each slide.
        labels: (items,) int64.
        predictions: (items,) int64.
    """

    metrics: dict[str, Any]
    head: LinearHead
    items: tuple[str, ...]
    labels: np.ndarray
    predictions: np.ndarray


def probe(
    dataset: RoiDataset,
    model: "SparsePathViTModel",
    processor: "SparsePathViTImageProcessor",
    settings: ProbeSettings,
    cache_dir: str | os.PathLike[str],
) -> ProbeResult:
    """Embeds the ROIs (or finds them in the cache), fits a linear head and evaluates it.

    Args:
        dataset: with fixed splits, or with folds: then every ROI is predicted by a head that did not see its fold.
        model: bare encoder in evaluation mode.
        processor: its image processor.
        settings: of features, head and evaluation.
        cache_dir: of the features.

    Raises:
        ValueError: a split that is needed is empty, or fewer than two classes are there to learn.

    Example:
    ```python
    >>> dataset = load_roi_dataset("outputs/radboud_pattern")
    >>> model.config.prune_ratio = 0.6
    >>> result = probe(dataset, model, processor, ProbeSettings(FeatureSettings(size=1400)), "outputs/features")
    >>> result.metrics["balanced_accuracy"]
    ```
    """
    features = embed_rois(dataset, model, processor, settings.features, cache_dir)
    return probe_features(dataset, features, settings)


def probe_features(dataset: RoiDataset, features: np.ndarray, settings: ProbeSettings) -> ProbeResult:
    """`probe` on features that are there already.

    Args:
        dataset: the ROIs.
        features: (rois, pooled_size).
        settings: of head and evaluation.
    """
    partitions = dataset.partitions(settings.eval_split)
    items, labels, predictions, slides = [], [], [], []
    for partition in partitions:
        head, l2 = _fit_partition(dataset, features, partition, settings)
        part = pool_items(dataset, features, partition.evaluation)
        items += part.ids
        slides += part.slide_ids
        labels.append(part.labels)
        predictions.append(head.logits(part.features).argmax(axis=1))
    labels, predictions = np.concatenate(labels), np.concatenate(predictions)
    metrics = evaluate_predictions(
        labels, predictions, dataset.label_names, slides, settings.bootstrap_samples, settings.seed
    )
    num_train = len(pool_items(dataset, features, partitions[-1].train).ids)
    if len(partitions) > 1:
        metrics["num_folds"] = len(partitions)
        everything = Partition(np.arange(len(dataset)), np.array([], np.int64), np.array([], np.int64))
        head, l2 = _fit_partition(dataset, features, everything, settings)
    metrics |= {"l2": l2, "num_train": num_train}
    return ProbeResult(metrics, head, tuple(items), labels, predictions)


@dataclass(frozen=True)
class Items:
    """What is classified: ROIs, or slides.

    Attributes:
        ids: of the ROIs or slides.
        slide_ids: the slide of each.
        features: (items, values).
        labels: (items,) int64.
    """

    ids: list[str]
    slide_ids: list[str]
    features: np.ndarray
    labels: np.ndarray


def pool_items(dataset: RoiDataset, features: np.ndarray, indices: np.ndarray) -> Items:
    """ROIs as they are, or the means over the ROIs of each slide where labels belong to slides.

    Args:
        dataset: the ROIs.
        features: (rois, values) of all of them: pooled features, or logits.
        indices: which of them to take.
    """
    rois = [dataset.rois[index] for index in indices]
    slide_ids, labels = [roi.slide_id for roi in rois], np.array([roi.label for roi in rois], dtype=np.int64)
    if not dataset.slide_level:
        return Items([roi.roi_id for roi in rois], slide_ids, features[indices], labels)
    names, first, slide_of = np.unique(slide_ids, return_index=True, return_inverse=True)
    sums = np.zeros((len(names), features.shape[1]))
    np.add.at(sums, slide_of, features[indices])
    means = sums / np.bincount(slide_of, minlength=len(names))[:, None]
    return Items(names.tolist(), names.tolist(), means, labels[first])


def _fit_partition(
    dataset: RoiDataset, features: np.ndarray, partition: Partition, settings: ProbeSettings
) -> tuple[LinearHead, float]:
    """The head of one partition and the penalty it was fitted with."""
    num_labels = len(dataset.label_names)
    train = pool_items(dataset, features, partition.train)
    validation = pool_items(dataset, features, partition.validation)
    if settings.l2 is not None or not validation.ids:
        l2 = 1.0 if settings.l2 is None else settings.l2
        return fit_head(train.features, train.labels, num_labels, settings, l2), l2
    if settings.eval_split == "validation":
        raise ValueError(
            "eval_split='validation' is what the penalty would be chosen on: pass l2 (e.g. 1.0), or report the test "
            "split."
        )
    heads = {l2: fit_head(train.features, train.labels, num_labels, settings, l2) for l2 in _L2_CANDIDATES}

    def score(l2: float) -> tuple[float, float]:
        predictions = heads[l2].logits(validation.features).argmax(axis=1)
        metrics = evaluate_predictions(validation.labels, predictions, dataset.label_names, samples=0)
        return metrics["balanced_accuracy"], l2  # of equals the strongest penalty

    l2 = max(_L2_CANDIDATES, key=score)
    return heads[l2], l2


def fit_head(
    features: np.ndarray, labels: np.ndarray, num_labels: int, settings: ProbeSettings, l2: float
) -> LinearHead:
    """Fits a linear classifier on standardised features; the standardisation is merged into the head.

    Args:
        features: (items, pooled_size).
        labels: (items,) class indices. Classes that do not occur are never predicted.
        num_labels: how many classes there are.
        settings: solver and its settings.
        l2: weight of the penalty.

    Raises:
        ValueError: fewer than two classes occur, or features that are not finite.
    """
    seen = np.unique(labels)
    if len(seen) < 2:
        raise ValueError(f"the training split holds {len(seen)} of {num_labels} classes: a classifier needs two.")
    features = features.astype(np.float64)
    if not np.isfinite(features).all():
        raise ValueError("the features are not finite: run the model in float32 or bfloat16, and check its weights.")
    mean, std = features.mean(axis=0), features.std(axis=0)
    std = np.where(std > 1e-8 * np.abs(mean) + 1e-12, std, 1.0)  # a constant feature says nothing
    fit = _fit_lbfgs if settings.solver == "lbfgs" else _fit_sgd
    seen_weight, seen_bias = fit((features - mean) / std, np.searchsorted(seen, labels), len(seen), settings, l2)
    weight, bias = np.zeros((num_labels, features.shape[1])), np.full(num_labels, _UNSEEN_CLASS_BIAS)
    weight[seen] = seen_weight / std
    bias[seen] = seen_bias - weight[seen] @ mean
    return LinearHead(weight, bias)


def _fit_lbfgs(
    features: np.ndarray, labels: np.ndarray, num_labels: int, settings: ProbeSettings, l2: float
) -> tuple[np.ndarray, np.ndarray]:
    solver = LogisticRegression(C=1 / l2 if l2 else np.inf, max_iter=2000, tol=1e-6)
    solver.fit(features, labels)
    if num_labels == 2:  # scikit-learn keeps one row of the two
        return np.concatenate([-solver.coef_, solver.coef_]) / 2, np.concatenate(
            [-solver.intercept_, solver.intercept_]
        ) / 2
    return solver.coef_, solver.intercept_


def _fit_sgd(
    features: np.ndarray, labels: np.ndarray, num_labels: int, settings: ProbeSettings, l2: float
) -> tuple[np.ndarray, np.ndarray]:
    generator = torch.Generator().manual_seed(settings.seed)
    inputs, targets = torch.from_numpy(features), torch.from_numpy(labels)
    head = torch.nn.Linear(features.shape[1], num_labels, dtype=torch.float64)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    # The penalty of the mean loss that has the minimum of scikit-learn's sum of losses.
    groups = [{"params": [head.weight], "weight_decay": l2 / len(labels)}, {"params": [head.bias]}]
    optimizer = torch.optim.SGD(groups, lr=settings.sgd_learning_rate, momentum=0.9)
    steps = settings.sgd_epochs * -(-len(labels) // settings.sgd_batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(settings.sgd_epochs):
        for batch in torch.randperm(len(labels), generator=generator).split(settings.sgd_batch_size):
            loss = torch.nn.functional.cross_entropy(head(inputs[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.weight.detach().numpy(), head.bias.detach().numpy()


def merge_head(
    model: "SparsePathViTModel", head: LinearHead, label_names: Sequence[str]
) -> SparsePathViTForImageClassification:
    """A classifier with `model`'s weights, which it shares, and `head`; its config is a copy with the labels.

    Args:
        model: the encoder whose pooled features the head was fitted on.
        head: the fitted head.
        label_names: of the classes, by index.
    """
    config: SparsePathViTConfig = copy.deepcopy(model.config)
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: index for index, name in enumerate(label_names)}
    with torch.device("meta"):
        classifier = SparsePathViTForImageClassification(config)
    classifier.sparsepath_vit = model
    classifier.classifier = torch.nn.Linear(*head.weight.shape[::-1], device=model.device, dtype=model.dtype)
    with torch.no_grad():
        classifier.classifier.weight.copy_(torch.from_numpy(head.weight))
        classifier.classifier.bias.copy_(torch.from_numpy(head.bias))
    return classifier.eval()
