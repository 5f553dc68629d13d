# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A folder of class-named folders of images as an ROI data set with folds for cross-validation."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from ...slides import Slide, SlideError
from .rois import FOLD_PREFIX, Problem, Roi, RoiDataset

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")


def read_image_folder(
    folder: str | os.PathLike[str], num_folds: int = 5, group_pattern: str | None = None, seed: int = 0
) -> tuple[RoiDataset, list[Problem]]:
    """Labels every image by the name of its folder and deals the images out to folds, stratified by class.

    Args:
        folder: holds one folder per class.
        num_folds: how many; each is evaluated by a classifier that learnt from the others.
        group_pattern: regular expression that finds, in a file's name, what images may share (patient, block, slide):
            its first group, or all it matches. Images that share it are never in two folds. Every image stands for
            itself by default.
        seed: of the folds.

    Returns:
        The data set, and everything in the folders that was left out: images that cannot be read, second names of an
        image (links), what is no image, and what lies in no class folder.

    Raises:
        ValueError: fewer than two classes, too few images or groups for the folds, or a file name in which
            `group_pattern` finds nothing.
    """
    folder = Path(folder)
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    classes = [path for path in entries if path.is_dir() and not path.name.startswith(".")]
    names = [path.name for path in classes]
    if len(names) < 2:
        raise ValueError(
            f"{folder} holds {len(names)} class folders: expected one folder per class, at least two, with images in "
            f"them ({', '.join(IMAGE_SUFFIXES)})."
        )
    rois: list[Roi] = []
    problems = [Problem("no_class", path.name, "it is no class folder") for path in entries if path not in classes]
    seen: dict[tuple[int, int], str] = {}
    for label, name in enumerate(names):
        for path in sorted((folder / name).iterdir()):
            relative = path.relative_to(folder).as_posix()
            problem = _reason_against(path, relative, seen)
            if problem is not None:
                problems.append(problem)
                continue
            try:
                with Slide(path) as image:
                    width, height = image.dimensions
                    image.thumbnail(64)
            except SlideError as error:
                problems.append(Problem("corrupt_image", relative, str(error)))
                continue
            group = relative if group_pattern is None else _group(path.name, group_pattern)
            rois.append(Roi(relative, group, relative, 0, 0, width, height, None, label, ""))
    rois = _with_folds(rois, names, num_folds, seed, folder)
    dataset = RoiDataset(tuple(rois), tuple(names), folder.name, folder)
    return dataset, problems + dataset.empty_classes()


def _reason_against(path: Path, relative: str, seen: dict[tuple[int, int], str]) -> Problem | None:
    """What keeps an entry of a class folder from being one of its images; `seen` are the images so far."""
    if path.is_symlink() and not path.exists():
        return Problem("dead_link", relative, f"it is a dead link to {os.readlink(path)}")
    if path.name.startswith("."):
        return Problem("no_image", relative, "it is hidden")
    if path.is_dir():
        return Problem("no_image", relative, "it is a folder: images lie in the class folders themselves")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return Problem("no_image", relative, "its ending is not that of an image")
    status = path.stat()
    known = seen.setdefault((status.st_dev, status.st_ino), relative)
    if known != relative:  # in two folds it would be learnt and tested
        return Problem("second_name", relative, f"it is {known} under another name")
    return None


def _group(name: str, pattern: str) -> str:
    found = re.search(pattern, name)
    if found is None:
        raise ValueError(f"group_pattern={pattern!r} finds nothing in {name!r}: every file name must have its group.")
    return found.group(1) if found.groups() else found.group()


def _with_folds(rois: Sequence[Roi], names: Sequence[str], num_folds: int, seed: int, folder: Path) -> list[Roi]:
    counts = Counter(names[roi.label] for roi in rois)
    empty = [name for name in names if not counts[name]]
    if empty:
        raise ValueError(f"{folder}: the class folders {', '.join(empty)} hold no readable image.")
    num_groups = len({roi.slide_id for roi in rois})
    if not 2 <= num_folds <= min(num_groups, min(counts.values())):
        raise ValueError(
            f"folds={num_folds} is not possible with {dict(counts)} images in {num_groups} groups: at least 2, and no "
            "more than there are groups, or images of a class."
        )
    folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    labels, groups = [roi.label for roi in rois], [roi.slide_id for roi in rois]
    with warnings.catch_warnings():
        # A class with fewer groups than folds is missing in some: `empty_classes` names it, and which folds.
        warnings.filterwarnings("ignore", message="The least populated class")
        parts = [held_out for _, held_out in folds.split(np.zeros(len(rois)), labels, groups)]
    fold_of = {index: f"{FOLD_PREFIX}{number}" for number, part in enumerate(parts, start=1) for index in part.tolist()}
    return [replace(roi, split=fold_of[index]) for index, roi in enumerate(rois)]
