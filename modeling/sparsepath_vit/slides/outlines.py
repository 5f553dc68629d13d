# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Boolean grids as polygons (exact outlines, with holes, nothing smoothed) and back, and polygons for QuPath."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..runtime.extras import require

Ring = np.ndarray  # (points, 2) column and row of token corners, closed: the first point is also the last
_MOST_CROSSINGS = 2**18  # of edges and rows, held at once while a ring is filled


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


def fill(grid: np.ndarray, rings: Sequence[Ring], value: bool = True) -> None:
    """Sets the cells whose centre lies in a polygon: in its outline, and in none of its holes.

    What lies inside a ring is decided by the even-odd rule, the ring taken as closed. Time grows with the vertices and
    the rows that their edges span, memory with the polygon's box.

    Args:
        grid: (rows, columns) bool, written to; what reaches beyond it is cut off.
        rings: (points, 2) column and row of corners, any finite numbers: the outline, then the holes.
        value: what the cells are set to.
    """
    outline, *holes = rings
    place, inside = _inside(outline, grid.shape)
    top, left = (side.start for side in place)
    for hole in holes:
        hole_place, in_hole = _inside(hole - np.array([left, top]), inside.shape)
        inside[hole_place] &= ~in_hole
    grid[place][inside] = value


def _inside(ring: Ring, shape: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray]:
    """The part of a grid of `shape` that holds a ring, and which of its cells have their centre in the ring."""
    limits = np.array(shape[::-1])  # columns, rows
    # The first cell whose centre lies at or behind a corner is number ceil(corner - 0.5).
    first, last = (np.clip(np.ceil(end - 0.5), 0, limits).astype(int) for end in (ring.min(axis=0), ring.max(axis=0)))
    place = (slice(first[1], last[1]), slice(first[0], last[0]))
    columns, rows = last - first
    parity = np.zeros((rows, columns + 1), dtype=np.uint8)  # crossings, modulo 256
    starts, ends = ring, np.roll(ring, -1, axis=0)
    bounds = np.clip(np.ceil(np.stack([starts[:, 1], ends[:, 1]]) - 0.5), first[1], last[1]).astype(int)
    top, bottom = bounds.min(axis=0), bounds.max(axis=0)  # an edge crosses the centres of rows top .. bottom - 1
    crossing = np.flatnonzero(bottom > top)
    parts = np.cumsum(bottom[crossing] - top[crossing]) // _MOST_CROSSINGS
    for edges in np.split(crossing, np.flatnonzero(np.diff(parts)) + 1):
        counts = bottom[edges] - top[edges]
        edge = np.repeat(edges, counts)
        row = top[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
        (x, y), (end_x, end_y) = starts[edge].T, ends[edge].T
        crossed = x + (row + 0.5 - y) / (end_y - y) * (end_x - x)
        column = np.clip(np.ceil(crossed - 0.5), first[0], last[0]).astype(int)
        # All cells from the crossing on change sides.
        np.add.at(parity, (row - first[1], column - first[0]), np.uint8(1))
    return place, np.add.accumulate(parity, axis=1, dtype=np.uint8)[:, :columns] % 2 == 1


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
