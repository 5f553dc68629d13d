# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Tissue regions of several studies: osteosarcoma with their classes, and twelve as squares of any size."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

OSTEOSARCOMA = Path("classification/osteosarcoma_roi")
SLIDES = ("OS-1_1101x1101.png", "cmu1_1568x2912.jpg", "tcga_cr7395_2016x3360.jpg")
CLASSES = ("non_tumor", "non_viable_tumor", "viable_tumor")
REGIONS_OF_A_CLASS = 3


def osteosarcoma_files(data_dir: Path) -> list[Path]:
    """All osteosarcoma regions, sorted; the folder is the label.

    Raises:
        ValueError: there are none.
    """
    files = sorted((data_dir / OSTEOSARCOMA).glob("*/*.jpg"))
    if not files:
        raise ValueError(f"--data-dir {data_dir} holds no {OSTEOSARCOMA}/*/*.jpg.")
    return files


def osteosarcoma_regions(data_dir: Path) -> tuple[list[Path], np.ndarray, list[str]]:
    """Files of the regions, their class indices, and the block of tissue that each was cut from.

    Raises:
        ValueError: there are none.
    """
    files = osteosarcoma_files(data_dir)
    names = class_names(files)
    # Case-3-A15-2939-11262_112.jpg: before two coordinates and a number
    blocks = [path.stem.rsplit("_", 1)[0].rsplit("-", 2)[0] for path in files]
    return files, np.array([names.index(path.parent.name) for path in files]), blocks


def class_names(files: Sequence[Path]) -> list[str]:
    """The classes of files that lie in folders named after them, in the order of their indices."""
    return sorted({path.parent.name for path in files})


def twelve_regions(folder: Path) -> Iterator[Path]:
    """Three regions of slides and nine of osteosarcoma.

    Args:
        folder: with rois/ and classification/.

    Raises:
        ValueError: there are too few osteosarcoma regions.
    """
    yield from (folder / "rois" / name for name in SLIDES)
    for label in CLASSES:
        files = sorted((folder / OSTEOSARCOMA / label).glob("*.jpg"))
        if len(files) < REGIONS_OF_A_CLASS:
            raise ValueError(f"expected {REGIONS_OF_A_CLASS} regions of {label}, found {len(files)} in {folder}.")
        yield from files[:REGIONS_OF_A_CLASS]


def spread_order(number: int) -> list[int]:
    """Indices of the regions such that the first ones are of all slides and classes."""
    return sorted(range(number), key=lambda index: index % REGIONS_OF_A_CLASS)


def shorter_side(path: Path) -> int:
    """Pixels of an image's shorter side, read from its header."""
    with Image.open(path) as opened:
        return min(opened.size)


def square(path: Path, size: int) -> np.ndarray:
    """(size, size, 3) uint8, the largest square around the centre, resized."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
