#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""Measures which draw of context tokens and representatives comes nearest to dense, on real weights and tissue.

Central squares of three slides and of nine osteosarcoma regions, resized to each size. Parts, each a table that grows
row by row and goes on where it was stopped:

    draws     OUT/stratified_draws.csv: all rules at 700 px, w = 8
    pruning   OUT/stratified_pruning.csv: 60 % pruned, with and without representatives, at 700 px
    sizes     OUT/stratified_sizes.csv: the best rules at 1022 and 1400 px

`--summary` only prints the means of what is there. At 700 px a run takes about 3 s on one core, at 1400 px 20 s.

Examples:
    python -m studies.real_weights
    python -m studies.stratified_draw --data-dir ../shared/data --out model_card/results
"""

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel
from sparsepath_vit.runtime.extras import ScriptParser, run_script
from sparsepath_vit.runtime.load_model import load_model
from sparsepath_vit.runtime.pixels import prepare

from ..real_weights.cache import cache_folder, cached_checkpoint
from ..results import ResultsTable
from .draws import DrawRule
from .forward import Features, Settings, run
from .measure import distance_to_dense, estimated_cls_error

logger = logging.getLogger("stratified_draw")

SLIDES = ("OS-1_1101x1101.png", "cmu1_1568x2912.jpg", "tcga_cr7395_2016x3360.jpg")
CLASSES = ("non_tumor", "non_viable_tumor", "viable_tumor")
REGIONS_OF_A_CLASS = 3
SCREENED = (0, 3, 6, 9)  # the images on which rules are tried that the first results spoke against
EXACT = 64
REFERENCES = 64
RULES = {
    "random": DrawRule(),
    "exact and mean queries": DrawRule(exact=EXACT, references=REFERENCES),
    "exact and one mean query": DrawRule(exact=EXACT, references=1),
    "mean queries": DrawRule(references=REFERENCES),
    "anew in each layer": DrawRule(layers="anew"),
    "largest mass exact": DrawRule(exact=EXACT),
    "exact and mean queries, anew": DrawRule(exact=EXACT, references=REFERENCES, layers="anew"),
    "one mean query": DrawRule(references=1),
    "mass of the layer before exact": DrawRule(exact=EXACT, mass_of="previous"),
    "half by mass": DrawRule(importance=0.5),
    "fixed place": DrawRule(place="fixed"),
    "paired places": DrawRule(place="paired"),
    "finer where busy": DrawRule(busy=True),
    "mean values": DrawRule(mean_values=True),
}
ON_ALL_IMAGES = ("paper", "random", "anew in each layer", "mean queries", "exact and mean queries")
WITH_FEW_SAMPLES = ("random", "exact and mean queries")
KEYS = ("image", "size", "rule", "num_samples", "prune_ratio", "representatives", "seed")
VALUES = ("keys", "cls_cosine", "patch_cosine", "patch_cosine_p5", "estimated_cls_error")


class Job(NamedTuple):
    """One row to measure: the rule by name ("paper" has none), and what else is set."""

    rule: str
    num_samples: int = 0
    prune_ratio: float = 0.0
    representatives: bool = False
    seed: int = 0

    def settings(self) -> Settings:
        """What the forward takes."""
        return Settings(
            rule=RULES.get(self.rule),
            num_samples=self.num_samples,
            window=None if self.rule == "dense" else 8,
            prune_ratio=self.prune_ratio,
            has_representatives=self.representatives,
            seed=self.seed,
        )


def jobs_of(part: str, index: int) -> list[Job]:
    """The rows of one image, by its index."""
    if part == "draws":
        names = [name for name in ("paper", *RULES) if name in ON_ALL_IMAGES or index in SCREENED]
        jobs = [Job(name, 1024 if name in RULES else 0) for name in names]
        jobs += [Job(name, 256) for name in WITH_FEW_SAMPLES]
        # A second draw, for the error that can be estimated without the dense model.
        return jobs + [Job(name, 1024, seed=1) for name in ("random", "exact and mean queries")]
    if part == "pruning":
        jobs = [Job("dense", 0, 0.6), Job("dense", 1024, 0.6, True), Job("paper", 0, 0.6)]
        return jobs + [Job(name, 1024, 0.6, True) for name in ("random", "exact and mean queries")]
    return [Job("paper")] + [Job(name, 1024) for name in ("random", "exact and mean queries")]


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--model-name-or-path", help="converted checkpoint; that of studies.real_weights by default")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with rois/ and classification/")
    parser.add_argument("--parts", default="draws,pruning,sizes")
    parser.add_argument("--images", type=int, default=12, help="so many of the twelve, evenly spread")
    parser.add_argument("--summary", action="store_true", help="measure nothing, print what is there")
    parser.add_argument("--out", "--output-dir", dest="output_dir", type=Path, required=True)
    run_script(measure, parser.parse_args())


def measure(arguments: argparse.Namespace) -> None:
    """Measures the rows that are missing."""
    for part in arguments.parts.split(","):
        table = ResultsTable(arguments.output_dir / f"stratified_{part}.csv", KEYS, VALUES)
        if not arguments.summary:
            fill(table, part, arguments)
        summarise(table)


def fill(table: ResultsTable, part: str, arguments: argparse.Namespace) -> None:
    """All images of a part."""
    checkpoint = arguments.model_name_or_path or cached_checkpoint()
    if checkpoint is None:
        raise ValueError(f"no weights in {cache_folder()}: run `python -m studies.real_weights`, or name a checkpoint.")
    model, processor = load_model(checkpoint, "cpu", torch.float32, model_class=SparsePathViTModel)
    model.config.window_size = None  # the prototype has its own pattern
    paths = list(enumerate(image_paths(arguments.data_dir)))
    order = np.argsort([index % 3 for index, _ in paths], kind="stable")[: arguments.images]
    sizes = (1022, 1400) if part == "sizes" else (700,)
    for (index, path), size in tqdm([(paths[i], size) for size in sizes for i in order], desc=part, unit="image"):
        missing = [
            job for job in jobs_of(part, index) if not table.has({"image": path.name, "size": size, **job._asdict()})
        ]
        if missing:
            pixel_values = prepare(processor, [square(path, size)])["pixel_values"]
            measure_image(model, pixel_values, missing, table, {"image": path.name, "size": size})


def measure_image(
    model: SparsePathViTModel, pixel_values: torch.Tensor, jobs: list[Job], table: ResultsTable, place: dict
) -> None:
    """The rows of one image; dense runs once."""
    dense = run(model, pixel_values, Settings(window=None))
    first_draws: dict[str, Features] = {}
    for job in tqdm(jobs, desc=place["image"], unit="run", leave=False):
        features = run(model, pixel_values, job.settings())
        row = place | job._asdict() | {"keys": features.keys} | distance_to_dense(features, dense)
        if job.seed == 0 and job.num_samples == 1024:
            first_draws[job.rule] = features
        elif job.rule in first_draws and job.seed:
            row["estimated_cls_error"] = estimated_cls_error(first_draws[job.rule], features)
        table.add(row)


def image_paths(folder: Path) -> Iterator[Path]:
    """Three slides' regions and nine of osteosarcoma."""
    yield from (folder / "rois" / name for name in SLIDES)
    for label in CLASSES:
        files = sorted((folder / "classification" / "osteosarcoma_roi" / label).glob("*.jpg"))
        if len(files) < REGIONS_OF_A_CLASS:
            raise ValueError(f"expected {REGIONS_OF_A_CLASS} regions of {label}, found {len(files)} in {folder}.")
        yield from files[:REGIONS_OF_A_CLASS]


