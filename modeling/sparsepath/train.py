# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`sparsepath train`: embeddings and a table of labels -> a classifier of slides."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .console import say

EXAMPLES = (
    "Examples:  `sparsepath train labels.csv --features tiles --target grade --patient case --out outputs/grade`   ·   "
    "`sparsepath train labels.csv --features tiles --target grade --model abmil --out outputs/grade-abmil`"
)

Labels = Annotated[Path, typer.Argument(help="CSV with a row for each slide: its name (slide), a label, a patient.")]
Features = Annotated[Path, typer.Option(help="Folder of embeddings, as `sparsepath embed` writes them.")]
Target = Annotated[str, typer.Option(help="Column of the labels.")]
Patient = Annotated[
    str | None, typer.Option(help="Column of the patients, who stay in one fold; else each slide is one.")
]
Out = Annotated[Path, typer.Option(help="Folder for classifier, metrics, predictions and model card; replaced.")]
Model = Annotated[Literal["linear", "abmil"], typer.Option(help="Mean and logistic regression, or attention pooling.")]


def train(
    labels: Labels,
    features: Features,
    target: Target,
    out: Out,
    patient: Patient = None,
    model: Model = "linear",
    folds: Annotated[int, typer.Option(min=2, help="Folds of the cross-validation.")] = 5,
    seed: Annotated[int, typer.Option(help="Of folds, training and bootstrap.")] = 0,
) -> None:
    """Train a classifier on embedded slides: folds that keep patients together, bootstrap intervals, a model card."""
    from sparsepath_vit.runtime.extras import imports_of_extra

    with imports_of_extra("train", asked_by="sparsepath train"):
        from sparsepath_vit.tasks.classification import (
            read_labelled_bags,
            save_slide_classifier,
            train_slide_classifier,
        )

    bags = read_labelled_bags(labels, features, target, patient)
    result = train_slide_classifier(bags, model, folds=folds, seed=seed)
    save_slide_classifier(result, bags, out)
    metrics = result.metrics
    say(
        f"{len(bags)} slides, {metrics['num_groups']} patients, {metrics['num_folds']} folds; "
        f"classes {', '.join(bags.label_names)}"
    )
    for name in ("balanced_accuracy", "auroc"):
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        interval = f" [{low:.3f}, {high:.3f}]" if low is not None and high is not None else ""
        say(f"{name} {metrics[name]:.3f}{interval}" if metrics[name] is not None else f"{name} is not defined")
    say(f"written to {out}: README.md is its model card")
