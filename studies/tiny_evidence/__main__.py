#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Measures what the trained tiny checkpoint is worth, on images it never saw: CSVs and figures of README and card.

  maps      prune maps at several ratios over the CMU-1 region and an osteosarcoma region
  tissue    area under the ROC of the prune score against the tissue mask, and what pruning removes
  fidelity  cosine of sparse to dense features over window and image sizes
  probe     linear probe on osteosarcoma regions, against random weights and a colour histogram

Rows that a CSV already holds are not measured again, so that a stopped run goes on where it was.

Examples:
    python -m studies.tiny_evidence --data-dir ../shared/data
    python -m studies.tiny_evidence --data-dir ../shared/data --parts probe --checkpoint outputs/pretrain_tiny/model
"""

import argparse
import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from sparsepath_vit import SparsePathViTModel, tiny_checkpoint
from sparsepath_vit.model.configuration_sparsepath_vit import PRUNE_SCORES
from sparsepath_vit.runtime.extras import ScriptParser, imports_of_extra, run_script
from sparsepath_vit.runtime.load_model import load_model
from sparsepath_vit.runtime.model_identity import identity_digest, model_identity

with imports_of_extra("train", "matplotlib", "skimage", "sklearn"):
    from sparsepath_vit.comparison.fidelity import compare_to_dense
    from sparsepath_vit.runtime.figures import save_image
    from sparsepath_vit.tasks.bootstrap import bootstrap_interval
    from sparsepath_vit.tasks.classification.metrics import evaluate_predictions

    from ..regions import class_names, osteosarcoma_files, osteosarcoma_regions
    from ..results import ResultsTable
    from . import evidence
    from .figures import plot_fidelity_by_window, plot_probe, prune_maps_figure

logger = logging.getLogger("tiny_evidence")

PARTS = ("maps", "tissue", "fidelity", "probe")
WEIGHTS = ("trained", "random")
UNTRAINED = "untrained"
RATIOS = (0.3, 0.6, 0.8)
CMU1 = Path("rois/cmu1_1568x2912.jpg")
CMU1_MPP = 0.499
OSTEOSARCOMA_MPP = 1.0  # nominal for the 10x objective that the data set states
SMALLEST_CLASS_SHARE = 0.02  # tissue or background below this share of the tokens: no curve worth the name
Row = dict[str, Any]


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the held-out images")
    parser.add_argument("--checkpoint", type=Path, default=tiny_checkpoint())
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="trained, random or both")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--sizes", default="224,448,1022", help="px of the linear probe")
    parser.add_argument("--fidelity-sizes", default="224,448,1120,2240", help="px of the fidelity")
    parser.add_argument("--windows", default="2,4,8,16,64", help="window sizes of the fidelity")
    parser.add_argument(
        "--out",
        "--output-dir",
        dest="output_dir",
        type=Path,
        default=Path("model_card"),
        help="takes results/ and figures/",
    )
    arguments = parser.parse_args()
    run_script(run, arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measures the parts asked for."""
    parts = arguments.parts.split(",")
    for option, known in (("parts", PARTS), ("weights", WEIGHTS)):
        if unknown := sorted(set(getattr(arguments, option).split(",")) - set(known)):
            raise ValueError(f"--{option} {', '.join(unknown)} unknown: choose from {', '.join(known)}.")
    (arguments.output_dir / "results").mkdir(parents=True, exist_ok=True)
    (arguments.output_dir / "figures").mkdir(parents=True, exist_ok=True)
    measure = {"maps": draw_maps, "tissue": measure_tissue, "fidelity": measure_fidelity, "probe": measure_probe}
    for part in parts:
        measure[part](Checkpoint(arguments.checkpoint), arguments)


class Checkpoint:
    """The trained model, its untrained twin, their processor, and the name its results go by."""

    def __init__(self, folder: Path) -> None:
        trained, self.processor = load_model(folder, "cpu", torch.float32)
        self.digest = identity_digest(model_identity(trained, self.processor))[:12]
        self.models = {"trained": trained, "random": evidence.untrained_twin(trained.config)}
        self.patch_size = trained.config.patch_size

    def digest_of(self, features: str) -> str:
        """What identifies the model of a row: random weights and the histogram never change."""
        return self.digest if features == "trained" else UNTRAINED

    @property
    def trained(self) -> SparsePathViTModel:
        """The trained model."""
        return self.models["trained"]


def results_table(
    checkpoint: Checkpoint, arguments: argparse.Namespace, name: str, keys: tuple[str, ...], values: tuple[str, ...]
) -> ResultsTable:
    """A CSV whose rows all belong to this checkpoint."""
    path = arguments.output_dir / "results" / f"{name}.csv"
    results = ResultsTable(path, ("checkpoint", *keys), values)
    digest = checkpoint.digest
    if others := {row["checkpoint"] for row in results.rows} - {digest, UNTRAINED}:
        raise ValueError(
            f"{path} holds rows of another model ({', '.join(sorted(others))}, not {digest}): move it away, or choose "
            "another --output_dir."
        )
    return results


