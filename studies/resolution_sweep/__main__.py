#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""Accuracy, time and memory against resolution, with controls: what does the gain come from?

Each row is a linear probe of frozen features. Variants: dense, sparse, pruned (sparse with tokens removed), tiles
(features of 224 px tiles averaged), background_dropped (white patches left out, nothing pruned), random_pruning and
inverse_pruning. Views: field_of_view (the whole region in that many pixels), pixels (the region's middle at its own
resolution), resolution (as many pixels as the largest size, with the detail of the smaller one). Ablations over window
size, prune ratio and prune layer run at the largest size.

Writes OUT/sweep.csv row by row, so that a stopped run goes on where it was, then shares.csv (how much of the
gain comes from resolution, how much from more tokens) and accuracy.png, memory.png, ablations.png. Sizes for which
there is not enough memory are marked and left out.

Examples:
    python -m studies.resolution_sweep --dataset-dir outputs/radboud --model-name-or-path ./uni2-h \
        --sizes 224,448,896,1400,2240,3430 --out outputs/sweep --bf16
    python -m studies.resolution_sweep --image-folder images --model-name-or-path ./uni2-h --sizes 224,448,1022 \
        --parts resolution --views field_of_view --variants dense,sparse,pruned --out outputs/sweep
"""

import argparse
import logging
from pathlib import Path

import torch
from transformers import set_seed

import sparsepath_vit  # noqa: F401  registers the Auto classes
from sparsepath_vit.runtime.extras import ScriptParser, imports_of_extra, run_script
from sparsepath_vit.runtime.load_model import load_model

with imports_of_extra("train", "matplotlib"):
    from sparsepath_vit.tasks.classification.features import FeatureSettings
    from sparsepath_vit.tasks.classification.linear_probe import ProbeSettings
    from sparsepath_vit.tasks.classification.roi_files import load_labelled_rois

    from ..figures import plot_sweep
    from ..results import ResultsTable, write_table
    from .plan import PARTS, VARIANTS, VIEWS, SweepSettings
    from .sweep import FAILED, KEYS, OK, OUT_OF_MEMORY, VALUES, resolution_shares, run_sweep

logger = logging.getLogger("resolution_sweep")


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def numbers(text: str) -> tuple[float, ...]:
    return tuple(float(number) for number in text.split(",") if number)


def names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def parse() -> argparse.Namespace:
    """The flags."""
    parser = ScriptParser(__doc__)
    add_data_flags(parser)
    add_sweep_flags(parser, SweepSettings(sizes=(224,)))
    return parser.parse_args()


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """What is classified."""
    data = parser.add_argument_group("data")
    source = data.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset-dir", help="made by scripts/prepare_panda.py")
    source.add_argument("--image-folder", help="holds one folder of images per class; cross-validated")
    data.add_argument("--data-root", help="where the slides of --dataset_dir lie now, if they were moved")
    data.add_argument("--folds", type=int, default=5, help="of --image_folder")
    data.add_argument("--group-pattern", help="regular expression: what file names of one patient or block share")
    data.add_argument("--shuffle-labels", action="store_true", help="control: the accuracy must be at chance")
    data.add_argument("--eval-split", default="test", choices=["test", "validation"])


def add_sweep_flags(parser: argparse.ArgumentParser, defaults: SweepSettings) -> None:
    """With which model, and what is varied."""
    model = parser.add_argument_group("model")
    model.add_argument("--model-name-or-path", required=True, help="folder or Hub id of a converted checkpoint")
    model.add_argument("--window-size", type=int, default=defaults.window_size)
    model.add_argument("--prune-ratio", type=float, default=defaults.prune_ratio)
    model.add_argument("--prune-after-layer", type=int, help="counted from 1; the checkpoint's by default")
    model.add_argument("--attention", default="block_sparse", choices=["block_sparse", "sdpa", "eager"])
    model.add_argument("--bf16", action="store_true")
    model.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sweep = parser.add_argument_group("sweep")
    sweep.add_argument("--sizes", type=integers, required=True, help="px of a region's longer side: 224,448,...")
    sweep.add_argument("--variants", type=names, default=defaults.variants, help=f"of {','.join(VARIANTS)}")
    sweep.add_argument("--views", type=names, default=defaults.views, help=f"of {','.join(VIEWS)}")
    sweep.add_argument("--parts", type=names, default=defaults.parts, help=f"of {','.join(PARTS)}")
    sweep.add_argument("--tile-size", type=int, default=defaults.tile_size, help="px of the tiles that are averaged")
    sweep.add_argument("--windows", type=integers, default=defaults.windows, help="ablation of the window size")
    sweep.add_argument("--prune-ratios", type=numbers, default=defaults.prune_ratios, help="ablation")
    sweep.add_argument("--prune-layers", type=integers, default=defaults.prune_layers, help="ablation")
    sweep.add_argument("--ablation-size", type=int, help="px; the largest of --sizes by default")
    sweep.add_argument("--l2", type=float, help="penalty of the probe; chosen on the validation split by default")
    sweep.add_argument("--bootstrap-samples", type=int, default=1000, help="for the 95 %% intervals")
    sweep.add_argument("--repeats", type=int, default=defaults.repeats, help="timed forwards per row; 0 times nothing")
    sweep.add_argument("--max-memory-gib", type=float, help="mark what needs more; what is free by default")
    sweep.add_argument("--batch-size", type=int, default=1, help="regions or tiles per forward")
    sweep.add_argument("--workers", type=int, default=2, help="threads that read regions")
    sweep.add_argument("--seed", type=int, default=0)
    sweep.add_argument("--retry-failed", action="store_true", help="measure rows again that failed or lacked memory")
    sweep.add_argument("--out", "--output-dir", dest="output_dir", type=Path, required=True)
    sweep.add_argument("--cache-dir", help="of the features; `features` in --dataset_dir or --output_dir by default")


def main() -> None:
    arguments = parse()
    run_script(run, arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measures what is lacking; writes tables and figures."""
    settings = sweep_settings(arguments)
    set_seed(arguments.seed)
    dataset, _ = load_labelled_rois(
        arguments.dataset_dir,
        arguments.image_folder,
        data_root=arguments.data_root,
        num_folds=arguments.folds,
        group_pattern=arguments.group_pattern,
        shuffle_labels=arguments.shuffle_labels,
        seed=arguments.seed,
    )
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    model, processor = load_model(
        arguments.model_name_or_path, arguments.device, dtype, attn_implementation=arguments.attention
    )
    table = ResultsTable(arguments.output_dir / "sweep.csv", KEYS, VALUES)
    if arguments.retry_failed:
        dropped = table.drop(status=FAILED) + table.drop(status=OUT_OF_MEMORY)
        logger.info("%d rows are measured again", dropped)
    folder = Path(arguments.dataset_dir) if arguments.dataset_dir else arguments.output_dir
    cache_dir = arguments.cache_dir or str(folder / "features")
    rows = run_sweep(dataset, model, processor, settings, table, cache_dir)
    report(rows, arguments.output_dir)


