#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""Compares block-local, stratified and pruned variants of a checkpoint with the dense model, image by image.

Writes OUT/fidelity.csv, row by row, and goes on where it was stopped; with --figure also a picture of means by size.
Without --images the twelve regions of --data-dir are taken, as central squares, and without --model-name-or-path the
weights of `studies.real_weights`. For one image `sparsepath fidelity` shows the same at once. Sizes at which dense does
not fit in memory are refused, with the size that would fit.

Examples:
    python -m studies.fidelity --data-dir ../shared/data --sizes 700,1022,1400 --out model_card/results
    python -m studies.fidelity --data-dir ../shared/data --sizes 2240 --least-side 1100 --out model_card/results
    python -m studies.fidelity --model-name-or-path ./uni2-h --images region.png --sizes 448,1120 --out outputs/f
    python -m studies.fidelity --model-name-or-path ./uni2-h --images rois/*.png --windows 4,8 --out outputs/f \
        --context-tokens 0,1024 --prune-ratios 0,0.6 --bf16
"""

import argparse
import itertools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from sparsepath_vit.runtime.extras import ScriptParser, imports_of_extra, run_script
from sparsepath_vit.runtime.load_model import load_model

with imports_of_extra("train", "matplotlib"):
    from sparsepath_vit.comparison.fidelity import DenseDoesNotFit, compare_to_dense
    from sparsepath_vit.comparison.images import resized
    from sparsepath_vit.runtime.measure import describe_run
    from sparsepath_vit.runtime.pixels import prepare

    from ..figures import plot_fidelity
    from ..real_weights.cache import cache_folder, chosen_checkpoint
    from ..regions import shorter_side, spread_order, square, twelve_regions
    from ..results import ResultsTable

logger = logging.getLogger("fidelity")

KEYS = ("model", "image", "size", "variant")
VALUES = (
    *("height", "width", "tokens", "kept_tokens", "window_size", "num_context_tokens", "prune_ratio"),
    *("prune_after_layer", "num_representatives", "keys_per_query", "seconds", "peak_bytes", "cls_cosine"),
    *("pooled_cosine", "patch_cosine", "patch_cosine_p5", "centred_patch_cosine", "centred_patch_cosine_p5"),
    *("self_similarity", "estimated_cls_error", "same_prediction"),
    *("commit", "sparsepath_vit", "torch", "transformers", "python", "machine", "threads"),
)


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--model-name-or-path", help="converted checkpoint; that of studies.real_weights by default")
    parser.add_argument("--images", type=Path, nargs="+", help="instead of the twelve regions")
    parser.add_argument("--data-dir", type=Path, help="folder with the twelve regions")
    parser.add_argument("--most-images", type=int, default=12, help="so many of the twelve, evenly spread")
    parser.add_argument("--least-side", type=int, default=0, help="px; without those of the twelve that are smaller")
    parser.add_argument("--sizes", default="", help="px of the longer side, comma separated; as they are by default")
    parser.add_argument("--windows", default="8", help="tokens per block side")
    parser.add_argument("--context-tokens", default="0,1024", help="0 is block-local attention")
    parser.add_argument("--prune-ratios", default="0,0.6", help="shares of patch tokens removed")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--figure", type=Path, help="PNG to draw, where one is wanted")
    parser.add_argument("--out", "--output-dir", dest="output_dir", type=Path, required=True)
    run_script(run, parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Compares all images at all sizes, and writes table and figure."""
    checkpoint = chosen_checkpoint(arguments.model_name_or_path)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    model, processor = load_model(checkpoint, arguments.device, dtype)
    table = ResultsTable(arguments.output_dir / "fidelity.csv", KEYS, VALUES)
    name = arguments.model_name_or_path or cache_folder().name
    variants, described = variants_of(arguments), describe_run(arguments.device)
    for path, size in tqdm(images_and_sizes(arguments), desc="fidelity", unit="image"):
        key = {"model": name, "image": path.name, "size": size or ""}
        lacking = [variant for variant in variants if not table.holds(**key, **variant)]
        if not lacking:
            continue
        pixels = region(path, size, arguments.images is None)
        inputs = prepare(processor, [pixels], model.device, mask_background=processor.mask_background)
        try:
            rows = compare_to_dense(model, inputs, lacking, estimates_error=True)
        except DenseDoesNotFit as error:
            logger.warning("%s: %s", path.name, error)
            continue
        for row in rows:
            if not table.has(key | row.row()):
                table.add(key | row.row() | described)
    if not table.rows:
        raise ValueError("nothing could be compared: dense fits at none of the sizes (see above).")
    if arguments.figure is not None:
        plot_fidelity(table.rows, arguments.figure)
    summarise(table)


def variants_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All combinations; where context tokens are drawn, pruning leaves as many representatives."""
    numbers = (arguments.windows, arguments.context_tokens)
    windows, samples = ([int(number) for number in text.split(",")] for text in numbers)
    ratios = [float(ratio) for ratio in arguments.prune_ratios.split(",")]
    return [
        {
            "window_size": window,
            "num_context_tokens": number,
            "prune_ratio": ratio,
            "num_representatives": number if ratio else 0,
        }
        for window, ratio, number in itertools.product(windows, ratios, samples)
    ]


def images_and_sizes(arguments: argparse.Namespace) -> list[tuple[Path, int | None]]:
    """What is measured, small sizes first.

    Raises:
        ValueError: neither images nor the folder of the twelve regions are given, or no size for the latter.
    """
    sizes = [int(size) for size in arguments.sizes.split(",") if size] or [None]
    paths = arguments.images
    if paths is None:
        if arguments.data_dir is None or None in sizes:
            raise ValueError("nothing to compare: pass --images, or --data-dir and --sizes.")
        regions = list(twelve_regions(arguments.data_dir))
        spread = [regions[index] for index in spread_order(len(regions))]
        paths = [path for path in spread if shorter_side(path) >= arguments.least_side][: arguments.most_images]
    return [(path, size) for size in sizes for path in paths]


def region(path: Path, size: int | None, is_square: bool) -> np.ndarray:
    """(height, width, 3) uint8."""
    if is_square:
        return square(path, size)
    with Image.open(path) as opened:
        return np.asarray(resized(opened.convert("RGB"), size))


def summarise(table: ResultsTable) -> None:
    """Logs mean and worst over images."""
    for size, variant in dict.fromkeys((row["size"], row["variant"]) for row in table.rows):
        of = [row for row in table.rows if (row["size"], row["variant"]) == (size, variant)]
        names = ("cls_cosine", "centred_patch_cosine", "keys_per_query", "seconds")
        cls, centred, keys, seconds = (np.array([float(row[name]) for row in of]) for name in names)
        logger.info(
            "%5s px  %-58s CLS %.4f (worst %.4f)  patches %.3f (worst %.3f)  keys %5.0f  %5.1f s  %d images",
            *(size, variant, cls.mean(), cls.min(), centred.mean(), centred.min(), keys.mean()),
            *(np.median(seconds), len(of)),
        )


if __name__ == "__main__":
    main()