def tissue_images(data_dir: Path) -> Iterator[tuple[Path, float]]:
    """The held-out images whose tissue is looked for, with their micrometres per pixel."""
    yield data_dir / CMU1, CMU1_MPP
    for path in osteosarcoma_files(data_dir):
        yield path, OSTEOSARCOMA_MPP


def draw_maps(checkpoint: Checkpoint, arguments: argparse.Namespace) -> None:
    """(a) What is removed at each ratio."""
    regions = {"cmu1": (arguments.data_dir / CMU1, CMU1_MPP)}
    regions["osteosarcoma"] = (most_mixed_region(checkpoint, arguments.data_dir), OSTEOSARCOMA_MPP)
    for name, (path, mpp) in regions.items():
        pixels, mask = evidence.region_and_tissue(path, mpp, checkpoint.patch_size)
        kept = {}
        for ratio in RATIOS:
            outputs = evidence.run_model(checkpoint.trained, checkpoint.processor, pixels, prune_ratio=ratio)
            kept[ratio] = np.zeros(mask.shape, dtype=bool)
            kept[ratio][tuple(outputs.patch_positions[0].T.numpy())] = True
            scores = outputs.prune_scores[0].numpy().reshape(mask.shape)
        target = arguments.output_dir / "figures" / f"tiny_prune_maps_{name}.png"
        save_image(prune_maps_figure(Image.fromarray(pixels), scores, kept), target)
        logger.info("wrote %s (%s)", target, path.name)


def most_mixed_region(checkpoint: Checkpoint, data_dir: Path) -> Path:
    """The osteosarcoma region with the most even parts of tissue and background: there is something to prune."""
    files = osteosarcoma_files(data_dir)
    shares = [evidence.region_and_tissue(path, OSTEOSARCOMA_MPP, checkpoint.patch_size)[1].mean() for path in files]
    return files[int(np.abs(np.array(shares) - 0.5).argmin())]


def measure_tissue(checkpoint: Checkpoint, arguments: argparse.Namespace) -> None:
    """(b) Prune score against tissue mask."""
    values = ("tokens", "background_share", "auroc", *(f"removed_background_{100 * ratio:.0f}" for ratio in RATIOS))
    results = results_table(checkpoint, arguments, "tiny_tissue", ("image", "weights", "prune_score"), values)
    models = {weights: evidence.until_pruning(model) for weights, model in checkpoint.models.items()}
    for path, mpp in tqdm(list(tissue_images(arguments.data_dir)), desc="tissue", unit="image"):
        pixels, mask = evidence.region_and_tissue(path, mpp, checkpoint.patch_size)
        if not SMALLEST_CLASS_SHARE <= mask.mean() <= 1 - SMALLEST_CLASS_SHARE:
            continue
        is_tissue = mask.ravel()
        for weights, kind in itertools.product(arguments.weights.split(","), PRUNE_SCORES):
            key = {
                "checkpoint": checkpoint.digest_of(weights),
                "image": path.name,
                "weights": weights,
                "prune_score": kind,
            }
            if results.has(key):
                continue
            settings = {"prune_ratio": max(RATIOS), "prune_score": kind}
            outputs = evidence.run_model(models[weights], checkpoint.processor, pixels, **settings)
            scores = outputs.prune_scores[0].numpy()
            row: Row = key | {"tokens": mask.size, "background_share": float((~is_tissue).mean())}
            row |= {"auroc": evidence.area_under_roc(scores, is_tissue)}
            for ratio in RATIOS:
                removed = evidence.removed_background_share(scores, is_tissue, ratio)
                row[f"removed_background_{100 * ratio:.0f}"] = removed
            results.add(row)
    summarise_tissue(results.rows)


def summarise_tissue(rows: list[Row]) -> None:
    """Logs mean and 95 % interval over the images."""
    for weights, kind in sorted({(row["weights"], row["prune_score"]) for row in rows}):
        of_kind = [row for row in rows if (row["weights"], row["prune_score"]) == (weights, kind)]
        values = np.array([float(row["auroc"]) for row in of_kind])
        _, low, high = bootstrap_interval(lambda drawn, values=values: values[drawn].mean(), len(values))
        logger.info(
            "%s %s: AUROC %.3f (%.3f to %.3f, %d images; smallest %.3f)",
            *(weights, kind, values.mean(), low, high, len(values), values.min()),
        )


