# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""ROI data sets on disk: a `datasets` folder with one split each, the same list as CSV, and where the slides lie."""

import csv
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from tqdm import tqdm

from ...runtime.atomic_files import write_atomically
from .image_folder import read_image_folder
from .rois import Problem, Roi, RoiDataset

logger = logging.getLogger(__name__)

DATASET_FOLDER = "dataset"
DESCRIPTION_FILE = "description.json"
ROI_LIST = "rois.csv"
PROBLEM_LIST = "problems.csv"


def save_roi_dataset(dataset: RoiDataset, folder: str | os.PathLike[str], store_images: bool = False) -> None:
    """Writes `dataset` into `folder`: `dataset/` (a `datasets.DatasetDict`), `rois.csv` and `description.json`.

    Args:
        dataset: what to write; no slide may be in two splits.
        folder: made if missing; what lies there under these names is replaced.
        store_images: whether the pixels are written as a column `image`, lossless; else the slides are referred to.

    Raises:
        ValueError: a slide in two splits, or pixels that cannot be read.
    """
    dataset.check_no_slide_in_two_splits()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{DATASET_FOLDER}.", suffix=".tmp") as temporary:
        image_folder = Path(temporary) if store_images else None
        splits = {
            split: _split_rows(dataset, dataset.indices(split).tolist(), image_folder)
            for split in sorted({roi.split for roi in dataset.rois})
        }
        written = Path(temporary) / DATASET_FOLDER
        datasets.DatasetDict(splits).save_to_disk(written)  # takes the image files' bytes in
        shutil.rmtree(folder / DATASET_FOLDER, ignore_errors=True)
        os.replace(written, folder / DATASET_FOLDER)
    description = {
        "task": dataset.task,
        "label_names": list(dataset.label_names),
        "slide_level": dataset.slide_level,
        "root": str(Path(dataset.root).resolve()),
        "images_stored": store_images,
    }
    write_atomically(folder / DESCRIPTION_FILE, json.dumps(description, indent=2) + "\n")
    names = [field.name for field in fields(Roi)]
    rows = [{**asdict(roi), "label": dataset.label_names[roi.label]} for roi in dataset.rois]
    write_rows(folder / ROI_LIST, names, [[row[name] for name in names] for row in rows])


def load_labelled_rois(
    dataset_dir: str | os.PathLike[str] | None,
    image_folder: str | os.PathLike[str] | None,
    *,
    data_root: str | os.PathLike[str] | None = None,
    num_folds: int = 5,
    group_pattern: str | None = None,
    shuffle_labels: bool = False,
    seed: int = 0,
) -> tuple[RoiDataset, list[Problem]]:
    """Reads what a script is pointed at: a prepared data set, or a folder of class-named folders of images.

    Args:
        dataset_dir: a prepared data set; see `load_roi_dataset`. Not read where `image_folder` is given.
        image_folder: see `read_image_folder`.
        data_root: where the slides of `dataset_dir` lie now, if they were moved.
        num_folds: of `image_folder`.
        group_pattern: of `image_folder`.
        shuffle_labels: the control without signal: nothing but chance is to be learnt.
        seed: of folds and shuffling.

    Returns:
        The data set, and what is wrong with it; each problem is also logged.

    Raises:
        ValueError: data that cannot be used at all.
    """
    if image_folder is not None:
        dataset, problems = read_image_folder(image_folder, num_folds, group_pattern, seed)
    else:
        dataset = load_roi_dataset(dataset_dir, data_root)
        problems = dataset.empty_classes()
    for problem in problems:
        logger.warning("%s: %s: %s", problem.kind, problem.item, problem.reason)
    return (dataset.with_shuffled_labels(seed) if shuffle_labels else dataset), problems


def load_roi_dataset(folder: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> RoiDataset:
    """Reads what `save_roi_dataset` wrote.

    Args:
        folder: the data set's.
        root: where the slides lie now, if they were moved.

    Raises:
        ValueError: `folder` holds no prepared data set, or the slides are no longer there.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION_FILE
    if not path.is_file() or not (folder / DATASET_FOLDER).is_dir():
        raise ValueError(
            f"{folder} holds no prepared data set (no {DESCRIPTION_FILE} with {DATASET_FOLDER}/): make it with "
            "scripts/prepare_panda.py, or pass a folder of class-named folders as --image_folder."
        )
    description = json.loads(path.read_text(encoding="utf-8"))
    splits = datasets.load_from_disk(str(folder / DATASET_FOLDER))
    names = [field.name for field in fields(Roi) if field.name != "split"]
    rois = tuple(
        Roi(split=split, **{name: row[name] for name in names})
        for split, rows in splits.items()
        for row in rows.select_columns(names)
    )
    images = datasets.concatenate_datasets(list(splits.values())) if description["images_stored"] else None
    root = Path(description["root"] if root is None else root)
    if images is None and rois and not (root / rois[0].file).is_file():
        raise ValueError(
            f"{folder} refers to slides in {root}, where {rois[0].file} is missing: pass the folder in which they lie "
            "now (--data_root), or prepare with --store images."
        )
    dataset = RoiDataset(
        rois, tuple(description["label_names"]), description["task"], root, description["slide_level"], images
    )
    dataset.check_no_slide_in_two_splits()
    return dataset


def write_rows(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Writes a CSV file in one go."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def write_problems(folder: Path, problems: Sequence[Problem]) -> None:
    """Writes `problems.csv`, also where there are none: an older list must not stay."""
    write_rows(folder / PROBLEM_LIST, Problem._fields, problems)


def _split_rows(dataset: RoiDataset, indices: Sequence[int], image_folder: Path | None) -> datasets.Dataset:
    """The rows of a split. Pixels go through files in `image_folder`: those of all ROIs do not fit in memory."""
    number = {int: datasets.Value("int64"), str: datasets.Value("string")}
    features = {field.name: number.get(field.type, datasets.Value("float64")) for field in fields(Roi)}
    features["label"] = datasets.ClassLabel(names=list(dataset.label_names))
    del features["split"]
    rows = [
        {name: value for name, value in asdict(dataset.rois[index]).items() if name != "split"} for index in indices
    ]
    if image_folder is not None:
        features["image"] = datasets.Image()
        for index, row in zip(tqdm(indices, desc="images", unit="ROI"), rows, strict=True):
            row["image"] = str(image_folder / f"{index}.png")
            Image.fromarray(dataset.read(index)).save(row["image"])
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))
