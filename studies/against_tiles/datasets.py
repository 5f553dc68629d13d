# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The images of both questions: labelled regions, and images whose tokens are labelled."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

POINTS = Path("segmentation/brca_m2c_points")
NUCLEI = Path("segmentation/tnbc_nuclei")
NUCLEUS_SHARE = 0.5  # of a patch's pixels, from which the token is one of a nucleus

NUCLEUS_TOKENS = 400  # of an image; of its 1,296 neighbours are alike, and probes take long


@dataclass(frozen=True)
class TokenImage:
    """An image with labels of some of its tokens.

    Attributes:
        name: of the image.
        image: (height, width, 3) uint8.
        rows, columns: (labels,) int64, places of the labelled tokens.
        labels: (labels,) int64.
    """

    name: str
    image: np.ndarray
    rows: np.ndarray
    columns: np.ndarray
    labels: np.ndarray


def resized(path: Path, size: int) -> np.ndarray:
    """(size, size, 3) uint8."""
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def cells_of_three_kinds(data_dir: Path, patch_size: int) -> Iterator[TokenImage]:
    """BRCA-M2C: points on lymphocytes, tumour or epithelial and stromal cells; the token that holds one has its label.

    A token with points of two kinds has no label, nor has one that the image's edge cuts.
    """
    for path in sorted((data_dir / POINTS / "images").glob("*.png")):
        (points,) = (data_dir / POINTS / "labels").glob(f"{path.stem}*.txt")
        y, x, kinds = np.loadtxt(points, dtype=np.int64, ndmin=2).T
        with Image.open(path) as opened:
            image = np.asarray(opened.convert("RGB"))
        of_token: dict[tuple[int, int], set[int]] = {}
        whole = [side // patch_size for side in image.shape[:2]]
        for place in zip((y // patch_size).tolist(), (x // patch_size).tolist(), (kinds - 1).tolist(), strict=True):
            of_token.setdefault(place[:2], set()).add(place[2])
        places = [
            (*place, *kind)
            for place, kind in of_token.items()
            if len(kind) == 1 and place[0] < whole[0] and place[1] < whole[1]
        ]
        yield TokenImage(path.stem, image, *np.array(places, dtype=np.int64).T)


def nuclei(data_dir: Path, patch_size: int) -> Iterator[TokenImage]:
    """TNBC, images that were not warped: tokens drawn at random, 1 where at least half of the patch is nucleus."""
    generator = np.random.default_rng(0)
    for path in sorted((data_dir / NUCLEI).glob("*_HE.png")):
        if "warped" in path.stem:
            continue
        with Image.open(path) as opened:
            image = np.asarray(opened.convert("RGB"))
        with Image.open(path.with_name(path.name.replace("_HE", "_mask"))) as opened:
            mask = np.asarray(opened.convert("L")) > 0
        rows, columns = (side // patch_size for side in mask.shape)
        patches = mask[: rows * patch_size, : columns * patch_size].reshape(rows, patch_size, columns, patch_size)
        labels = (patches.mean(axis=(1, 3)) >= NUCLEUS_SHARE).astype(np.int64)
        drawn = np.sort(generator.permutation(labels.size)[:NUCLEUS_TOKENS])
        yield TokenImage(path.stem, image, *np.unravel_index(drawn, labels.shape), labels.ravel()[drawn])


TOKEN_DATASETS = {"BRCA-M2C, three kinds of cells": cells_of_three_kinds, "TNBC, nuclei": nuclei}
