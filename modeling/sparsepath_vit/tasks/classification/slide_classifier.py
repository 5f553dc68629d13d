# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A classifier of slides on their embeddings: trained with folds that keep patients together, saved with its card."""

import csv
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from ...runtime.atomic_files import atomic_folder
from ...runtime.short_repr import ShortRepr
from ...slides.store import differing_settings
from ..bootstrap import bootstrap_interval
from .attention_mil import AttentionMIL, fit_attention_mil
from .classifier_card import model_card
from .linear_probe import ProbeSettings, fit_head
from .metrics import evaluate_predictions
from .slide_bags import SlideBags

MODELS = ("linear", "abmil")
CONFIG_FILE, WEIGHTS_FILE = "classifier.json", "classifier.safetensors"
METRICS_FILE, PREDICTIONS_FILE = "metrics.json", "predictions.csv"


@dataclass(frozen=True, repr=False)
class SlideClassifier(ShortRepr):
    """A trained classifier of slides.

    Attributes:
        kind: "linear" (logistic regression on the mean over a slide's rows) or "abmil".
        label_names: of the classes, by index.
        settings: what the features that it takes are made with.
        state: its tensors, by name.
    """

    kind: str
    label_names: tuple[str, ...]
    settings: dict[str, Any]
    state: dict[str, torch.Tensor]

    def probabilities(self, bag: np.ndarray) -> np.ndarray:
        """(rows, width) of one slide -> (classes,) float64."""
        if self.kind == "linear":
            mean = torch.from_numpy(bag.mean(axis=0, dtype=np.float64))
            logits = self.state["weight"] @ mean + self.state["bias"]
        else:
            with torch.no_grad():
                logits, _ = self._attention_model()(torch.from_numpy(bag))
        return logits.double().softmax(dim=0).numpy()

    def attention(self, bag: np.ndarray) -> np.ndarray:
        """(rows, width) of one slide -> (rows,) the share of attention of each; equal shares where it is linear."""
        if self.kind == "linear":
            return np.full(len(bag), 1 / len(bag))
        with torch.no_grad():
            return self._attention_model()(torch.from_numpy(bag))[1].numpy()

    def _attention_model(self) -> AttentionMIL:
        mean, std = self.state["mean"], self.state["std"]
        model = AttentionMIL(len(mean), len(self.label_names), mean, std)
        model.load_state_dict(self.state)
        return model.eval()


@dataclass(frozen=True, repr=False)
class TrainingResult(ShortRepr):
    """What training found.

    Attributes:
        classifier: fitted on all slides.
        metrics: of `metrics.evaluate_predictions` over slides that were predicted by a classifier that did not see
            their patient, resampled by patient; `auroc` (one against the rest, mean over classes), and `num_folds`.
        probabilities: (slides, classes) of these predictions.
    """

    classifier: SlideClassifier
    metrics: dict[str, Any]
    probabilities: np.ndarray


def train_slide_classifier(
    bags: SlideBags, kind: str = "linear", *, folds: int = 5, samples: int = 1000, seed: int = 0
) -> TrainingResult:
    """Cross-validates with folds that keep patients together, then trains on everything.

    Args:
        bags: labelled slides.
        kind: "linear" or "abmil".
        folds: how many; fewer where a class has fewer patients.
        samples: bootstrap resamples for the intervals.
        seed: of folds, training and bootstrap.

    Raises:
        ValueError: an unknown kind, or a class of fewer than two patients.
    """
    if kind not in MODELS:
        raise ValueError(f"model={kind!r} is unknown: choose one of {', '.join(MODELS)}.")
    patients = [len(set(bags.groups[bags.labels == label])) for label in range(len(bags.label_names))]
    if min(patients) < 2 or folds < 2:
        counted = ", ".join(f"{name}: {count}" for name, count in zip(bags.label_names, patients, strict=True))
        raise ValueError(
            f"folds={folds} of patients ({counted}): cross-validation needs two folds and two of each class."
        )
    folds = min(folds, *patients)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    probabilities = np.zeros((len(bags), len(bags.label_names)))
    for train, held_out in splitter.split(np.zeros(len(bags)), bags.labels, bags.groups):
        classifier = _fit(bags, train, kind, seed)
        for index in held_out:
            probabilities[index] = classifier.probabilities(bags.bag(index))
    predictions = probabilities.argmax(axis=1)
    metrics = evaluate_predictions(bags.labels, predictions, bags.label_names, bags.groups, samples, seed)
    metrics |= _auroc(bags, probabilities, samples, seed) | {"num_folds": folds, "model": kind}
    return TrainingResult(_fit(bags, np.arange(len(bags)), kind, seed), metrics, probabilities)


