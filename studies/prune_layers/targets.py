# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Images whose tokens are labelled: 1 for what pruning is to keep, 0 for the rest."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..against_tiles.datasets import TokenImage, cells_of_three_kinds, nuclei
from ..regions import osteosarcoma_files
from ..tiny_evidence.evidence import region_and_tissue

OSTEOSARCOMA_MPP = 1.0  # 10x
SMALLEST_SHARE = 0.02  # of either kind of token, below which an image says nothing
_TUMOUR, _STROMA = 1, 2  # of BRCA-M2C


def tissue(data_dir: Path, patch_size: int) -> Iterator[TokenImage]:
    """Osteosarcoma regions: tokens of tissue, and of glass."""
    for path in osteosarcoma_files(data_dir):
        pixels, mask = region_and_tissue(path, OSTEOSARCOMA_MPP, patch_size)
        if SMALLEST_SHARE <= mask.mean() <= 1 - SMALLEST_SHARE:
            rows, columns = np.indices(mask.shape).reshape(2, -1)
            yield TokenImage(path.stem, pixels, rows, columns, mask.ravel().astype(np.int64))


def tumour_cells(data_dir: Path, patch_size: int) -> Iterator[TokenImage]:
    """BRCA-M2C: tokens with tumour or epithelial cells, and with stromal cells."""
    for image in cells_of_three_kinds(data_dir, patch_size):
        chosen = (image.labels == _TUMOUR) | (image.labels == _STROMA)
        labels = (image.labels[chosen] == _TUMOUR).astype(np.int64)
        if 0 < labels.sum() < len(labels):
            yield replace(image, rows=image.rows[chosen], columns=image.columns[chosen], labels=labels)


TARGETS = {"tissue": tissue, "nuclei": nuclei, "tumour cells": tumour_cells}
