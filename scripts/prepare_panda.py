#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""Makes an ROI data set from PANDA as Kaggle ships it (train.csv, train_images/, train_label_masks/).

Tasks: `radboud_pattern` (stroma, benign, G3, G4, G5 by dominant area; Radboud only), `cancer` (benign, cancer; both
centres), `isup` (grade of the slide; needs no masks). Splits are by slide, stratified by provider and ISUP grade, and
the same for all tasks of a seed. Whatever cannot be used is named, listed in problems.csv and counted in summary.json.

Examples:
    python scripts/prepare_panda.py --panda-dir panda --out outputs/radboud --task radboud_pattern
    python scripts/prepare_panda.py --panda-dir panda --out outputs/cancer --task cancer \
        --roi-size 1400 --mpp 0.5 --seed 0 --max-rois-per-slide 4 --allow-subset
"""

import argparse
import logging
from pathlib import Path

from sparsepath_vit.runtime.extras import ScriptParser, imports_of_extra, run_script

with imports_of_extra("train"):
    from sparsepath_vit.tasks.panda.dataset import TASKS
    from sparsepath_vit.tasks.panda.rois import SUMMARY_FILE, PandaSettings, prepare_panda


logger = logging.getLogger("prepare_panda")


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--panda-dir", type=Path, required=True, help="the folder as Kaggle ships it")
    parser.add_argument(
        "--out",
        "--output-dir",
        dest="output_dir",
        type=Path,
        required=True,
        help="an earlier data set in it is replaced",
    )
    parser.add_argument("--task", required=True, choices=list(TASKS))
    parser.add_argument("--roi-size", type=int, default=3430, help="pixels per side (default: 3430)")
    parser.add_argument("--mpp", type=float, default=0.5, help="micrometres per pixel (default: 0.5)")
    parser.add_argument("--seed", type=int, default=0, help="of ROI positions, choice and splits (default: 0)")
    parser.add_argument("--allow-subset", action="store_true", help="fewer than all 10,616 slides are fine")
    parser.add_argument("--max-rois-per-slide", type=int, metavar="K", help="default: all that can be labelled")
    parser.add_argument("--min-tissue", type=float, default=0.1, help="share of the ROI that is tissue (default: 0.1)")
    parser.add_argument(
        "--min-coverage",
        type=float,
        help="share of the annotated tissue that the label needs (default: 0.5 for radboud_pattern, 0.1 for cancer)",
    )
    parser.add_argument(
        "--split-shares",
        type=float,
        nargs=3,
        default=(0.7, 0.15, 0.15),
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="shares of the slides (default: 0.7 0.15 0.15)",
    )
    parser.add_argument(
        "--store",
        choices=["references", "images"],
        default="references",
        help="refer to the slides (default), or write the ROIs' pixels too, lossless: 10 to 25 MB for 3430 px",
    )
    parser.add_argument("--workers", type=int, default=2, help="threads (default: 2)")
    arguments = parser.parse_args()
    run_script(run, arguments)


def run(arguments: argparse.Namespace) -> None:
    """Prepares the data set and says what came of it."""
    settings = PandaSettings(
        task=arguments.task,
        roi_size=arguments.roi_size,
        mpp=arguments.mpp,
        min_tissue=arguments.min_tissue,
        min_coverage=arguments.min_coverage,
        max_rois_per_slide=arguments.max_rois_per_slide,
        split_shares=tuple(arguments.split_shares),
        seed=arguments.seed,
    )
    summary = prepare_panda(
        arguments.panda_dir,
        arguments.output_dir,
        settings,
        allow_subset=arguments.allow_subset,
        store_images=arguments.store == "images",
        workers=arguments.workers,
    )
    logger.info("%d ROIs from %d slides:", summary["rois"], summary["slides_with_rois"])
    for split, counts in summary["rois_by_split"].items():
        logger.info("  %-10s  %s", split, ", ".join(f"{name} {count}" for name, count in counts.items()))
    logger.info("places: %s", ", ".join(f"{count} {outcome}" for outcome, count in summary["places"].items()))
    problems = ", ".join(f"{count} {kind}" for kind, count in summary["problems"].items())
    logger.info("problems: %s", problems or "none")
    logger.info("wrote %s", arguments.output_dir / SUMMARY_FILE)


if __name__ == "__main__":
    main()