def sweep_settings(arguments: argparse.Namespace) -> SweepSettings:
    """The flags as settings."""
    features = FeatureSettings(batch_size=arguments.batch_size, workers=arguments.workers)
    shared = ("sizes", "variants", "views", "parts", "window_size", "prune_ratio", "prune_after_layer", "tile_size")
    shared += ("windows", "prune_ratios", "prune_layers", "ablation_size", "repeats")
    limit = arguments.max_memory_gib
    return SweepSettings(
        **{name: getattr(arguments, name) for name in shared},
        probe=ProbeSettings(
            features=features,
            l2=arguments.l2,
            eval_split=arguments.eval_split,
            bootstrap_samples=arguments.bootstrap_samples,
            seed=arguments.seed,
        ),
        memory_limit=None if limit is None else int(limit * 2**30),
    )


def report(rows: list[dict[str, str]], folder: Path) -> None:
    """Log lines, the shares and the figures."""
    for row in rows:
        measured = f"accuracy {row['accuracy']} ({row['accuracy_low']} to {row['accuracy_high']})"
        logger.info(
            "%-11s %-13s %5s px  %-18s w = %-4s p = %-4s layer %s  %s",
            *(row["part"], row["view"], row["size"], row["variant"], row["window_size"] or "all", row["prune_ratio"]),
            *(row["prune_after_layer"], measured if row["status"] == OK else f"{row['status']}: {row['note']}"),
        )
    if not any(row["status"] == OK for row in rows):
        raise ValueError(f"no row could be measured; the reasons are in the column `note` of {folder / 'sweep.csv'}.")
    for share in (shares := resolution_shares(rows)):
        logger.info(
            "%s: %+.3f from %d to %d px, of which %+.3f come from resolution and %+.3f from more tokens",
            *(share["variant"], share["gain"], share["smallest"], share["largest"]),
            *(share["from_resolution"], share["from_tokens"]),
        )
    if shares:
        write_table(folder / "shares.csv", shares)
    for path in (folder / "sweep.csv", *plot_sweep(rows, folder)):
        logger.info("wrote %s", path)


if __name__ == "__main__":
    main()
