#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""Which layer's prune score keeps what matters, and does it do better than how saturated the colour is?

Three targets, on tokens that people or a tissue mask have labelled: tissue against glass (osteosarcoma regions), nuclei
against the rest of the tissue (TNBC), tumour or epithelial against stromal cells (BRCA-M2C). For each layer, the area
under the ROC of each prune score: the attention of all global queries or of CLS alone, as it is, times the norm of the
value, or times the norm of what the value has beyond the mean one. 0.5 is chance, below it the target is removed first.
Means over images with 95 % intervals, images drawn. Real pretrained weights (`python -m studies.real_weights`).

Examples:
    python -m studies.prune_layers --data-dir ../shared/data --out model_card/results
    python -m studies.prune_layers --data-dir ../shared/data --model-name-or-path ./uni2-h --window-size 0
"""

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel
from sparsepath_vit.runtime.extras import ScriptParser, imports_of_extra, run_script
from sparsepath_vit.runtime.load_model import load_model
from sparsepath_vit.runtime.measure import describe_run

from ..real_weights.cache import chosen_checkpoint
from ..results import write_table

with imports_of_extra("train", "sklearn"):
    from sparsepath_vit.tasks.bootstrap import bootstrap_interval

    from .scores import SCORES, areas_of_image
    from .targets import TARGETS

logger = logging.getLogger("prune_layers")


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="with classification/ and segmentation/")
    parser.add_argument("--model-name-or-path", help="converted checkpoint; that of studies.real_weights by default")
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--window-size", type=int, default=8, help="patch tokens per block side; 0 for dense attention")
    parser.add_argument("--out", type=Path, default=Path("outputs/prune_layers"), help="folder of prune_layers.csv")
    run_script(run, parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Measures target by target; what is there is kept."""
    targets = arguments.targets.split(",")
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise ValueError(f"--targets {', '.join(unknown)} unknown: choose from {', '.join(TARGETS)}.")
    source = chosen_checkpoint(arguments.model_name_or_path)
    model, processor = load_model(source, "cpu", "float32", model_class=SparsePathViTModel)
    model.config.window_size = arguments.window_size or None
    described = {"model": Path(source).name, "window_size": arguments.window_size, **describe_run("cpu")}
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for target in targets:
        images = TARGETS[target](arguments.data_dir, model.config.patch_size)
        areas = [areas_of_image(model, processor, image) for image in images]
        rows += [{"target": target, **row, **described} for row in rows_of_target(areas)]
        write_table(arguments.out / "prune_layers.csv", rows)
        _log_best(rows, target)


def rows_of_target(areas: list[dict[tuple[int, str], float]]) -> Iterator[dict[str, object]]:
    """A row for each layer and score, from the areas under the ROC of each image."""
    for layer, score in areas[0]:
        values = np.array([of_image[layer, score] for of_image in areas])
        _, low, high = bootstrap_interval(lambda drawn, values=values: values[drawn].mean(), len(values))
        numbers = {"auroc": values.mean(), "auroc_low": low, "auroc_high": high, "auroc_worst": values.min()}
        rounded = {name: round(float(number), 4) for name, number in numbers.items()}
        yield {"layer": layer, "score": score, **rounded, "images": len(values)}


def _log_best(rows: list[dict[str, object]], target: str) -> None:
    for score in ("saturation", *SCORES):
        of_score = [row for row in rows if (row["target"], row["score"]) == (target, score)]
        best = max(of_score, key=lambda row: row["auroc"])
        logger.info("%s, %s: %s after layer %s", target, score, best["auroc"], best["layer"])


if __name__ == "__main__":
    main()
