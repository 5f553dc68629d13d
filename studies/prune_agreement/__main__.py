#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""Does pruning keep what pathologists marked? Prune scores against PANDA's masks, on tissue tokens only.

For each region the AUROC of the prune score against cancer (both centres) and epithelium (Radboud), and the share of
those tokens that is left at each keep rate, beside three controls: the inverse order, a random one, and the amount of
haematoxylin. Writes OUT/agreement.csv (regions), summary.csv (per centre, with 95 % intervals over slides),
agreement.png, problems.csv (what was left out, and why) and one picture per slide of --overlays: the slide, its
annotation, its prune scores, and what is kept.

Examples:
    python -m studies.prune_agreement --dataset-dir outputs/cancer --model-name-or-path ./uni2-h \
        --out outputs/agreement --bf16
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch

import sparsepath_vit  # noqa: F401  registers the Auto classes
from sparsepath_vit.runtime.extras import ScriptParser, imports_of_extra, run_script
from sparsepath_vit.runtime.load_model import load_model

with imports_of_extra("train", "matplotlib", "skimage"):
    from sparsepath_vit.runtime.figures import save_image
    from sparsepath_vit.tasks.classification.roi_files import load_roi_dataset, write_problems
    from sparsepath_vit.tasks.classification.rois import SPLITS, count_problems

    from ..results import write_table
    from .agreement import measure_agreement, summarise_agreement
    from .figures import plot_agreement, slide_figure

logger = logging.getLogger("prune_agreement")


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--dataset-dir", required=True, help="made by scripts/prepare_panda.py, whatever the task")
    parser.add_argument("--data-root", help="the PANDA folder, if it was moved since")
    parser.add_argument("--split", default="all", choices=["all", *SPLITS], help="whose regions are measured")
    parser.add_argument("--model-name-or-path", required=True, help="folder or Hub id of a converted checkpoint")
    parser.add_argument("--prune-after-layer", type=int, help="where the score comes from; the checkpoint's by default")
    parser.add_argument("--prune-ratio", type=float, default=0.6, help="of the pictures")
    parser.add_argument("--overlays", type=int, default=1, help="slides to draw; each takes a forward of the whole")
    parser.add_argument("--bootstrap-samples", type=int, default=1000)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", "--output-dir", dest="output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    run_script(run, arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measures, writes tables and figures."""
    dataset = load_roi_dataset(arguments.dataset_dir, arguments.data_root)
    changes = {} if arguments.prune_after_layer is None else {"prune_after_layer": arguments.prune_after_layer}
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    model, processor = load_model(
        arguments.model_name_or_path, arguments.device, dtype, prune_ratio=arguments.prune_ratio, **changes
    )
    indices = np.arange(len(dataset)) if arguments.split == "all" else dataset.indices(arguments.split)
    rows, problems = measure_agreement(dataset, model, processor, indices.tolist(), arguments.seed)
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_problems(folder, problems)
    if problems:
        logger.info("left out: %s", ", ".join(f"{n} {kind}" for kind, n in count_problems(problems).items()))
    if not rows:
        raise ValueError(
            f"none of {len(indices)} regions holds tissue of both kinds, so there is nothing to compare: the reasons "
            f"are in {folder / 'problems.csv'}. Larger regions hold more kinds."
        )
    write_table(folder / "agreement.csv", rows)
    summary = summarise_agreement(rows, arguments.bootstrap_samples, arguments.seed)
    columns = max(summary, key=len)
    write_table(folder / "summary.csv", [{name: line.get(name) for name in columns} for line in summary])
    plot_agreement(summary, folder / "agreement.png")
    for line in summary:
        interval = f"{line['auroc_low']:.3f} to {line['auroc_high']:.3f}" if "auroc_low" in line else "one slide"
        logger.info(
            "%-10s %-10s %-12s AUROC %.3f (%s), recall at 40 %% kept %.3f, %d regions of %d slides",
            *(line["provider"], line["target"], line["order"], line["auroc"], interval),
            *(line["recall_at_0.4"], line["regions"], line["slides"]),
        )
    slides = list(dict.fromkeys(row["slide_id"] for row in rows))[: arguments.overlays]
    for slide_id in slides:
        roi = next(roi for roi in dataset.rois if roi.slide_id == slide_id)
        path = folder / f"{slide_id}.png"
        save_image(slide_figure(dataset, roi, model, processor), path)
        logger.info("wrote %s", path)
    logger.info("wrote %s", folder)


if __name__ == "__main__":
    main()
