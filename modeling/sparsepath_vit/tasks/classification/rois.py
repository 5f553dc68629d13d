# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Labelled regions of interest (ROIs): where they lie, what they show, which split they are in, and their pixels."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from ...slides import Slide
from ...slides.records import slide_content

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "validation", "test")
FOLD_PREFIX = "fold"
VIEWS = ("field_of_view", "pixels")
_OPEN_SLIDES = 4


@dataclass(frozen=True)
class Roi:
    """One labelled region.

    Attributes:
        roi_id: unique in its data set.
        slide_id: the slide (or patient, or source block) it was cut from; ROIs of one slide are never in two splits.
        file: slide or image file, relative to the data set's root.
        x: left edge, level-0 pixels of the file.
        y: top edge, level-0 pixels of the file.
        width: pixels at `mpp`.
        height: pixels at `mpp`.
        mpp: micrometres per pixel at which it is read; None for the file's own pixels.
        label: class index.
        split: one of `SPLITS`, or "fold1", "fold2", ... for cross-validation.
        attributes: whatever else the data set says of it, by name, such as the centre that scanned the slide. All
            regions of a data set have the same names; they become columns beside these.
    """

    roi_id: str
    slide_id: str
    file: str
    x: int
    y: int
    width: int
    height: int
    mpp: float | None
    label: int
    split: str
    attributes: Mapping[str, str | int | float] = field(default_factory=dict, hash=False)


class Problem(NamedTuple):
    """Something of a data set that cannot be used, or not as asked: its kind, what it is, and why."""

    kind: str
    item: str
    reason: str


class Partition(NamedTuple):
    """ROI indices of one fit: what is learnt from, what settings are chosen on (may be empty), what is reported."""

    train: np.ndarray
    validation: np.ndarray
    evaluation: np.ndarray


