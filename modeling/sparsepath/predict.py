# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`sparsepath predict`: a classifier of slides on embeddings."""

from pathlib import Path
from typing import Annotated

import typer

from .console import say

EXAMPLES = "Example:  `sparsepath predict tiles --model outputs/grade --out predictions.csv`"

Features = Annotated[
    Path, typer.Argument(help="Folder of embeddings, made as those that the classifier was trained on.")
]
Classifier = Annotated[Path, typer.Option(help="Folder that `sparsepath train` wrote.")]
Out = Annotated[Path, typer.Option(help="CSV with a row for each slide.")]


def predict(features: Features, model: Classifier, out: Out) -> None:
    """Predict the class of each embedded slide, with the probability of every class."""
    from sparsepath_vit.runtime.extras import imports_of_extra

    with imports_of_extra("train", asked_by="sparsepath predict"):
        from sparsepath_vit.tasks.classification import load_slide_classifier, predict_slides, read_bags
        from sparsepath_vit.tasks.classification.slide_classifier import predictions_table

    from sparsepath_vit.runtime import write_atomically

    classifier, bags = load_slide_classifier(model), read_bags(features)
    probabilities = predict_slides(classifier, bags)
    write_atomically(out, predictions_table(bags, probabilities, classifier.label_names))
    say(f"{len(bags)} slides predicted: {out}")
