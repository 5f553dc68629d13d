#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""Is one forward of a region worth more than averaging its 224 px tiles, which is what is done today?

  regions   a linear probe of osteosarcoma regions against size: dense, block-local, pruned, stratified, averaged tiles
            of the same pixels, random weights, a colour histogram
  tokens    a linear probe of labelled patch tokens, of all and of those near the border of two tiles
  positions the regions again, where positions are not stretched over the region but repeat in each window as large as
            the images of the model's training, as they are or mirrored
  finetuning low-rank adapters trained through whole regions, and through their averaged tiles

Frozen features of real pretrained weights (`python -m studies.real_weights`), folds by block of tissue or by image, the
penalty chosen inside the training folds, several divisions into folds, and paired differences to tiles and to dense
with 95 % intervals over blocks or images. Writes OUT/against_tiles_PART.csv.

Examples:
    python -m studies.against_tiles --data-dir ../shared/data --out model_card/results
    python -m studies.against_tiles --data-dir ../shared/data --parts tokens --seeds 1 --out outputs/against_tiles
    python -m studies.against_tiles --data-dir ../shared/data --parts finetuning --sizes 672 --out outputs/against_tiles
"""

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel
from sparsepath_vit.runtime.extras import ScriptParser, imports_of_extra, run_script
from sparsepath_vit.runtime.load_model import load_model
from sparsepath_vit.runtime.measure import describe_run

from ..real_weights.cache import chosen_checkpoint
from ..regions import osteosarcoma_regions
from ..results import ResultsTable, write_table

with imports_of_extra("train", "sklearn"):
    from ..tiny_evidence.evidence import color_histogram, untrained_twin
    from .datasets import TOKEN_DATASETS, TokenImage, resized
    from .features import (
        DENSE,
        PATTERNS,
        POSITION_PATTERNS,
        POSITIONS,
        TILES,
        TOKEN_PATTERNS,
        Encoder,
        region_features,
        token_features,
        tokens_to_border,
        with_positions,
    )
    from .finetuning import VARIANTS, Regions, Training, fine_tuned
    from .probes import Probe, cross_validated, difference_with_interval, score_with_interval

logger = logging.getLogger("against_tiles")

PARTS = ("regions", "tokens", "positions", "finetuning")
PREDICTION_KEYS, PREDICTION_VALUES = ("size", "variant", "settings", "region"), ("fold", "epochs", "probabilities")
RANDOM_WEIGHTS, HISTOGRAM = "random weights, w = 8", "colour histogram"
NEAR_BORDER = 2  # tokens between a token and the border, at most, that still count as near


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="with classification/ and segmentation/")
    parser.add_argument("--model-name-or-path", help="converted checkpoint; that of studies.real_weights by default")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--sizes", default="224,448,672,1022", help="pixels of a region's side")
    parser.add_argument("--seeds", type=int, default=5, help="divisions into folds")
    parser.add_argument("--epochs", type=int, default=Training.most_epochs, help="of fine-tuning, at most")
    parser.add_argument("--out", type=Path, default=Path("outputs/against_tiles"), help="folder of the CSVs")
    run_script(run, parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Answers the questions asked for."""
    parts = arguments.parts.split(",")
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"--parts {', '.join(unknown)} unknown: choose from {', '.join(PARTS)}.")
    source = chosen_checkpoint(arguments.model_name_or_path)
    encoder = Encoder(*load_model(source, "cpu", "float32", model_class=SparsePathViTModel))
    described = {"model": Path(source).name, **describe_run("cpu")}
    for part, rows_of in zip(PARTS, (region_rows, token_rows, position_rows, finetuning_rows), strict=True):
        if part in parts:
            arguments.out.mkdir(parents=True, exist_ok=True)
            rows: list[dict[str, Any]] = []
            for row in rows_of(encoder, arguments):
                rows.append({**row, **described})
                write_table(arguments.out / f"against_tiles_{part}.csv", rows)  # what is there is kept


