# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""From a PANDA folder to labelled ROIs in splits by slide."""

import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ...runtime.atomic_files import write_atomically
from ...slides import Slide, SlideError, TissueMask, find_tissue
from ...slides.forward import read_ahead
from ..classification.roi_files import save_roi_dataset, write_problems, write_rows
from ..classification.rois import SPLITS, Problem, Roi, RoiDataset, count_problems
from .dataset import MASK_LABELS, TASKS, PandaSlide, PandaTask, read_panda_folder, with_known_fault
from .label_mask import LabelMask, LabelMaskError, LabelOutsideTable

logger = logging.getLogger(__name__)

SPLIT_LIST = "splits.csv"
SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class PandaSettings:
    """Which ROIs are taken of PANDA, and how they are labelled.

    Attributes:
        task: "radboud_pattern", "cancer" or "isup".
        roi_size: pixels per side, at `mpp`.
        mpp: micrometres per pixel.
        min_tissue: share of the ROI that must be tissue: annotated tissue, for "isup" detected tissue.
        min_coverage: share of the annotated tissue that the label needs; None for the task's own.
        max_rois_per_slide: None takes all.
        split_shares: of the slides, for train, validation and test.
        seed: of ROI positions, choice and splits.
    """

    task: str
    roi_size: int = 3430
    mpp: float = 0.5
    min_tissue: float = 0.1
    min_coverage: float | None = None
    max_rois_per_slide: int | None = None
    split_shares: tuple[float, float, float] = (0.7, 0.15, 0.15)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task={self.task!r} is unknown: choose one of {', '.join(TASKS)}.")
        shares = (self.min_tissue, 0.0 if self.min_coverage is None else self.min_coverage)
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError(f"min_tissue={shares[0]} and min_coverage={shares[1]} are shares and lie in [0, 1].")
        if self.roi_size < 1 or not self.mpp > 0 or (self.max_rois_per_slide or 1) < 1:
            raise ValueError(
                f"roi_size={self.roi_size}, mpp={self.mpp}, max_rois_per_slide={self.max_rois_per_slide} are not "
                "possible: all are positive, roi_size in pixels, mpp in micrometres per pixel."
            )
        if (
            len(self.split_shares) != len(SPLITS)
            or min(self.split_shares) < 0
            or abs(sum(self.split_shares) - 1) > 1e-6
        ):
            raise ValueError(f"split_shares={self.split_shares}: three shares for {', '.join(SPLITS)} that sum to 1.")


