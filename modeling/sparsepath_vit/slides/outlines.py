# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Boolean grids as polygons (exact outlines, with holes, nothing smoothed), and polygons as QuPath reads them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..runtime.extras import require

Ring = np.ndarray  # (points, 2) column and row of token corners, closed: the first point is also the last


def outlines(grid: np.ndarray) -> list[list[Ring]]:
    """The outline of every connected piece of a grid.

    Args:
        grid: (rows, columns) bool.

    Returns:
        Per piece its outer ring, then its holes. Pieces connect along token edges; two that touch at a corner only
        are two polygons, so that all are valid.
    """
    pieces = require("skimage.measure").label(grid, connectivity=1)
    polygons = []
    for number, bounds in enumerate(require("scipy.ndimage").find_objects(pieces), start=1):
        top, left = (side.start for side in bounds)
        rings = [ring + np.array([left, top]) for ring in _rings(pieces[bounds] == number)]
        # The outer ring runs clockwise and so has positive area where y points down; holes run the other way.
        polygons.append(sorted(rings, key=_area, reverse=True))
    return polygons


def annotation(
    polygons: Sequence[Sequence[Ring]],
    name: str,
    color: Sequence[int],
    measurements: Mapping[str, float],
    origin: Sequence[float] = (0.0, 0.0),
    scale: Sequence[float] = (1.0, 1.0),
    kind: str = "MultiPolygon",
) -> dict[str, Any]:
    """Polygons of one class as a GeoJSON feature that QuPath imports as an annotation.

    Args:
        polygons: per piece its outer ring, then its holes; see `outlines`.
        name: of the class.
        color: red, green and blue of the class.
        measurements: numbers that QuPath lists beside it.
        origin: (x, y) of the grid's top left corner in level-0 pixels.
        scale: level-0 pixels per cell of the grid along x and y.
        kind: "MultiPolygon", or "Polygon" for the only one.
    """
    coordinates = [
        [np.round(np.asarray(origin) + ring * np.asarray(scale), 2).tolist() for ring in rings] for rings in polygons
    ]
    return {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": coordinates[0] if kind == "Polygon" else coordinates},
        "properties": {
            "objectType": "annotation",
            "name": name,
            "classification": {"name": name, "color": list(color)},
            "measurements": dict(measurements),
        },
    }


def feature_collection(features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Features as one GeoJSON object."""
    return {"type": "FeatureCollection", "features": list(features)}


def _rings(piece: np.ndarray) -> list[Ring]:
    """Boundary rings of one connected piece, the piece on their right hand."""
    padded = np.pad(piece, 1)
    inside = padded[1:-1, 1:-1]
    edges: dict[tuple[int, int], list[tuple[int, int]]] = {}  # corner -> the corners its edges lead to
    for shift, start, end in (
        ((0, 1), (0, 0), (1, 0)),  # no token above: along its top edge to the right; corners are (column, row)
        ((1, 2), (1, 0), (1, 1)),
        ((2, 1), (1, 1), (0, 1)),
        ((1, 0), (0, 1), (0, 0)),
    ):
        neighbour = padded[shift[0] : shift[0] + piece.shape[0], shift[1] : shift[1] + piece.shape[1]]
        for row, column in np.argwhere(inside & ~neighbour).tolist():
            corner = (column + start[0], row + start[1])
            edges.setdefault(corner, []).append((column + end[0], row + end[1]))
    rings = []
    while edges:
        rings.append(_trace(edges))
    return rings


def _trace(edges: dict[tuple[int, int], list[tuple[int, int]]]) -> Ring:
    """Takes one ring out of the edges; where two leave a corner, the left one, which keeps holes apart."""
    corner, (following, *_) = next(iter(edges.items()))
    first_edge = (corner, following)
    direction = (0, 0)
    points = []

    def turn(end: tuple[int, int]) -> int:  # negative to the left
        return direction[0] * (end[1] - corner[1]) - direction[1] * (end[0] - corner[0])

    while True:
        step = (following[0] - corner[0], following[1] - corner[1])
        if step != direction:
            points.append(corner)
        edges[corner].remove(following)
        if not edges[corner]:
            del edges[corner]
        direction, corner = step, following
        # The first edge was taken out already, but whether it follows here decides where the ring closes.
        leaving = edges.get(corner, []) + [first_edge[1]] * (corner == first_edge[0])
        following = min(leaving, key=turn)
        if (corner, following) == first_edge:
            return np.asarray([*points, points[0]])


def _area(ring: Ring) -> float:
    x, y = ring.T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() / 2)
