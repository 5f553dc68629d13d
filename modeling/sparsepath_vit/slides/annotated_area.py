# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Which pixels of a grid lie in the annotations of a file."""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from .annotations import Annotations
from .outlines import fill

_SECONDS_UNTIL_PROGRESS = 3


def fill_annotated(
    grid: np.ndarray,
    annotations: Annotations,
    classes: Sequence[str],
    corner: tuple[float, float],
    scale: tuple[float, float],
    name: str,
) -> None:
    """Sets the cells whose centre lies in a polygon that is taken; what is cut out is cleared in the end.

    Args:
        grid: (rows, columns) bool, written to.
        annotations: of the file.
        classes: see `Annotations.taken`.
        corner: x and y of the grid's corner, as the polygons count.
        scale: width and height of a cell, likewise.
        name: of the file, for the progress bar.

    Raises:
        ValueError: see `Annotations.taken`.
    """
    for polygons, value in ((annotations.taken(classes), True), (annotations.cut_out(classes), False)):
        for polygon in tqdm(polygons, desc=name, unit="polygon", leave=False, delay=_SECONDS_UNTIL_PROGRESS):
            fill(grid, [(ring - corner) / scale for ring in polygon.rings], value)
