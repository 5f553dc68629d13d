# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""ROI data sets on disk: a `datasets` folder with one split each, the same list as CSV, and where the slides lie."""

import csv
import io
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
from PIL import Image
from tqdm import tqdm

from ...runtime.atomic_files import atomic_folder, write_atomically
from ...runtime.tables import read_table
from ...slides.records import slide_content
from .image_folder import read_image_folder
from .rois import Problem, Roi, RoiDataset

logger = logging.getLogger(__name__)

DATASET_FOLDER = "dataset"
DESCRIPTION_FILE = "description.json"
ROI_LIST = "rois.csv"
PROBLEM_LIST = "problems.csv"
_IMAGE_FOLDER = "images"
_IMAGE_COLUMN = "image"
_FIELDS = {field.name: field.type for field in fields(Roi) if field.name != "attributes"}


def save_roi_dataset(dataset: RoiDataset, folder: str | os.PathLike[str], store_images: bool = False) -> None:
    """Writes `dataset` into `folder`: `dataset/` (a `datasets.DatasetDict`), `rois.csv` and `description.json`.

    Args:
        dataset: what to write; no slide may be in two splits.
        folder: made if missing; what lies there under these names is replaced.
        store_images: whether the pixels are written as a column `image`, lossless; else the slides are referred to.

    Raises:
        ValueError: a slide in two splits, attributes of some regions only, or pixels that cannot be read.
    """
    dataset.check_no_slide_in_two_splits()
    _attribute_types(dataset)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder / DATASET_FOLDER) as temporary:
        image_folder = temporary / _IMAGE_FOLDER
        image_folder.mkdir()
        splits = {
            split: _split_rows(dataset, dataset.indices(split).tolist(), image_folder if store_images else None)
            for split in sorted({roi.split for roi in dataset.rois})
        }
        datasets.DatasetDict(splits).save_to_disk(temporary)  # takes the image files' bytes in
        shutil.rmtree(image_folder)
    description = {
        "task": dataset.task,
        "label_names": list(dataset.label_names),
        "slide_level": dataset.slide_level,
        "root": str(Path(dataset.root).resolve()),
        "images_stored": store_images,
        "contents": {} if store_images else _contents(dataset),
    }
    write_atomically(folder / DESCRIPTION_FILE, json.dumps(description, indent=2) + "\n")
    rows = [{**_columns(roi), "label": dataset.label_names[roi.label]} for roi in dataset.rois]
    names = [*_FIELDS, *_attribute_types(dataset)]
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
        ValueError: `folder` holds no prepared data set, its list `rois.csv` was edited, or the slides are no longer
            there. A slide that has changed since is refused when it is read.
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
    rois = tuple(
        _roi(split, row)
        for split, rows in splits.items()
        for row in rows.select_columns([name for name in rows.column_names if name != _IMAGE_COLUMN])
    )
    _check_list(folder / ROI_LIST, rois, description["label_names"])
    images = datasets.concatenate_datasets(list(splits.values())) if description["images_stored"] else None
    root = Path(description["root"] if root is None else root)
    if images is None and rois and not (root / rois[0].file).is_file():
        raise ValueError(
            f"{folder} refers to slides in {root}, where {rois[0].file} is missing: pass the folder in which they lie "
            "now (--data_root), or prepare with --store images."
        )
    label_names, contents = tuple(description["label_names"]), description.get("contents", {})
    dataset = RoiDataset(rois, label_names, description["task"], root, description["slide_level"], images, contents)
    dataset.check_no_slide_in_two_splits()
    return dataset


def _contents(dataset: RoiDataset) -> dict[str, str]:
    """Samples of the content of the slides that are there."""
    files = sorted({roi.file for roi in dataset.rois if (Path(dataset.root) / roi.file).is_file()})
    shown = tqdm(files, desc="content of slides", unit="slide", disable=len(files) < 2)
    return {file: slide_content(Path(dataset.root) / file) for file in shown}


def _check_list(path: Path, rois: Sequence[Roi], label_names: Sequence[str]) -> None:
    """Refuses a list `rois.csv` that says something else than the data set: whoever corrected it would be ignored."""
    if not path.is_file():
        return
    columns = ("roi_id", "label", "split")
    said = {
        row.cells["roi_id"]: tuple(row.cells[name] for name in columns[1:]) for row in read_table(path, columns).rows
    }
    held = {roi.roi_id.strip(): (label_names[roi.label].strip(), roi.split) for roi in rois}
    for name in (*held, *said):
        if said.get(name) != held.get(name):
            raise ValueError(
                f"{path} was edited: of {name} it says {said.get(name, 'nothing')}, the data set {DATASET_FOLDER}/ "
                f"says {held.get(name, 'nothing')} (label, split). The list is a copy that training does not read: "
                "correct the labels where the data set is made from and prepare it again, or remove the list."
            )


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


def _attribute_types(dataset: RoiDataset) -> dict[str, type]:
    """Names and types of the attributes that all regions have.

    Raises:
        ValueError: a region has others than the first, or one is called like a field of every region.
    """
    types = {name: type(value) for name, value in dataset.rois[0].attributes.items()}
    if taken := sorted(set(types) & {*_FIELDS, _IMAGE_COLUMN}):
        raise ValueError(
            f"attributes={', '.join(taken)} of {dataset.rois[0].roi_id}: every ROI has these; rename them."
        )
    for roi in dataset.rois:
        if set(roi.attributes) != set(types):
            raise ValueError(
                f"{roi.roi_id} has the attributes {sorted(roi.attributes)}, {dataset.rois[0].roi_id} has "
                f"{sorted(types)}: give all regions of a data set the same ones."
            )
    return types


def _columns(roi: Roi) -> dict[str, Any]:
    """A region as a flat row: its attributes beside its fields."""
    return {**{name: getattr(roi, name) for name in _FIELDS}, **roi.attributes}


def _roi(split: str, row: Mapping[str, Any]) -> Roi:
    """The region of a row; what is no field of every region is an attribute."""
    row_fields = {name: row[name] for name in _FIELDS if name != "split"}
    return Roi(split=split, **row_fields, attributes={name: row[name] for name in row if name not in _FIELDS})


def _split_rows(dataset: RoiDataset, indices: Sequence[int], image_folder: Path | None) -> datasets.Dataset:
    """The rows of a split. Pixels go through files in `image_folder`: those of all ROIs do not fit in memory."""
    column_types = {int: datasets.Value("int64"), str: datasets.Value("string")}
    types = {name: kind for name, kind in (_FIELDS | _attribute_types(dataset)).items() if name != "split"}
    features = {name: column_types.get(kind, datasets.Value("float64")) for name, kind in types.items()}
    features["label"] = datasets.ClassLabel(names=list(dataset.label_names))
    rows = [{name: _columns(dataset.rois[index])[name] for name in types} for index in indices]
    if image_folder is not None:
        features[_IMAGE_COLUMN] = datasets.Image()
        for index, row in zip(tqdm(indices, desc="images", unit="ROI"), rows, strict=True):
            row[_IMAGE_COLUMN] = str(image_folder / f"{index}.png")
            Image.fromarray(dataset.read(index)).save(row[_IMAGE_COLUMN])
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))