def square(path: Path, size: int) -> np.ndarray:
    """(size, size, 3) uint8, the largest square around the centre, resized."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def summarise(table: ResultsTable) -> None:
    """Logs mean and worst over images and draws."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in table.rows:
        groups.setdefault(tuple(row[name] for name in KEYS[1:-1]), []).append(row)
    for (size, rule, samples, ratio, representatives), rows in groups.items():
        cls, patches, p5, keys = (
            np.array([float(row[name]) for row in rows])
            for name in ("cls_cosine", "patch_cosine", "patch_cosine_p5", "keys")
        )
        logger.info(
            "%5s px  %-32s %5s  pruned %-4s %-5s keys %5.0f  CLS %.4f (worst %.4f)  patches %.3f (worst %.3f, 5 %%: "
            "%.3f)  %d runs",
            *(size, rule, samples, ratio, representatives, keys.mean(), cls.mean(), cls.min()),
            *(patches.mean(), patches.min(), p5.mean(), len(rows)),
        )
    estimated = [row for row in table.rows if row["estimated_cls_error"]]
    for rule in dict.fromkeys(row["rule"] for row in estimated):
        pairs = [row for row in estimated if row["rule"] == rule]
        ratios = [float(row["estimated_cls_error"]) / mean_error(table, row) for row in pairs]
        logger.info("%s: estimated over true error of CLS %.2f to %.2f", rule, min(ratios), max(ratios))


def mean_error(table: ResultsTable, row: dict[str, str]) -> float:
    """The true 1 - cosine of CLS, the mean of a row's draw and the first one."""
    first = table.find(row | {"seed": 0})
    return 1 - (float(row["cls_cosine"]) + float(first["cls_cosine"])) / 2


if __name__ == "__main__":
    main()
