# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The twelve tissue regions on which attention patterns are compared, as squares of any size."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SLIDES = ("OS-1_1101x1101.png", "cmu1_1568x2912.jpg", "tcga_cr7395_2016x3360.jpg")
CLASSES = ("non_tumor", "non_viable_tumor", "viable_tumor")
REGIONS_OF_A_CLASS = 3


def twelve_regions(folder: Path) -> Iterator[Path]:
    """Three regions of slides and nine of osteosarcoma.

    Args:
        folder: with rois/ and classification/.

    Raises:
        ValueError: there are too few osteosarcoma regions.
    """
    yield from (folder / "rois" / name for name in SLIDES)
    for label in CLASSES:
        files = sorted((folder / "classification" / "osteosarcoma_roi" / label).glob("*.jpg"))
        if len(files) < REGIONS_OF_A_CLASS:
            raise ValueError(f"expected {REGIONS_OF_A_CLASS} regions of {label}, found {len(files)} in {folder}.")
        yield from files[:REGIONS_OF_A_CLASS]


def spread_order(number: int) -> list[int]:
    """Indices of the regions such that the first ones are of all slides and classes."""
    return sorted(range(number), key=lambda index: index % REGIONS_OF_A_CLASS)


def square(path: Path, size: int) -> np.ndarray:
    """(size, size, 3) uint8, the largest square around the centre, resized."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
