# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Embedded slides with labels from a table: a bag of feature vectors each, and the patient it comes from."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.extras import require
from ...runtime.short_repr import ShortRepr
from ...runtime.tables import TableRow, read_table
from ...slides.reader import Slide
from ...slides.store import read_settings

logger = logging.getLogger(__name__)

_SLIDE_COLUMNS = dict.fromkeys(("wsi", "slide_id", "sample_id", "image_path"), "slide")
_MOST_NAMED = 10


@dataclass(frozen=True, repr=False)
class SlideBags(ShortRepr):
    """Slides as their vectors, of one encoder and one set of settings.

    Attributes:
        names: of the slides.
        files: their HDF5 files.
        labels: (slides,) int64 class indices; empty where there are none to learn from.
        label_names: of the classes, by index.
        groups: (slides,) the patient of each, or the slide itself: what must not be split.
        settings: what the features were made with, see `EmbeddingStore`.
    """

    names: tuple[str, ...]
    files: tuple[Path, ...]
    labels: np.ndarray
    label_names: tuple[str, ...]
    groups: np.ndarray
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.names)

    def bag(self, index: int) -> np.ndarray:
        """(rows, width) float32: the tiles or regions of one slide.

        Raises:
            ValueError: the file holds no features, or numbers that are not finite.
        """
        try:
            with require("h5py").File(self.files[index], "r") as file:
                features = file["features"][:].astype(np.float32)
        except (OSError, KeyError) as error:
            raise ValueError(f"{self.files[index]} holds no features ({error}): embed the slide again.") from error
        if not len(features) or not np.isfinite(features).all():
            raise ValueError(f"{self.files[index]} holds no features, or some that are not finite: embed it again.")
        return features

    def means(self) -> np.ndarray:
        """(slides, width) float64: the mean over each slide's rows."""
        return np.stack([self.bag(index).mean(axis=0, dtype=np.float64) for index in range(len(self))])


def read_labelled_bags(
    table: str | os.PathLike[str], features: str | os.PathLike[str], target: str, patient: str | None = None
) -> SlideBags:
    """Slides of a table that are embedded and have a label.

    Args:
        table: CSV with a row for each slide: its name in the column `slide` (or `wsi`, `slide_id`, `sample_id`), with
            or without ending, a label, and if wanted a patient. Rows without a label are left out.
        features: folder of embeddings.
        target: the column of labels.
        patient: the column of patients; by default every slide is its own.

    Raises:
        ValueError: the table or the folder cannot be understood, or fewer than two classes are left.
    """
    columns = [target, *([patient] if patient else [])]
    rows = read_table(table, ("slide", *columns), (), _SLIDE_COLUMNS).rows
    files = {path.stem: path for path in sorted(Path(features).glob("*.h5"))}
    if not files:
        raise ValueError(f"{features} holds no embeddings (NAME.h5): run `sparsepath embed` first.")
    chosen: dict[str, TableRow] = {}
    missing = []
    for row in rows:
        name = _name_of(row.cells["slide"], files)
        if name is None:
            missing.append(row.cells["slide"])
        elif row.cells[target]:
            if name in chosen:
                raise ValueError(f"{table}, line {row.line}: the slide {name} stands in two rows: keep one.")
            if patient and not row.cells[patient]:
                raise ValueError(f"{table}, line {row.line}: the column {patient!r} is empty: folds need a patient.")
            chosen[name] = row
    if missing:
        listed = ", ".join(missing[:_MOST_NAMED]) + (", ..." if len(missing) > _MOST_NAMED else "")
        logger.warning("%d slides of %s are not embedded in %s: %s.", len(missing), table, features, listed)
    cells = [row.cells for row in chosen.values()]
    label_names = tuple(sorted({cell[target] for cell in cells}))
    if len(label_names) < 2:
        raise ValueError(
            f"{table}: {len(cells)} embedded slides have labels of {len(label_names)} classes: two at least."
        )
    return SlideBags(
        names=tuple(chosen),
        files=tuple(files[name] for name in chosen),
        labels=np.array([label_names.index(cell[target]) for cell in cells], dtype=np.int64),
        label_names=label_names,
        groups=np.array([cell[patient] if patient else name for name, cell in zip(chosen, cells, strict=True)]),
        settings=read_settings(features),
    )


def read_bags(features: str | os.PathLike[str]) -> SlideBags:
    """All embedded slides of a folder, without labels.

    Raises:
        ValueError: there are none.
    """
    files = sorted(Path(features).glob("*.h5"))
    if not files:
        raise ValueError(f"{features} holds no embeddings (NAME.h5): run `sparsepath embed` first.")
    names = tuple(path.stem for path in files)
    return SlideBags(names, tuple(files), np.array([], np.int64), (), np.array(names), read_settings(features))


def _name_of(written: str, known: Sequence[str]) -> str | None:
    """The name of the result that a table's slide has: as written, or without folder and ending."""
    path = Path(written)
    return next((name for name in (written, path.name, Slide.name_of(path), path.stem) if name in known), None)