@dataclass(frozen=True)
class RoiDataset:
    """Labelled regions with their pixels.

    Attributes:
        rois: the regions.
        label_names: of the classes, by index.
        task: name of the task.
        root: folder that `Roi.file` is relative to.
        slide_level: whether the label belongs to the whole slide: embeddings of its ROIs are then averaged.
        images: the ROIs' own pixels, row by row in a column `image`, where they were stored; else slides are read.
        contents: samples of the slides' content when the ROIs were chosen, by `Roi.file`, see `slide_content`: places
            and labels hold for that content only. A slide that is not in it is taken as it is.
    """

    rois: tuple[Roi, ...]
    label_names: tuple[str, ...]
    task: str
    root: Path
    slide_level: bool = False
    images: "datasets.Dataset | None" = None
    contents: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.rois)

    @property
    def labels(self) -> np.ndarray:
        """(rois,) int64 class indices."""
        return np.array([roi.label for roi in self.rois], dtype=np.int64)

    @property
    def slide_ids(self) -> np.ndarray:
        """(rois,) the slide of each ROI."""
        return np.array([roi.slide_id for roi in self.rois])

    @property
    def folds(self) -> list[str]:
        """Names of the folds of a data set that is to be cross-validated; empty for one with fixed splits."""
        return sorted({roi.split for roi in self.rois if roi.split.startswith(FOLD_PREFIX)})

    def indices(self, split: str) -> np.ndarray:
        """The ROIs of `split`."""
        return np.array([index for index, roi in enumerate(self.rois) if roi.split == split], dtype=np.int64)

    def partitions(self, eval_split: str = "test") -> list[Partition]:
        """One partition for fixed splits, evaluated on `eval_split`; one per fold for a data set with folds.

        Raises:
            ValueError: a split that is needed is empty or unknown; the message names it.
        """
        if self.folds:
            everything = np.arange(len(self))
            held_out = [self.indices(fold) for fold in self.folds]
            return [Partition(np.setdiff1d(everything, fold), np.array([], np.int64), fold) for fold in held_out]
        if eval_split not in SPLITS[1:]:
            raise ValueError(f"eval_split={eval_split!r} is unknown: choose one of {', '.join(SPLITS[1:])}.")
        parts = {split: self.indices(split) for split in SPLITS}
        for split in ("train", eval_split):
            if not len(parts[split]):
                raise ValueError(
                    f"the split {split!r} holds no ROIs ({dict(Counter(roi.split for roi in self.rois))} in all): "
                    "prepare the data set from more slides, or with other split shares."
                )
        return [Partition(parts["train"], parts["validation"], parts[eval_split])]

    def with_shuffled_labels(self, seed: int) -> "RoiDataset":
        """The control: labels dealt out anew, so that nothing can be learnt. Slide labels stay one per slide."""
        generator = np.random.default_rng(seed)
        if self.slide_level:
            label_of = {roi.slide_id: roi.label for roi in self.rois}
            dealt = generator.permutation(list(label_of.values())).tolist()
            label_of = dict(zip(label_of, dealt, strict=True))
            labels = [label_of[roi.slide_id] for roi in self.rois]
        else:
            labels = generator.permutation(self.labels).tolist()
        rois = tuple(replace(roi, label=label) for roi, label in zip(self.rois, labels, strict=True))
        return replace(self, rois=rois)

    def empty_classes(self) -> list[Problem]:
        """Every class that a split lacks."""
        present = {(roi.split, roi.label) for roi in self.rois}
        return [
            Problem("empty_class_in_split", f"{split}/{name}", f"the split {split!r} holds no ROI of class {name!r}")
            for split in (self.folds or SPLITS)
            for label, name in enumerate(self.label_names)
            if (split, label) not in present
        ]

    def check_no_slide_in_two_splits(self) -> None:
        """Raises a `ValueError` that names the slide, should one be in two splits."""
        split_of: dict[str, str] = {}
        for roi in self.rois:
            if split_of.setdefault(roi.slide_id, roi.split) != roi.split:
                raise ValueError(
                    f"the slide {roi.slide_id} is in the splits {split_of[roi.slide_id]!r} and {roi.split!r}: results "
                    "would be measured on tissue that was trained on. Make the splits anew."
                )

    def read(self, index: int, size: int | None = None, view: str = "field_of_view") -> np.ndarray:
        """The pixels of an ROI.

        Args:
            index: of the ROI.
            size: pixels of the longer side; None for the ROI as it is.
            view: what a smaller `size` means: "field_of_view" shows the whole ROI at a lower resolution, "pixels" the
                middle of it at its own resolution.

        Returns:
            (height, width, 3) uint8.

        Raises:
            ValueError: a `size` larger than the ROI, a slide that has changed since the ROIs were chosen, or pixels
                that cannot be read (`SlideError`); all are named.
        """
        roi = self.rois[index]
        crop, output = _crop_and_output(roi, size, view)  # both (width, height)
        offset = tuple((side - part) // 2 for side, part in zip((roi.width, roi.height), crop, strict=True))
        if self.images is None and roi.mpp is not None:
            slide = self._slide_of(roi)
            scale = slide.scale(roi.mpp)
            mpp = roi.mpp * crop[0] / output[0]
            return slide.read_region(roi.x + offset[0] * scale[0], roi.y + offset[1] * scale[1], *output, mpp)
        if self.images is not None:
            image = self.images[index]["image"].convert("RGB")
        else:
            slide = self._slide_of(roi)
            image = Image.fromarray(slide.read_region(roi.x, roi.y, roi.width, roi.height))
        box = (*offset, offset[0] + crop[0], offset[1] + crop[1])
        return np.asarray(image.crop(box) if crop == output else image.resize(output, Image.Resampling.BICUBIC, box))

    def content_key(self, index: int) -> str:
        """What identifies the pixels of an ROI wherever they lie: the file's content and the rectangle in it.

        Of large files a sample stands for the content, see `content_sample`: a slide has gigabytes.

        Raises:
            ValueError: the slide has changed since the ROIs were chosen.
            OSError: it cannot be read.
        """
        roi = self.rois[index]
        if self.images is not None:
            encoded = self.images.with_format("arrow")[index]["image"][0][
                "bytes"
            ].as_py()  # not decoded only to be hashed
            content = hashlib.sha256(encoded).hexdigest()
        else:
            content = self._content_of(roi)
        rectangle = (roi.x, roi.y, roi.width, roi.height, roi.mpp)
        return hashlib.sha256(f"{content} {rectangle}".encode()).hexdigest()

    def _content_of(self, roi: Roi) -> str:
        path = self.root / roi.file
        content = _content(*_version(path))
        if content != self.contents.get(roi.file, content):
            raise ValueError(
                f"{path} has changed since {roi.roi_id} was chosen from it: where it lies and its label need no longer "
                "hold. Prepare the data set again, or bring the slide back."
            )
        return content

    def _slide_of(self, roi: Roi) -> Slide:
        path = self.root / roi.file
        if not path.exists():
            return Slide(path)  # raises
        if roi.file in self.contents:
            self._content_of(roi)
        return _open_slide(*_version(path))


def _crop_and_output(roi: Roi, size: int | None, view: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of the part of the ROI that is shown, and of the pixels it is shown in."""
    if view not in VIEWS:
        raise ValueError(f"view={view!r} is unknown: choose one of {', '.join(VIEWS)}.")
    whole = (roi.width, roi.height)
    if size is None or size == max(whole):
        return whole, whole
    if not 1 <= size < max(whole):
        raise ValueError(
            f"size={size} is not possible for {roi.roi_id}, which has {roi.width} x {roi.height} pixels: enlarging it "
            "would add no detail. Choose a size up to that of the ROIs, or prepare larger ones."
        )
    if view == "pixels":
        part = (min(size, roi.width), min(size, roi.height))
        return part, part
    return whole, tuple(max(1, round(side * size / max(whole))) for side in whole)


def _version(path: Path) -> tuple[Path, int, int]:
    """A file, its size and when it was written: what is kept of a file does not outlive a change of it."""
    status = os.stat(path)
    return path, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=_OPEN_SLIDES)
def _open_slide(path: Path, size: int, modified: int) -> Slide:
    return Slide(path)


@lru_cache(maxsize=4096)
def _content(path: Path, size: int, modified: int) -> str:
    return slide_content(path)


def count_problems(problems: Sequence[Problem]) -> dict[str, int]:
    """How many there are of each kind."""
    return dict(sorted(Counter(problem.kind for problem in problems).items()))
