# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Where the users' viewer puts (0, 0): at the scanned area, as QuPath does, or at the corner of the file's level 0.

Files of some scanners (MRXS, SCN) have a level 0 far larger than what was scanned, and state the scanned area, which
OpenSlide calls its bounds. QuPath shows that area only: its annotations, and what it imports, count from there.
OpenSlide, and toolkits that read with it such as TRIDENT, count from the corner of level 0.
"""

import logging
from pathlib import Path

from .description import describe
from .errors import SlideError

logger = logging.getLogger(__name__)

ORIGINS = ("bounds", "slide")

Frame = tuple[int, int, int, int]  # (x, y, width, height) in level-0 pixels


def checked_origin(origin: str) -> str:
    """`origin` itself. Raises SlideError where it is none of `ORIGINS`."""
    if origin not in ORIGINS:
        raise SlideError(
            f"origin={origin!r} is unknown: 'bounds' counts coordinates from the scanned area, as QuPath does, 'slide' "
            "from the corner of level 0, as OpenSlide does."
        )
    return origin


def scanned_area(path: Path, dimensions: tuple[int, int]) -> Frame | None:
    """The area that the file says was scanned.

    Args:
        path: the slide file.
        dimensions: (width, height) of its level 0.

    Returns:
        (x, y, width, height) in level-0 pixels; None where it is not stated, is all of level 0, or is no part of it.
    """
    bounds = describe(path).bounds
    if bounds is None or bounds == (0, 0, *dimensions):
        return None
    x, y, width, height = bounds
    if min(x, y) < 0 or min(width, height) < 1 or x >= dimensions[0] or y >= dimensions[1]:
        logger.warning(
            "%s states a scanned area of x=%d, y=%d, width=%d, height=%d, which is no part of its %d x %d pixels: "
            "it is not used.",
            path, *bounds, *dimensions,
        )  # fmt: skip
        return None
    return bounds


def viewer_frame(path: Path, dimensions: tuple[int, int], origin: str) -> Frame:
    """What the users' viewer shows as the slide, by the rule `origin`; one line is logged where the rules differ.

    Args:
        path: the slide file.
        dimensions: (width, height) of its level 0.
        origin: one of `ORIGINS`.

    Returns:
        (x, y, width, height) in level-0 pixels; annotations, manifests and results count from (x, y).
    """
    whole = (0, 0, *dimensions)
    area = scanned_area(path, dimensions)
    if area is None:
        return whole
    if origin == "bounds":
        logger.warning(
            "%s was scanned at x=%d, y=%d, width=%d, height=%d of its level 0 (openslide.bounds). Coordinates of "
            "annotations, manifests and results count from there, as in QuPath; --origin slide counts from the corner "
            "of level 0, as OpenSlide does.",
            path, *area,
        )  # fmt: skip
        return area
    logger.warning(
        "%s was scanned at x=%d, y=%d of its level 0 (openslide.bounds). Coordinates count from the corner of level 0, "
        "as --origin slide says; QuPath shows them shifted by so much.",
        path, *area[:2],
    )  # fmt: skip
    return whole
