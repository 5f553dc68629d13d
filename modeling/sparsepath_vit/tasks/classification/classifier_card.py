# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The model card of a classifier of slides: what it was trained on, how good it is, and what nobody knows of it."""

from collections import Counter
from typing import Any

from .slide_bags import SlideBags

_SHOWN = {
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC, one class against the rest",
    "accuracy": "accuracy",
    "f1_macro": "F1, mean over classes",
    "quadratic_kappa": "quadratic kappa",
}
_KINDS = {
    "linear": "logistic regression on the mean over a slide's vectors",
    "abmil": "attention-based multiple-instance learning (gated attention, Ilse et al. 2018)",
}
_SETTINGS = ("weights", "mpp", "tile_size", "region_size", "whole_slide", "prune_ratio", "minimum_tissue")

_CARD = """---
library_name: sparsepath-vit
pipeline_tag: image-classification
tags: [computational-pathology, whole-slide-image, multiple-instance-learning]
---

# {name}

A classifier of whole slides: {kind}, on embeddings of SparsePathViT. **For research only; no medical device.**

## Data

{num_slides} slides of {num_patients} patients (where no patients were given, every slide counts as one).

| class | slides | patients |
|---|---|---|
{classes}

## How good it is

Every slide was predicted by a classifier that had not seen its patient ({num_folds} folds). In brackets the
95 % interval of a bootstrap over patients. The classifier in this folder was then trained on all slides: it was not
tested itself.

| | |
|---|---|
{rows}

Rows are labels, columns predictions:

| | {names} |
|---|{lines}
{matrix}

## Features

{settings}

Features made with other settings are refused.

## What is not known

Whether it holds for other scanners, laboratories, stains or populations: measure that before you rely on it. Nothing
here corrects for confounders; a class that comes from one scanner is told by the scanner.
"""


def model_card(kind: str, metrics: dict[str, Any], bags: SlideBags, name: str) -> str:
    """Markdown with the metadata that the Hub reads."""
    slides = Counter(bags.label_names[label] for label in bags.labels.tolist())
    patients = {label: len(set(bags.groups[bags.labels == index])) for index, label in enumerate(bags.label_names)}
    classes = "\n".join(f"| {label} | {slides[label]} | {patients[label]} |" for label in bags.label_names)
    rows = "\n".join(f"| {shown} | {_number(metrics, key)} |" for key, shown in _SHOWN.items())
    settings = "\n".join(f"* `{key}`: {bags.settings[key]}" for key in _SETTINGS if bags.settings.get(key) is not None)
    matrix = "\n".join(
        f"| {label} | {' | '.join(map(str, counts))} |"
        for label, counts in zip(metrics["label_names"], metrics["confusion_matrix"], strict=True)
    )
    return _CARD.format(
        name=name,
        kind=_KINDS[kind],
        num_slides=len(bags),
        num_patients=len(set(bags.groups)),
        num_folds=metrics["num_folds"],
        classes=classes,
        rows=rows,
        names=" | ".join(metrics["label_names"]),
        lines="---|" * len(metrics["label_names"]),
        matrix=matrix,
        settings=settings,
    )


def _number(metrics: dict[str, Any], key: str) -> str:
    if metrics.get(key) is None:
        return "not defined"
    low, high = metrics.get(f"{key}_low"), metrics.get(f"{key}_high")
    return f"{metrics[key]:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else "")