def region_rows(encoder: Encoder, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each size and variant."""
    files, labels, blocks = osteosarcoma_regions(arguments.data_dir)
    untrained = Encoder(untrained_twin(encoder.model.config), encoder.processor)
    for size in map(int, arguments.sizes.split(",")):
        features: dict[str, list[np.ndarray]] = {}
        for path in tqdm(files, desc=f"{size} px", unit="region", disable=None):
            image = resized(path, size)
            for name in (TILES, *PATTERNS):
                features.setdefault(name, []).append(region_features(encoder, image, name))
            features.setdefault(RANDOM_WEIGHTS, []).append(region_features(untrained, image, "w = 8"))
            features.setdefault(HISTOGRAM, []).append(color_histogram(Image.fromarray(image)))
        yield from _rows(_probes(features, labels, blocks, arguments.seeds), {"size": size})


def position_rows(encoder: Encoder, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each size that is larger than the pretraining window, pattern and kind of positions."""
    files, labels, blocks = osteosarcoma_regions(arguments.data_dir)
    for size in map(int, arguments.sizes.split(",")):
        if size <= encoder.model.config.image_size:
            logger.info("%s px is no larger than the images of the model's training: nothing repeats", size)
            continue
        encoders = {kind: with_positions(encoder, kind, size) for kind in POSITIONS}
        features: dict[str, list[np.ndarray]] = {}
        for path in tqdm(files, desc=f"positions, {size} px", unit="region", disable=None):
            image = resized(path, size)
            features.setdefault(TILES, []).append(region_features(encoder, image, TILES))
            for name in POSITION_PATTERNS:
                for kind, with_kind in encoders.items():
                    title = name if kind == POSITIONS[0] else f"{name}, {kind} positions"
                    features.setdefault(title, []).append(region_features(with_kind, image, name))
        yield from _rows(_probes(features, labels, blocks, arguments.seeds), {"size": size})


def finetuning_rows(encoder: Encoder, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each size and variant: the frozen probe on the same folds, and after training."""
    files, labels, blocks = osteosarcoma_regions(arguments.data_dir)
    training = Training(most_epochs=arguments.epochs)
    table = ResultsTable(arguments.out / "against_tiles_finetuning_predictions.csv", PREDICTION_KEYS, PREDICTION_VALUES)
    _, groups = np.unique(blocks, return_inverse=True)
    for size in map(int, arguments.sizes.split(",")):
        images = [resized(path, size) for path in files]
        probes = {}
        for name in VARIANTS:
            frozen = np.stack(
                [region_features(encoder, image, name) for image in tqdm(images, desc=name, disable=None)]
            )
            regions = Regions(images, frozen, labels, groups, int(labels.max()) + 1)
            key = {"size": size, "variant": name, "settings": " ".join(map(str, astuple(training)))}
            probes[f"{name}, frozen"] = cross_validated(frozen, labels, blocks, training.num_folds, num_seeds=1)
            probes[name] = _fine_tuned_probe(encoder, regions, [path.name for path in files], key, training, table)
            of_variant = {"size": size, "epochs": training.most_epochs, "rank": training.rank}
            yield from _rows(probes, of_variant, names=(f"{name}, frozen", name))


def _fine_tuned_probe(
    encoder: Encoder,
    regions: Regions,
    names: Sequence[str],
    key: Mapping[str, object],
    training: Training,
    table: ResultsTable,
) -> Probe:
    """What networks trained on all folds but one say of the others; folds that are in the table are done."""
    probabilities = np.full((1, len(names), regions.num_classes), np.nan)
    for fold, (train, held_out) in enumerate(regions.folds(training.num_folds, training.seed)):
        if not all(table.has({**key, "region": names[index]}) for index in held_out):
            table.drop(**key, fold=fold)
            said, epochs = fine_tuned(encoder, train, regions.part(held_out), str(key["variant"]), training)
            for index, of_region in zip(held_out, said, strict=True):
                text = " ".join(f"{value:.6g}" for value in of_region)
                table.add({**key, "region": names[index], "fold": fold, "epochs": epochs, "probabilities": text})
        for index in held_out:
            row = table.find({**key, "region": names[index]})
            probabilities[0, index] = [float(value) for value in row["probabilities"].split()]
    return Probe(probabilities, regions.labels, regions.groups)


def _probes(
    features: dict[str, list[np.ndarray]], labels: np.ndarray, blocks: list[str], num_seeds: int
) -> dict[str, Probe]:
    """A probe of the regions for each variant."""
    return {
        name: cross_validated(np.stack(of_name), labels, blocks, num_seeds=num_seeds)
        for name, of_name in tqdm(features.items(), desc="probes", disable=None)
    }


def token_rows(encoder: Encoder, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each data set, variant and scope."""
    patch_size = encoder.model.config.patch_size
    for dataset, read in TOKEN_DATASETS.items():
        images = list(read(arguments.data_dir, patch_size))
        if not images:
            raise ValueError(f"--data-dir {arguments.data_dir} holds no image of {dataset}.")
        labels = np.concatenate([image.labels for image in images])
        groups = np.repeat(np.arange(len(images)), [len(image.labels) for image in images])
        to_border = np.concatenate([_to_border(image, patch_size) for image in images])
        probes = {}
        for name in tqdm((TILES, *TOKEN_PATTERNS), desc=dataset, disable=None):
            features = np.concatenate(
                [token_features(encoder, image.image, name)[image.rows, image.columns] for image in images]
            )
            probes[name] = cross_validated(features, labels, groups, num_folds=len(images), num_seeds=1)
        scopes = {"all tokens": None, "near a border": np.flatnonzero(to_border <= NEAR_BORDER)}
        scopes["away from it"] = np.flatnonzero(to_border > NEAR_BORDER)
        for scope, items in scopes.items():
            if items is not None and not len(items):
                logger.info("%s: no labelled token lies %s", dataset, scope)
                continue
            yield from _rows(probes, {"dataset": dataset, "scope": scope}, items)


def _to_border(image: TokenImage, patch_size: int) -> np.ndarray:
    shape = tuple(-(-side // patch_size) for side in image.image.shape[:2])
    return tokens_to_border(shape, patch_size)[image.rows, image.columns]


def _rows(
    probes: dict[str, Probe],
    key: dict[str, object],
    items: np.ndarray | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """What each probe, or each named one, scores; its paired differences to tiles, to dense and to itself frozen."""
    for name in names or probes:
        probe = probes[name]
        row = {**key, "variant": name, **score_with_interval(probe, items)}
        others = {"tiles": TILES, "dense": DENSE, "frozen": f"{name.removesuffix(', frozen')}, frozen"}
        for short, other in others.items():
            if other not in probes:
                continue
            difference = difference_with_interval(probe, probes[other], items)
            row |= {f"{metric}_minus_{short}": value for metric, value in difference.items()}
        count = len(probe.labels) if items is None else len(items)
        row |= {"items": count, "groups": len(np.unique(probe.groups)), "seeds": len(probe.probabilities)}
        logger.info(
            "%s %-24s balanced accuracy %.3f (%.3f to %.3f), against tiles %+.3f (%+.3f to %+.3f)",
            " ".join(map(str, key.values())),
            *(name, row["balanced_accuracy"], row["balanced_accuracy_low"], row["balanced_accuracy_high"]),
            *(row[f"balanced_accuracy{ending}_minus_tiles"] for ending in ("", "_low", "_high")),
        )
        yield row


if __name__ == "__main__":
    main()
