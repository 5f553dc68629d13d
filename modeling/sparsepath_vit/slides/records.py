# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a slide's file says that it was made of, so that a later run can tell whether it still holds."""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.file_content import content_sample
from .folders import files_of_slide
from .regions import SlideInput


def source_of(item: SlideInput, slide_mpp: float | None, mask_file: str | Path | None) -> dict[str, Any]:
    """What a result depends on beside the settings: the slide's content and what was said of it.

    `place` stands for where the slide lay: a slide that changed there is told from another one of the same name.
    """
    mask = mask_file
    if mask_file not in (None, "all"):
        mask = hashlib.sha256(Path(mask_file).read_bytes()).hexdigest()
    try:
        content = slide_content(item.path)
    except OSError:
        content = None  # what keeps the slide from being read is for the reader to say
    return {
        "file": item.path.name,
        "bytes": item.path.stat().st_size if item.path.exists() else 0,
        "content": content,
        "place": hashlib.sha256(str(item.path.absolute()).encode()).hexdigest()[:16],
        "mpp": item.mpp or slide_mpp,
        "boxes": [[box.x, box.y, box.width, box.height] for box in item.boxes],
        "tissue_mask": mask,
        **_outlines(item),
    }


def _outlines(item: SlideInput) -> dict[str, str]:
    """A hash of the outlines of a slide's regions, where they have any."""
    digest = hashlib.sha256()
    polygons = [box.outline for box in item.boxes if box.outline is not None]
    for polygon in polygons:
        for ring in polygon.rings:
            digest.update(np.ascontiguousarray(ring, dtype=np.float64).tobytes())
    return {"outlines": digest.hexdigest()} if polygons else {}


def slide_content(path: Path) -> str:
    """A sample of the content of all files of a slide, see `content_sample`.

    Raises:
        OSError: one of them cannot be read.
    """
    samples = [content_sample(file) for file in files_of_slide(path)]
    return samples[0] if len(samples) == 1 else hashlib.sha256(" ".join(samples).encode()).hexdigest()


def region_labels(item: SlideInput, left_out: Collection[tuple[int, int, int, int]]) -> list[str] | None:
    """The labels of the regions that are embedded, "" where a region has none; None where none has any.

    Args:
        item: the slide.
        left_out: (x, y, width, height) of the regions that are not.
    """
    if all(box.label is None for box in item.boxes):
        return None
    return [box.label or "" for box in item.boxes if (box.x, box.y, box.width, box.height) not in left_out]
