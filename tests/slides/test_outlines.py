# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
from skimage.draw import polygon2mask

from sparsepath_vit.slides.outlines import outlines


def filled(polygons, shape):
    """The grid back from its polygons: cells whose centre lies in an outer ring and in none of its holes."""
    grid = np.zeros(shape, int)
    for outer, *holes in polygons:
        inside = polygon2mask(shape, outer[:, ::-1] - 0.5)
        for hole in holes:
            inside &= ~polygon2mask(shape, hole[:, ::-1] - 0.5)
        grid += inside
    return grid


GRIDS = {
    "one": ["#"],
    "row": ["###"],
    "ring": ["###", "#.#", "###"],
    "two pieces touching at a corner": ["#.", ".#"],
    "pocket closed by a corner": ["####", "#..#", "##.#", "#.#."],
    "holes touching at corners": ["#####", "#.#.#", "##.##", "#.#.#", "#####"],
    "island in a hole": ["#####", "#...#", "#.#.#", "#...#", "#####"],
    "nothing": ["...", "..."],
}


@pytest.mark.parametrize("name", GRIDS)
def test_polygons_cover_exactly_the_grid(name):
    grid = np.array([[cell == "#" for cell in row] for row in GRIDS[name]])
    polygons = outlines(grid)
    assert (filled(polygons, grid.shape) == grid).all()


def test_pieces_and_holes_are_told_apart():
    counts = {
        name: [len(rings) for rings in outlines(np.array([[cell == "#" for cell in row] for row in rows]))]
        for name, rows in GRIDS.items()
    }
    assert counts["ring"] == [2] and counts["two pieces touching at a corner"] == [1, 1]
    assert counts["island in a hole"] == [2, 1] and counts["nothing"] == []
    assert counts["holes touching at corners"] == [6]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.65, 0.9])
def test_random_grids_come_back_and_rings_are_closed_and_simple(share):
    grid = np.random.default_rng(int(100 * share)).random((40, 50)) < share
    polygons = outlines(grid)
    assert (filled(polygons, grid.shape) == grid).all()
    for rings in polygons:
        for ring in rings:
            assert (ring[0] == ring[-1]).all() and len(ring) >= 5
            assert (np.abs(np.diff(ring, axis=0)) > 0).sum(axis=1).tolist() == [1] * (len(ring) - 1)
            corners = {tuple(point) for point in ring[:-1].tolist()}
            assert len(corners) == len(ring) - 1  # no ring passes a corner twice: the polygon is valid
