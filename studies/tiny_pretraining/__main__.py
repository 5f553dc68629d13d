#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Trains sparsepath-vit-tiny without labels on stained tissue images, and exports it.

The run continues from its last checkpoint when it is started again with the same folder. Log, loss curve, checkpoint
and the exported model land in the output folder.

Examples:
    python -m studies.tiny_pretraining --data-dir ../shared/data
    python -m studies.tiny_pretraining --data-dir ../shared/data --steps 20 --out /tmp/twenty_steps
    python -m studies.tiny_pretraining --data-dir ../shared/data --export modeling/sparsepath_vit/checkpoints/tiny
"""

import argparse
import logging
from pathlib import Path

from sparsepath_vit.runtime.extras import ScriptParser, imports_of_extra, run_script

with imports_of_extra("train", "matplotlib"):
    from .plots import plot_losses
    from .run import LOG_FILE, PretrainingRecipe, PretrainingRun


logger = logging.getLogger("pretrain_tiny")

RECIPE = Path(__file__).parents[2] / "configuration" / "recipes" / "pretrain_tiny.yaml"


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder the recipe's image patterns refer to")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--out", "--output-dir", dest="output_dir", type=Path, default=Path("outputs/pretrain_tiny"))
    parser.add_argument("--steps", type=int, help="stop after this many steps of the recipe; its schedule stays")
    parser.add_argument("--export", type=Path, help="also write the model to this folder")
    arguments = parser.parse_args()
    run_script(run, arguments)


def run(arguments: argparse.Namespace) -> None:
    """Trains or continues, draws the loss curve, exports."""
    recipe = PretrainingRecipe.from_file(arguments.recipe)
    training = PretrainingRun(recipe, arguments.data_dir, arguments.output_dir)
    logger.info("%d images, %d of %d steps done", len(training.files), training.step, recipe.steps)
    remaining = None if arguments.steps is None else max(0, arguments.steps - training.step)
    training.train(remaining)
    curve = arguments.output_dir / "losses.png"
    plot_losses(arguments.output_dir / LOG_FILE, curve)
    for folder in filter(None, (arguments.output_dir / "model", arguments.export)):
        logger.info("wrote %s", training.export(folder))
    logger.info("wrote %s", curve)


if __name__ == "__main__":
    main()
