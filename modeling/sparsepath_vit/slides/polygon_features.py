# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A polygon on a slide that is embedded: the mean of its tokens, its tissue, and the annotation that QuPath opens."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .embedded_slide import EmbeddedSlide
from .errors import SlideError
from .outlines import annotation, fill

POLYGON_COLOR = (214, 69, 65)
_SQUARE_MICROMETRES = 1e6  # of a square millimetre


@dataclass(frozen=True)
class PolygonFeatures:
    """What lies in a polygon.

    Attributes:
        ring: (points, 2) x and y in level-0 pixels.
        pooled: (channels,) float32, the mean of its kept tokens, each counted for as many as it stands for.
        num_kept: how many kept tokens have their centre in it; those of regions that overlap count in each.
        tissue_area: square millimetres of the tissue tokens with their centre in it, each place once.
        area: square millimetres of the polygon.
    """

    ring: np.ndarray
    pooled: np.ndarray
    num_kept: int
    tissue_area: float
    area: float

    def annotation(self, name: str, zero: tuple[int, int] = (0, 0)) -> dict[str, Any]:
        """The polygon as a GeoJSON feature that QuPath imports as an annotation.

        Args:
            name: of its class.
            zero: the level-0 pixel (x, y) that its coordinates count from: the corner of `Slide.frame`.
        """
        closed = np.concatenate([self.ring, self.ring[:1]])
        measurements = {
            "tissue area mm^2": self.tissue_area,
            "area mm^2": self.area,
            "kept tokens": self.num_kept,
        }
        origin = (-zero[0], -zero[1])
        return annotation([[closed]], name, POLYGON_COLOR, measurements, origin, kind="Polygon")


def pool_polygon(slide: EmbeddedSlide, ring: np.ndarray) -> PolygonFeatures:
    """What lies in a polygon of an embedded slide.

    Args:
        slide: the slide.
        ring: (points, 2) x and y in level-0 pixels; the last point need not be the first again.

    Raises:
        SlideError: it has fewer than three points, or no kept token in it.
    """
    ring = np.asarray(ring, dtype=float)
    if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < 3 or not np.isfinite(ring).all():
        raise SlideError(f"an array of shape {ring.shape} is no polygon: at least three points (x, y) are.")
    kept = np.flatnonzero(_inside(slide, ring, slide.kept)[0])
    if not len(kept):
        raise SlideError("no kept token has its centre in the polygon: draw it larger, or on tissue.")
    weights = slide.weights[kept].astype(np.float64)
    total = np.zeros(slide.features.shape[1])
    for start in range(0, len(kept), 4096):
        part = slice(start, start + 4096)
        total += weights[part] @ slide.features.rows(kept[part])
    is_tissue, cells = _inside(slide, ring, slide.tissue)
    tokens = len(np.unique(cells[is_tissue], axis=0))
    pixel_area = slide.mpp[0] * slide.mpp[1] / _SQUARE_MICROMETRES
    return PolygonFeatures(
        ring=ring,
        pooled=(total / weights.sum()).astype(np.float32),
        num_kept=len(kept),
        tissue_area=tokens * slide.token_size[0] * slide.token_size[1] * pixel_area,
        area=_area(ring) * pixel_area,
    )


def features_table(polygons: Sequence[PolygonFeatures]) -> str:
    """Polygons as CSV: number from 1, areas, tokens, and the mean feature, one column a channel."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    channels = len(polygons[0].pooled) if polygons else 0
    header = ["polygon", "tissue_area_mm2", "area_mm2", "kept_tokens"]
    writer.writerow([*header, *(f"feature_{channel}" for channel in range(channels))])
    for number, polygon in enumerate(polygons, start=1):
        measured = [number, polygon.tissue_area, polygon.area, polygon.num_kept]
        writer.writerow([*measured, *(f"{value:.6g}" for value in polygon.pooled.tolist())])
    return text.getvalue()


def _inside(slide: EmbeddedSlide, ring: np.ndarray, corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens have their centre in a ring, (N,) bool; and their (column, row) on the slide's lattice, (N, 2)."""
    size = np.asarray(slide.token_size)
    origin = slide.tissue.min(axis=0)
    cells = np.rint((corners - origin) / size).astype(int)
    on_lattice = (ring - origin) / size
    first = np.floor(on_lattice.min(axis=0)).astype(int)
    last = np.ceil(on_lattice.max(axis=0)).astype(int)
    low, high = np.maximum(first, cells.min(axis=0)), np.minimum(last, cells.max(axis=0) + 1)
    is_inside = np.zeros(len(cells), dtype=bool)
    if (high <= low).any():
        return is_inside, cells
    grid = np.zeros((high - low)[::-1], dtype=bool)
    fill(grid, [on_lattice - low])
    near = ((cells >= low) & (cells < high)).all(axis=1)
    column, row = (cells[near] - low).T
    is_inside[near] = grid[row, column]
    return is_inside, cells


def _area(ring: np.ndarray) -> float:
    """In square units of its coordinates, whichever way round it runs."""
    x, y = ring.T
    return float(abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2)