def save_slide_classifier(result: TrainingResult, bags: SlideBags, folder: str | os.PathLike[str]) -> None:
    """Writes classifier, metrics, predictions and model card; a folder that is there is replaced."""
    classifier = result.classifier
    config = {"model": classifier.kind, "label_names": classifier.label_names, "settings": classifier.settings}
    with atomic_folder(folder) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in classifier.state.items()}, temporary / WEIGHTS_FILE)
        (temporary / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (temporary / METRICS_FILE).write_text(json.dumps(result.metrics, indent=2) + "\n", encoding="utf-8")
        table = predictions_table(bags, result.probabilities, classifier.label_names)
        (temporary / PREDICTIONS_FILE).write_text(table, encoding="utf-8")
        card = model_card(classifier.kind, result.metrics, bags, Path(folder).name)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def load_slide_classifier(folder: str | os.PathLike[str]) -> SlideClassifier:
    """What `save_slide_classifier` wrote.

    Raises:
        ValueError: the folder holds no classifier.
    """
    path = Path(folder)
    if not (path / CONFIG_FILE).exists() or not (path / WEIGHTS_FILE).exists():
        raise ValueError(
            f"{path} holds no classifier of slides: expected {CONFIG_FILE} and {WEIGHTS_FILE}, as train writes."
        )
    config = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))
    state = load_file(path / WEIGHTS_FILE)
    return SlideClassifier(config["model"], tuple(config["label_names"]), config["settings"], state)


def predict_slides(classifier: SlideClassifier, bags: SlideBags) -> np.ndarray:
    """(slides, classes) probabilities.

    Raises:
        ValueError: the features were made with other settings than those the classifier was trained on.
    """
    if keys := differing_settings(classifier.settings, bags.settings):
        shown = "; ".join(
            f"{key}: {classifier.settings.get(key)!r} trained on, {bags.settings.get(key)!r} here" for key in keys
        )
        raise ValueError(f"these features are not those that the classifier knows ({shown}): embed the slides alike.")
    return np.stack([classifier.probabilities(bags.bag(index)) for index in range(len(bags))])


def predictions_table(bags: SlideBags, probabilities: np.ndarray, label_names: tuple[str, ...]) -> str:
    """CSV with a row for each slide: patient and label where known, prediction, and the probability of each class."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    has_labels = len(bags.labels) > 0
    known = ("patient", "label") if has_labels else ()
    writer.writerow(["slide", *known, "prediction", *(f"probability_{name}" for name in label_names)])
    for index, name in enumerate(bags.names):
        own = (bags.groups[index], bags.label_names[bags.labels[index]]) if has_labels else ()
        shares = [f"{share:.6f}" for share in probabilities[index]]
        writer.writerow([name, *own, label_names[probabilities[index].argmax()], *shares])
    return text.getvalue()


def _fit(bags: SlideBags, indices: np.ndarray, kind: str, seed: int) -> SlideClassifier:
    labels, num_labels = bags.labels[indices], len(bags.label_names)
    vectors = [bags.bag(index) for index in indices]
    if kind == "linear":
        means = np.stack([bag.mean(axis=0, dtype=np.float64) for bag in vectors])
        head = fit_head(means, labels, num_labels, ProbeSettings(seed=seed), l2=1.0)
        state = {"weight": torch.from_numpy(head.weight), "bias": torch.from_numpy(head.bias)}
    else:
        state = dict(fit_attention_mil(vectors, labels, num_labels, seed=seed).state_dict())
    return SlideClassifier(kind, bags.label_names, bags.settings, state)


def _auroc(bags: SlideBags, probabilities: np.ndarray, samples: int, seed: int) -> dict[str, float | None]:
    """Area under the ROC curve, one class against the rest, mean over classes; the interval resamples patients."""
    patients, patient_of = np.unique(bags.groups, return_inverse=True)
    slides_of = [np.flatnonzero(patient_of == patient) for patient in range(len(patients))]

    def statistic(drawn: np.ndarray) -> float:
        chosen = np.concatenate([slides_of[patient] for patient in drawn])
        present = [bags.labels[chosen] == label for label in range(len(bags.label_names))]
        if any(one.all() or not one.any() for one in present):
            return np.nan
        return float(np.mean([roc_auc_score(one, probabilities[chosen, label]) for label, one in enumerate(present)]))

    value = statistic(np.arange(len(patients)))
    results: dict[str, float | None] = {"auroc": value if np.isfinite(value) else None}
    if samples:
        interval = bootstrap_interval(statistic, len(patients), samples, seed=seed)
        for ending, number in zip(("mean", "low", "high"), interval, strict=True):
            results[f"auroc_{ending}"] = float(number) if np.isfinite(number) else None
    return results
