# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""PANDA (prostate biopsies, Bulten et al. 2022) as Kaggle ships it: the folder, its known faults, and label rules.

The folder holds `train.csv`, `train_images/ID.tiff` and `train_label_masks/ID_mask.tiff`. Nothing of it is trusted:
what cannot be used becomes a `Problem` that names it.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...runtime.tables import TableRow, read_table
from ..classification.rois import Problem

NUM_SLIDES = 10_616
CSV_COLUMNS = ("image_id", "data_provider", "isup_grade", "gleason_score")
# Bulten et al. 2022; a Gleason score of 0+0 stands for a biopsy without cancer.
GLEASON_TO_ISUP = {
    "0+0": 0,
    "3+3": 1,
    "3+4": 2,
    "4+3": 3,
    **dict.fromkeys(("4+4", "3+5", "5+3"), 4),
    **dict.fromkeys(("4+5", "5+4", "5+5"), 5),
}
NEGATIVE = "negative"  # Radboud's name of 0+0
MASK_LABELS = {
    "radboud": ("background", "stroma", "benign", "G3", "G4", "G5"),
    "karolinska": ("background", "benign", "cancer"),
}
KNOWN_FAULTS = {
    "b0a92a74cb53899311acc30b7405e101": "a known wrong row of train.csv",
    "3790f55cad63053e956fb73027179707": "a known blank slide",
    "4a2ca53f240932e46eaf8959cb3f490a": "a known blank mask",
    "aaa5732cd49bffddf0d2b7d36fbb0a83": "a known blank mask",
    "e4215cfc8c41ec04a55431cc413688a9": "a known blank mask",
}


@dataclass(frozen=True)
class PandaSlide:
    """One usable row of train.csv.

    Attributes:
        image_id: name of the slide.
        provider: "radboud" or "karolinska".
        isup_grade: 0..5.
        grade_is_consistent: whether it is that of the row's Gleason score.
        slide: the slide file.
        mask: the label mask; None where there is none.
    """

    image_id: str
    provider: str
    isup_grade: int
    grade_is_consistent: bool
    slide: Path
    mask: Path | None


@dataclass(frozen=True)
class PandaTask:
    """What an ROI (or a slide) is labelled with.

    Attributes:
        name: of the task.
        label_names: by index.
        providers: the centres whose masks know these labels.
        slide_level: whether the label is the slide's ISUP grade; then no mask is needed.
        min_coverage: share of the annotated tissue that the label needs, unless said otherwise.
    """

    name: str
    label_names: tuple[str, ...]
    providers: tuple[str, ...]
    slide_level: bool = False
    min_coverage: float = 0.0

    def label_of(self, provider: str, areas: np.ndarray, min_coverage: float) -> int | None:
        """The label of an ROI, or None where the annotation is ambiguous.

        `radboud_pattern` takes the class with the largest area if that is at least `min_coverage` of the annotated
        tissue. `cancer` takes cancer if its share is at least `min_coverage`, and benign only if there is none.

        Args:
            provider: of the mask.
            areas: (labels of the provider,) areas by mask label, background first.
            min_coverage: share of the annotated tissue.
        """
        tissue = areas[1:].sum()
        if not tissue:
            return None
        if self.name == "radboud_pattern":
            largest = int(areas[1:].argmax())
            return largest if areas[1 + largest] >= min_coverage * tissue else None
        benign = MASK_LABELS[provider].index("benign")
        cancer = areas[benign + 1 :].sum()
        if cancer and cancer >= min_coverage * tissue:
            return 1
        return None if cancer else 0


TASKS = {
    task.name: task
    for task in (
        PandaTask("radboud_pattern", MASK_LABELS["radboud"][1:], ("radboud",), min_coverage=0.5),
        PandaTask("cancer", ("benign", "cancer"), tuple(MASK_LABELS), min_coverage=0.1),
        PandaTask("isup", tuple(f"ISUP {grade}" for grade in range(6)), tuple(MASK_LABELS), slide_level=True),
    )
}