def central_square(path: Path) -> Image.Image:
    """The largest square around the image's centre."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def measure_fidelity(checkpoint: Checkpoint, arguments: argparse.Namespace) -> None:
    """(c) Sparse against dense features, on a square of each image resized to every size."""
    keys, values = ("image", "size", "window_size"), ("tokens", "cls_cosine", "patch_cosine", "patch_cosine_p5")
    results = results_table(checkpoint, arguments, "tiny_fidelity", keys, values)
    windows = [int(window) for window in arguments.windows.split(",")]
    sizes = [int(size) for size in arguments.fidelity_sizes.split(",")]
    paths = [arguments.data_dir / CMU1, most_mixed_region(checkpoint, arguments.data_dir)]
    for size, path in tqdm([(size, path) for size in sizes for path in paths], desc="fidelity", unit="image"):
        image_key = {"checkpoint": checkpoint.digest_of("trained"), "image": path.name, "size": size}
        rows = [image_key | {"window_size": window} for window in windows]
        missing = [row for row in rows if not results.has(row)]
        if not missing:
            continue
        image = central_square(path).resize((size, size), Image.Resampling.BICUBIC)
        inputs = checkpoint.processor(image, return_tensors="pt")
        variants = [{"window_size": row["window_size"], "prune_ratio": 0.0} for row in missing]
        _, *fidelities = compare_to_dense(checkpoint.trained, inputs, variants)
        for row, fidelity in zip(missing, fidelities, strict=True):
            results.add(row | {name: fidelity.row()[name] for name in values})
    plot_fidelity_by_window(results.rows, arguments.output_dir / "figures" / "tiny_fidelity.png")


def measure_probe(checkpoint: Checkpoint, arguments: argparse.Namespace) -> None:
    """(d) Linear probe on regions of source blocks it has not seen, features of CLS tokens."""
    files, labels, blocks = osteosarcoma_regions(arguments.data_dir)
    names = class_names(files)
    intervals = tuple(f"balanced_accuracy{end}" for end in ("", "_low", "_high"))
    keys, values = ("features", "variant", "size"), ("regions", "blocks", *intervals, "predictions")
    results = results_table(checkpoint, arguments, "tiny_probe", keys, values)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    runs = [("colour histogram", "", size) for size in sizes]
    chosen = arguments.weights.split(",")
    variants = list(reversed(evidence.VARIANTS))  # dense, the slowest, comes last
    runs += [(weights, variant, size) for size in sizes for variant in variants for weights in chosen]
    for name, variant, size in tqdm(runs, desc="probe", unit="run"):
        key = {"checkpoint": checkpoint.digest_of(name), "features": name, "variant": variant, "size": size}
        if results.has(key):
            continue
        features = evidence.features_of(files, size, embedder(checkpoint, name, variant))
        predictions = evidence.probe_predictions(features, labels, blocks)
        metrics = evaluate_predictions(labels, predictions, names, blocks)
        row: Row = key | {"regions": len(files), "blocks": len(set(blocks))}
        row |= {interval: metrics[interval] for interval in intervals}
        results.add(row | {"predictions": "".join(map(str, predictions))})
    plot_probe(results.rows, arguments.output_dir / "figures" / "tiny_probe.png")
    summarise_probe(results.rows, labels, np.array(blocks))


def summarise_probe(rows: list[Row], labels: np.ndarray, blocks: np.ndarray) -> None:
    """Logs how far the trained weights are ahead of the random ones: resampled together, by source block."""
    predictions = {
        (row["features"], row["variant"], row["size"]): np.array(list(map(int, row["predictions"]))) for row in rows
    }
    of_block = [np.flatnonzero(blocks == block) for block in np.unique(blocks)]
    runs = [(variant, size) for weights, variant, size in predictions if weights == "trained"]
    runs = [run for run in runs if ("random", *run) in predictions]
    if not runs:
        return

    def advantages(items: np.ndarray) -> np.ndarray:
        """Difference in balanced accuracy of each run."""
        return np.array(
            [
                evidence.balanced_accuracy(labels[items], predictions["trained", *run][items])
                - evidence.balanced_accuracy(labels[items], predictions["random", *run][items])
                for run in runs
            ]
        )

    measured = advantages(np.arange(len(labels)))
    _, low, high = bootstrap_interval(
        lambda drawn: with_mean(advantages(np.concatenate([of_block[block] for block in drawn]))),
        len(of_block),
    )
    for run, *numbers in zip([*runs, ("all", "runs")], with_mean(measured), low, high, strict=True):
        logger.info("trained - random, %s %s: %+.3f (%+.3f to %+.3f)", *run, *numbers)


def with_mean(values: np.ndarray) -> np.ndarray:
    """The values and, last, their mean."""
    return np.append(values, values.mean())


def embedder(checkpoint: Checkpoint, name: str, variant: str) -> Callable[[Image.Image], np.ndarray]:
    """What turns an image into features: a model in one variant, or the colour histogram."""
    if name not in checkpoint.models:
        return evidence.color_histogram

    def embed(image: Image.Image) -> np.ndarray:
        outputs = evidence.run_model(checkpoint.models[name], checkpoint.processor, image, **evidence.VARIANTS[variant])
        return outputs.pooler_output[0].numpy()

    return embed


if __name__ == "__main__":
    main()
