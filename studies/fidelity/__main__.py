#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""Compares sparse variants of a checkpoint with the dense model on the same weights, image by image.

Writes OUT/fidelity.csv (cosines of CLS and patch tokens, dense attention inside the pattern, agreement of
predictions for a classifier), layers.csv (the attention of each layer) and fidelity.png. Sizes at which dense does not
fit in memory are refused, with the size that would fit.

Examples:
    python -m studies.fidelity --model-name-or-path ./uni2-h --images region.png --sizes 448,1120 --out outputs/f
    python -m studies.fidelity --model-name-or-path ./uni2-h --images rois/*.png --windows 4,8 --out outputs/f \
        --prune-ratios 0,0.6 --bf16
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

import sparsepath_vit  # noqa: F401  registers the Auto classes
from sparsepath_vit.runtime.extras import ScriptParser, imports_of_extra, run_script
from sparsepath_vit.runtime.load_model import load_model

with imports_of_extra("train", "matplotlib"):
    from sparsepath_vit.runtime.pixels import prepare

    from ..figures import plot_fidelity
    from ..results import write_table
    from .comparison import DenseDoesNotFit, Fidelity, compare_to_dense

logger = logging.getLogger("fidelity")


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--model-name-or-path", required=True, help="folder or Hub id of a converted checkpoint")
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--sizes", default="", help="px of the longer side, comma separated; as they are by default")
    parser.add_argument("--windows", default="2,4,8,16,64", help="tokens per block side")
    parser.add_argument("--prune-ratios", default="0", help="shares of patch tokens removed")
    parser.add_argument("--max-queries", type=int, default=1024, help="patch queries whose attention is summed; 0: all")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", "--output-dir", dest="output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    run_script(run, arguments)


def run(arguments: argparse.Namespace) -> None:
    """Compares all images at all sizes, and writes tables and figure."""
    config = AutoConfig.from_pretrained(arguments.model_name_or_path)
    is_classifier = "SparsePathViTForImageClassification" in (config.architectures or ())
    model_class = AutoModelForImageClassification if is_classifier else AutoModel
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    model, processor = load_model(arguments.model_name_or_path, arguments.device, dtype, model_class=model_class)
    windows = [int(window) for window in arguments.windows.split(",")]
    ratios = [float(ratio) for ratio in arguments.prune_ratios.split(",")]
    variants = [{"window_size": window, "prune_ratio": ratio} for window in windows for ratio in ratios]
    sizes = [int(size) for size in arguments.sizes.split(",") if size] or [None]
    results: list[tuple[str, Fidelity]] = []
    for path, size in tqdm([(path, size) for path in arguments.images for size in sizes], unit="image"):
        with Image.open(path) as opened:
            image = resized(opened.convert("RGB"), size)
        inputs = prepare(processor, [np.asarray(image)], model.device, mask_background=processor.mask_background)
        try:
            fidelities = compare_to_dense(model, inputs, variants, arguments.max_queries or None)
        except DenseDoesNotFit as error:
            logger.warning("%s: %s", path.name, error)
            continue
        results += [(path.name, fidelity) for fidelity in fidelities]
    if not results:
        raise ValueError("nothing could be compared: dense fits at none of the sizes (see above).")
    write(results, arguments.output_dir)


def resized(image: Image.Image, size: int | None) -> Image.Image:
    """The image with `size` pixels on its longer side."""
    if size is None:
        return image
    scale = size / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)


def write(results: Sequence[tuple[str, Fidelity]], folder: Path) -> None:
    """Tables, figure and log lines."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"image": name, **fidelity.row()} for name, fidelity in results]
    write_table(folder / "fidelity.csv", rows)
    of_layers = [
        {"image": name, "longer_side": max(one.size), "window_size": one.window_size, "prune_ratio": one.prune_ratio}
        | {"layer": layer, "attention_mass": mass}
        for name, one in results
        for layer, mass in enumerate(one.attention_mass, start=1)
    ]
    write_table(folder / "layers.csv", of_layers)
    plot_fidelity([fidelity for _, fidelity in results], folder / "fidelity.png")
    for name, one in results:
        agreement = {None: "", True: "  same class", False: "  OTHER CLASS"}[one.same_prediction]
        logger.info(
            "%-28s %5d px  w = %-4s p = %.1f  CLS %.4f  patches %.4f (5 %%: %.4f)  attention inside %.3f%s",
            *(name, max(one.size), one.window_size, one.prune_ratio, one.cls_cosine, one.patch_cosine),
            *(one.patch_cosine_p5, sum(one.attention_mass) / len(one.attention_mass), agreement),
        )
    logger.info("wrote %s", folder)


if __name__ == "__main__":
    main()