def read_panda_folder(
    folder: str | os.PathLike[str], allow_subset: bool = False
) -> tuple[list[PandaSlide], list[Problem]]:
    """The usable slides of a PANDA folder, by id, and what is wrong with the others. No slide is opened.

    Args:
        folder: as Kaggle ships it.
        allow_subset: whether fewer slides than the whole data set are fine.

    Raises:
        ValueError: no such folder, no or another train.csv, slides missing without `allow_subset`, or none usable.
    """
    folder = Path(folder)
    rows = _read_csv(folder / "train.csv")
    entries = sorted((folder / "train_images").iterdir()) if (folder / "train_images").is_dir() else []
    images = {path.stem: path for path in entries if path.suffix == ".tiff"}
    found = sum(row.cells["image_id"] in images for row in rows)
    if found < NUM_SLIDES and not allow_subset:
        raise ValueError(
            f"expected {NUM_SLIDES:,} slides, found {found:,} in {folder} (of {len(rows):,} rows of train.csv): "
            "complete the download, or pass --allow_subset to work with what is there."
        )
    slides: dict[str, PandaSlide] = {}
    problems: list[Problem] = []
    for line, row in rows:
        image_id = row["image_id"]
        if image_id in slides:
            problems.append(Problem("duplicate_row", image_id, f"train.csv, line {line}: its first row counts"))
            continue
        slide = _usable_slide(row, f"train.csv, line {line}", images.get(image_id), folder, problems)
        if slide is not None:
            slides[image_id] = slide
    listed = {row.cells["image_id"] for row in rows}
    problems += [
        Problem("slide_without_row", name, f"{path.name} has no row in train.csv")
        for name, path in images.items()
        if name not in listed
    ]
    problems += [
        Problem("no_slide", path.name, "it lies in train_images, where slides are called IMAGE_ID.tiff")
        for path in entries
        if path.suffix != ".tiff"
    ]
    if not slides:
        kinds = sorted({problem.kind for problem in problems})
        raise ValueError(f"{folder} holds no usable slide: {len(rows)} rows in train.csv ({', '.join(kinds)}).")
    return sorted(slides.values(), key=lambda slide: slide.image_id), problems


def _read_csv(path: Path) -> tuple[TableRow, ...]:
    if not path.exists():
        raise ValueError(
            f"{path.parent} holds no {path.name}: --panda_dir is the folder as Kaggle ships it, with train.csv, "
            "train_images/ and train_label_masks/."
        )
    return read_table(path, CSV_COLUMNS).rows


def _usable_slide(
    row: dict[str, str], place: str, slide: Path | None, folder: Path, problems: list[Problem]
) -> PandaSlide | None:
    """One row, checked; what is wrong with it goes to `problems`."""
    image_id, provider = row["image_id"], row["data_provider"]
    if slide is None:
        problems.append(Problem("row_without_slide", image_id, f"{place}: train_images/{image_id}.tiff is missing"))
        return None
    if provider not in MASK_LABELS:
        known = ", ".join(MASK_LABELS)
        problems.append(Problem("unknown_provider", image_id, f"{place}: data_provider={provider!r} is not of {known}"))
        return None
    gleason = "0+0" if row["gleason_score"] == NEGATIVE else row["gleason_score"]
    if gleason not in GLEASON_TO_ISUP or row["isup_grade"] not in {"0", "1", "2", "3", "4", "5"}:
        reason = f"{place}: isup_grade={row['isup_grade']!r}, gleason_score={row['gleason_score']!r} is no known grade"
        problems.append(Problem("unknown_grade", image_id, reason))
        return None
    isup_grade = int(row["isup_grade"])
    is_consistent = GLEASON_TO_ISUP[gleason] == isup_grade
    if not is_consistent:
        expected = GLEASON_TO_ISUP[gleason]
        reason = f"{place}: Gleason {gleason} is grade {expected}, not isup_grade={isup_grade}; task isup leaves it out"
        problems.append(Problem("grade_mismatch", image_id, with_known_fault(image_id, reason)))
    mask = folder / "train_label_masks" / f"{image_id}_mask.tiff"
    return PandaSlide(image_id, provider, isup_grade, is_consistent, slide, mask if mask.is_file() else None)


def with_known_fault(image_id: str, reason: str) -> str:
    """`reason`, and that the fault is a known one where it is."""
    return f"{reason} ({KNOWN_FAULTS[image_id]})" if image_id in KNOWN_FAULTS else reason