@dataclass
class SlideRois:
    """What one slide yields.

    Attributes:
        rois: (x, y, label) of each chosen ROI, level-0 pixels.
        problems: why there are none, or fewer.
        outcomes: how many places of the slide were taken, and left out for which reason.
    """

    rois: list[tuple[int, int, int]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    outcomes: Counter = field(default_factory=Counter)


def prepare_panda(
    panda_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    settings: PandaSettings,
    allow_subset: bool = False,
    store_images: bool = False,
    workers: int = 2,
) -> dict[str, Any]:
    """Verifies a PANDA folder, selects and labels ROIs, splits them by slide and writes them.

    Args:
        panda_dir: the folder as Kaggle ships it.
        output_dir: made if missing. It gets the `datasets` folder, `rois.csv`, `splits.csv`, `problems.csv` and
            `summary.json`; what lies there under these names is replaced.
        settings: of the selection.
        allow_subset: whether fewer than all slides are fine.
        store_images: whether the ROIs' pixels are written too; else the slides are referred to.
        workers: threads.

    Returns:
        The summary, as written.

    Raises:
        ValueError: a folder that is not PANDA, or from which no ROI can be taken.
    """
    task, output_dir = TASKS[settings.task], Path(output_dir)
    slides, problems = read_panda_folder(panda_dir, allow_subset)
    split_of = split_slides(slides, settings.split_shares, settings.seed)
    used = [slide for slide in slides if slide.provider in task.providers]
    rois, outcomes = [], Counter()
    chosen = read_ahead(lambda slide: choose_rois(slide, task, settings), used, workers)
    for slide, result in zip(used, tqdm(chosen, total=len(used), desc="slides", unit="slide"), strict=True):
        rois += [_roi(slide, number, place, split_of, settings, panda_dir) for number, place in enumerate(result.rois)]
        problems += result.problems
        outcomes += result.outcomes
    if not rois:
        _record_problems(output_dir, problems)
        raise ValueError(
            f"{panda_dir}: no ROI of {settings.roi_size} px at {settings.mpp} mpp could be taken from "
            f"{len(used)} slides: {count_problems(problems) or dict(outcomes)}."
        )
    dataset = RoiDataset(tuple(rois), task.label_names, task.name, Path(panda_dir), task.slide_level)
    problems += dataset.empty_classes()
    save_roi_dataset(dataset, output_dir, store_images)
    write_rows(
        output_dir / SPLIT_LIST,
        ["image_id", "data_provider", "isup_grade", "split"],
        [[slide.image_id, slide.provider, slide.isup_grade, split_of[slide.image_id]] for slide in slides],
    )
    _record_problems(output_dir, problems)
    summary = _summary(dataset, slides, len(used), outcomes, problems, settings)
    write_atomically(output_dir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def split_slides(slides: Sequence[PandaSlide], shares: tuple[float, float, float], seed: int) -> dict[str, str]:
    """The split of every slide, stratified by provider and ISUP grade.

    Each stratum gives every split its share, rounded down; the few slides left over go, at most one to a
    split, where most are missing in all. So small strata do not all end in the same split.

    Args:
        slides: all usable slides, whatever the task: the splits of all tasks are the same.
        shares: of train, validation and test.
        seed: of the order.

    Returns:
        Split by image id.
    """
    generator = np.random.default_rng(seed)
    strata: dict[tuple[str, int], list[str]] = defaultdict(list)
    for slide in sorted(slides, key=lambda slide: slide.image_id):
        strata[slide.provider, slide.isup_grade].append(slide.image_id)
    split_of: dict[str, str] = {}
    wanted, dealt = np.array(shares), np.zeros(len(SPLITS))
    for stratum in sorted(strata):
        size = len(strata[stratum])
        counts = np.floor(wanted * size + 1e-9).astype(int)
        target = wanted * (dealt.sum() + size)
        most_missing = np.argsort(dealt + counts - target, kind="stable")
        counts[most_missing[: size - counts.sum()]] += 1
        dealt += counts
        splits = np.repeat(SPLITS, counts).tolist()
        split_of |= dict(zip(generator.permutation(strata[stratum]).tolist(), splits, strict=True))
    return split_of


class _Unusable(Exception):
    """A slide yields nothing; `kind` and message become its problem."""

    def __init__(self, kind: str, reason: object) -> None:
        super().__init__(str(reason))
        self.kind = kind


def choose_rois(panda_slide: PandaSlide, task: PandaTask, settings: PandaSettings) -> SlideRois:
    """The ROIs of one slide: places on a grid with a random origin, in random order, as far as they can be labelled.

    Whatever is wrong with the slide or its mask becomes a problem in the result; nothing is raised for it.
    """
    name, result = panda_slide.image_id, SlideRois()
    if task.slide_level and not panda_slide.grade_is_consistent:
        return result  # named when train.csv was read
    try:
        if task.slide_level:
            with _open_slide(panda_slide) as slide:
                tissue = _tissue(slide)
                return _take(slide, tissue, lambda x, y: panda_slide.isup_grade, name, settings)
        if panda_slide.mask is None:
            raise _Unusable("missing_mask", f"train_label_masks/{name}_mask.tiff is missing")
        with _open_slide(panda_slide) as slide, _open_mask(panda_slide) as mask:
            _tissue(slide)  # a blank slide is none, whatever its mask says
            return _take_annotated(slide, mask, panda_slide, task, settings)
    except _Unusable as error:
        result.problems.append(Problem(error.kind, name, with_known_fault(name, str(error))))
        return result


def _open_slide(panda_slide: PandaSlide) -> Slide:
    try:
        slide = Slide(panda_slide.slide, apart=True)
        slide.thumbnail(256)  # a file can open well and hold damaged pixels
    except SlideError as error:
        raise _Unusable("corrupt_slide", error) from error
    if not slide.states_mpp:
        raise _Unusable("unknown_mpp", f"{slide.path.name} does not state its resolution")
    return slide


def _open_mask(panda_slide: PandaSlide) -> LabelMask:
    try:
        return LabelMask(panda_slide.mask, MASK_LABELS[panda_slide.provider])
    except LabelMaskError as error:
        raise _Unusable("corrupt_mask", error) from error


def _tissue(slide: Slide) -> TissueMask:
    try:
        return find_tissue(slide)
    except SlideError as error:
        raise _Unusable("blank_slide", error) from error


def _take_annotated(
    slide: Slide, mask: LabelMask, panda_slide: PandaSlide, task: PandaTask, settings: PandaSettings
) -> SlideRois:
    """`_take` where the mask says what is tissue, and what the label is."""
    if mask.levels[0] != slide.dimensions:
        sizes = [" x ".join(map(str, size)) for size in (mask.levels[0], slide.dimensions)]
        raise _Unusable("mask_of_other_size", f"the mask has {sizes[0]} pixels, the slide {sizes[1]}")
    coverage = task.min_coverage if settings.min_coverage is None else settings.min_coverage
    side = [int(settings.roi_size * scale) for scale in slide.scale(settings.mpp)]

    def label_of(x: int, y: int) -> int | None:
        return task.label_of(panda_slide.provider, mask.areas(x, y, *side), coverage)

    try:
        annotated = mask.coarse() > 0
        if not annotated.any():
            raise _Unusable("blank_mask", f"{mask.path.name} marks no tissue")
        return _take(slide, TissueMask.of_mask(annotated, slide), label_of, panda_slide.image_id, settings)
    except LabelOutsideTable as error:
        raise _Unusable("label_outside_table", error) from error
    except LabelMaskError as error:
        raise _Unusable("corrupt_mask", error) from error


def _take(
    slide: Slide,
    tissue: TissueMask,
    label_of: Callable[[int, int], int | None],
    name: str,
    settings: PandaSettings,
) -> SlideRois:
    """Goes through the places with enough tissue and takes those that `label_of` (x, y) can label."""
    places, left_out = _places(slide, tissue, name, settings)
    result = SlideRois(outcomes=Counter(too_little_tissue=left_out))
    limit = settings.max_rois_per_slide or len(places)
    for x, y in places:
        if len(result.rois) == limit:
            result.outcomes["beyond_max_rois_per_slide"] += 1
            continue
        label = label_of(x, y)
        if label is None:
            result.outcomes["ambiguous_label"] += 1
            continue
        _check_pixels(slide, x, y, settings)
        result.rois.append((x, y, label))
    result.outcomes["taken"] = len(result.rois)
    if not result.rois:
        reasons = ", ".join(f"{count} {outcome}" for outcome, count in result.outcomes.items() if count)
        total = len(places) + left_out
        result.problems.append(Problem("no_roi", name, f"none of its {total} places can be taken: {reasons}"))
    return result


def _places(slide: Slide, tissue: TissueMask, name: str, settings: PandaSettings) -> tuple[list[tuple[int, int]], int]:
    """Corners (x, y) of the ROIs of a grid that have enough tissue, in random order, and how many have not."""
    size, dimensions = settings.roi_size, slide.dimensions
    side = [size * step for step in slide.scale(settings.mpp)]  # level-0 pixels
    columns, rows = (int((limit + 1e-6) // pixels) for limit, pixels in zip(dimensions, side, strict=True))
    if not columns or not rows:
        raise _Unusable(
            "roi_larger_than_slide",
            f"{size} px at {settings.mpp} mpp are {side[0]:.0f} x {side[1]:.0f} level-0 pixels, the slide has "
            f"{dimensions[0]} x {dimensions[1]}",
        )
    generator = np.random.default_rng([settings.seed, int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)])
    spare = (dimensions[0] - columns * side[0], dimensions[1] - rows * side[1])
    left, top = (int(generator.integers(int(max(0.0, pixels)) + 1)) for pixels in spare)
    # An ROI is one token of this grid: (rows, columns).
    has_tissue = tissue.token_grid(
        slide, size, settings.mpp, left, top, columns * size, rows * size, settings.min_tissue
    )
    corners = [
        (int(left + column * side[0]), int(top + row * side[1]))
        for row, column in generator.permutation(np.argwhere(has_tissue))
    ]
    return corners, int((~has_tissue).sum())


def _check_pixels(slide: Slide, x: int, y: int, settings: PandaSettings) -> None:
    """Reads an ROI once now, rather than to fail hours into a training."""
    try:
        slide.read_region(x, y, settings.roi_size, settings.roi_size, settings.mpp)
    except SlideError as error:
        raise _Unusable("corrupt_slide", error) from error


def _roi(
    slide: PandaSlide,
    number: int,
    place: tuple[int, int, int],
    split_of: dict[str, str],
    settings: PandaSettings,
    panda_dir: str | os.PathLike[str],
) -> Roi:
    x, y, label = place
    return Roi(
        roi_id=f"{slide.image_id}_{number}",
        slide_id=slide.image_id,
        file=slide.slide.relative_to(panda_dir).as_posix(),
        x=x,
        y=y,
        width=settings.roi_size,
        height=settings.roi_size,
        mpp=settings.mpp,
        label=label,
        split=split_of[slide.image_id],
        attributes={"provider": slide.provider, "isup_grade": slide.isup_grade},
    )


def _record_problems(output_dir: Path, problems: Sequence[Problem]) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    write_problems(output_dir, problems)
    for problem in problems:
        logger.warning("%s: %s: %s", problem.kind, problem.item, problem.reason)


def _summary(
    dataset: RoiDataset,
    slides: Sequence[PandaSlide],
    num_used: int,
    outcomes: Counter,
    problems: Sequence[Problem],
    settings: PandaSettings,
) -> dict[str, Any]:
    counts = Counter((roi.split, dataset.label_names[roi.label]) for roi in dataset.rois)
    return {
        "settings": asdict(settings),
        "slides_usable": len(slides),
        "slides_of_the_task": num_used,
        "slides_with_rois": len(set(dataset.slide_ids)),
        "rois": len(dataset),
        "rois_by_split": {split: {name: counts[split, name] for name in dataset.label_names} for split in SPLITS},
        "places": dict(sorted(outcomes.items())),
        "problems": count_problems(problems),
    }
