#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""Measures which draw of context tokens and representatives comes nearest to dense, on real weights and tissue.

Central squares of three slides and of nine osteosarcoma regions, resized to each size. Parts, each a table that grows
row by row and goes on where it was stopped:

    draws     OUT/stratified_draws.csv: all rules at 700 px, w = 8
    pruning   OUT/stratified_pruning.csv: 60 % pruned, with and without representatives, at 700 px
    layers    OUT/stratified_layers.csv: where the error comes from, layer by layer, at 700 px
    definition OUT/stratified_definition.csv: what was chosen between for the library, at 700 and 1022 px

`--summary` only prints the means of what is there. At 700 px a run takes about 3 s on one core, at 1022 px 6 s.

Examples:
    python -m studies.real_weights
    python -m studies.stratified_draw --data-dir ../shared/data --out model_card/results
"""

import argparse
import logging
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel
from sparsepath_vit.runtime.extras import ScriptParser, run_script
from sparsepath_vit.runtime.load_model import load_model
from sparsepath_vit.runtime.pixels import prepare

from ..real_weights.cache import chosen_checkpoint
from ..regions import spread_order, square, twelve_regions
from ..results import ResultsTable
from .draws import DrawRule
from .forward import Features, Settings, run
from .layers import layer_errors
from .measure import distance_to_dense, estimated_cls_error

logger = logging.getLogger("stratified_draw")

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
    "exact and one mean query, anew": DrawRule(exact=EXACT, references=1, layers="anew"),
    "half as many exact and one mean query, anew": DrawRule(exact=EXACT // 2, references=1, layers="anew"),
    "as the library": DrawRule(exact=EXACT - 1, references=1, layers="anew", mass_of="with mean query", nests=False),
    "one mean query": DrawRule(references=1),
    "mass of the layer before exact": DrawRule(exact=EXACT, mass_of="previous"),
    "half by mass": DrawRule(importance=0.5),
    "fixed place": DrawRule(place="fixed"),
    "paired places": DrawRule(place="paired"),
    "finer where busy": DrawRule(busy=True),
    "wide cells": DrawRule(wide=True),
    "mean values": DrawRule(mean_values=True),
}
BEST = ("random", "exact and mean queries")
CANDIDATES = (
    *("exact and mean queries", "exact and mean queries, anew", "exact and one mean query, anew"),
    *("half as many exact and one mean query, anew", "as the library"),
)
ON_ALL_IMAGES = (*BEST, "anew in each layer", "exact and mean queries, anew")
KEYS = ("image", "size", "rule", "num_samples", "prune_ratio", "representatives", "seed")
VALUES = ("keys", "cls_cosine", "patch_cosine", "patch_cosine_p5", "estimated_cls_error")


LAYER_RULES = ("random", "mean queries", "exact and mean queries", "mean values")
LAYER_KEYS = ("image", "size", "layer", "rule")
LAYER_VALUES = ("error", "common_error", "largest_share", "largest_norm")


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


def passes_of(part: str) -> list[tuple[tuple[int, ...], tuple[int, ...], list[Job]]]:
    """What is measured in which order: indices of images, sizes, and the rows of each.

    What matters most comes first, so that a run that is stopped has it for all images.
    """
    every = tuple(range(12))
    if part == "pruning":
        jobs = [Job("dense", 0, 0.6), Job("dense", 1024, 0.6, True), Job("paper", 0, 0.6)]
        return [(every, (700,), jobs + [Job(name, 1024, 0.6, True) for name in BEST])]
    if part == "definition":
        jobs = [Job("paper"), *(Job(name, 1024) for name in CANDIDATES)]
        return [(SCREENED, (700, 1022), jobs)]
    screened = [Job(name, 1024) for name in RULES if name not in (*ON_ALL_IMAGES, *CANDIDATES)]
    screened += [Job(name, 256) for name in BEST]
    return [
        (every, (700,), [Job(name, 1024) for name in BEST]),
        (every, (700,), [Job("paper"), *(Job(name, 1024) for name in ON_ALL_IMAGES[2:])]),
        (SCREENED, (700,), screened),
        # A second draw, for the error that can be estimated without the dense model.
        (SCREENED, (700,), [Job(name, 1024, seed=seed) for name in BEST for seed in (0, 1)]),
    ]


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--model-name-or-path", help="converted checkpoint; that of studies.real_weights by default")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with rois/ and classification/")
    parser.add_argument("--parts", default="draws,pruning,layers,definition")
    parser.add_argument("--images", type=int, default=12, help="so many of the twelve, evenly spread")
    parser.add_argument("--summary", action="store_true", help="measure nothing, print what is there")
    parser.add_argument("--out", "--output-dir", dest="output_dir", type=Path, required=True)
    run_script(measure, parser.parse_args())


def measure(arguments: argparse.Namespace) -> None:
    """Measures the rows that are missing."""
    for part in arguments.parts.split(","):
        if part == "layers":
            table = ResultsTable(arguments.output_dir / "stratified_layers.csv", LAYER_KEYS, LAYER_VALUES)
            if not arguments.summary:
                fill_layers(table, arguments)
            continue
        table = ResultsTable(arguments.output_dir / f"stratified_{part}.csv", KEYS, VALUES)
        if not arguments.summary:
            fill(table, part, arguments)
        summarise(table)


def fill_layers(table: ResultsTable, arguments: argparse.Namespace) -> None:
    """All images, layer by layer."""
    model, processor = load(arguments)
    paths = list(twelve_regions(arguments.data_dir))
    for index in tqdm(spread_order(len(paths))[: arguments.images], desc="layers", unit="image"):
        place = {"image": paths[index].name, "size": 700}
        if table.has(place | {"layer": model.config.num_hidden_layers, "rule": LAYER_RULES[-1]}):
            continue
        pixel_values = prepare(processor, [square(paths[index], 700)])["pixel_values"]
        rules = {name: RULES[name] for name in LAYER_RULES}
        for row in layer_errors(model, pixel_values, rules, 256):
            if not table.has(place | row):
                table.add(place | row)


def load(arguments: argparse.Namespace) -> tuple[SparsePathViTModel, Any]:
    """The model, ready for the prototype, and its image processor."""
    checkpoint = chosen_checkpoint(arguments.model_name_or_path)
    model, processor = load_model(checkpoint, "cpu", torch.float32, model_class=SparsePathViTModel)
    model.config.window_size = None  # the prototype has its own pattern
    return model, processor


def fill(table: ResultsTable, part: str, arguments: argparse.Namespace) -> None:
    """All images of a part."""
    model, processor = load(arguments)
    paths = list(twelve_regions(arguments.data_dir))
    order = spread_order(len(paths))[: arguments.images]
    steps = [
        (paths[index], size, jobs)
        for indices, sizes, jobs in passes_of(part)
        for size in sizes
        for index in order
        if index in indices
    ]
    for path, size, jobs in tqdm(steps, desc=part, unit="image"):
        place = {"image": path.name, "size": size}
        missing = [job for job in jobs if not table.has(place | job._asdict())]
        if any(job.seed for job in missing):
            missing = [job for job in jobs if job.rule in {one.rule for one in missing}]  # both draws are compared
        if missing:
            pixel_values = prepare(processor, [square(path, size)])["pixel_values"]
            measure_image(model, pixel_values, missing, table, place)


def measure_image(
    model: SparsePathViTModel, pixel_values: torch.Tensor, jobs: list[Job], table: ResultsTable, place: dict
) -> None:
    """The rows of one image; dense runs once."""
    dense = run(model, pixel_values, Settings(window=None))
    first_draws: dict[tuple[str, int], Features] = {}
    for job in tqdm(jobs, desc=place["image"], unit="run", leave=False):
        features = run(model, pixel_values, job.settings())
        row = place | job._asdict() | {"keys": features.keys} | distance_to_dense(features, dense)
        drawn_by = (job.rule, job.num_samples)
        if not job.seed:
            first_draws = {drawn_by: features}  # the second draw comes right after
        elif drawn_by in first_draws:
            row["estimated_cls_error"] = estimated_cls_error(first_draws[drawn_by], features)
        if not table.has(row):
            table.add(row)


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
        ratios = [float(row["estimated_cls_error"]) / max(mean_error(table, row), 1e-12) for row in pairs]
        logger.info("%s: estimated over true error of CLS %.2f to %.2f", rule, min(ratios), max(ratios))


def mean_error(table: ResultsTable, row: dict[str, str]) -> float:
    """The true 1 - cosine of CLS, the mean of a row's draw and the first one."""
    first = table.find(row | {"seed": 0})
    return 1 - (float(row["cls_cosine"]) + float(first["cls_cosine"])) / 2


if __name__ == "__main__":
    main()
