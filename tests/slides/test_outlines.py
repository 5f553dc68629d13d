# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
from skimage.draw import polygon2mask

from sparsepath_vit.slides import outlines as outlines_module
from sparsepath_vit.slides.outlines import fill, outlines


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


@pytest.mark.parametrize("name", GRIDS)
def test_filling_undoes_outlining(name):
    grid = np.array([[cell == "#" for cell in row] for row in GRIDS[name]])
    again = np.zeros_like(grid)
    for polygon in outlines(grid):
        fill(again, polygon)
    assert (again == grid).all()


@pytest.mark.parametrize("most", [2**18, 7])
def test_filling_takes_the_cells_whose_centre_lies_inside(monkeypatch, most):
    """Against a loop over cells and edges, with corners anywhere, beyond the grid, too."""
    monkeypatch.setattr(outlines_module, "_MOST_CROSSINGS", most)
    generator = np.random.default_rng(0)

    def holds(ring, x, y):
        sides = zip(ring.tolist(), np.roll(ring, -1, axis=0).tolist(), strict=True)
        return (
            sum((y0 > y) != (y1 > y) and x < x0 + (y - y0) / (y1 - y0) * (x1 - x0) for (x0, y0), (x1, y1) in sides) % 2
        )

    for _ in range(20):
        rings = [generator.uniform(-6, 26, (count, 2)) for count in (9, 5, 4)]
        grid = generator.random((17, 21)) < 0.3
        expected = grid.copy()
        for row, column in np.ndindex(grid.shape):
            outer, *holes = (holds(ring, column + 0.5, row + 0.5) for ring in rings)
            expected[row, column] |= bool(outer and not any(holes))
        fill(grid, rings)
        assert (grid == expected).all()
        fill(grid, rings[:1], False)
        assert not any(
            grid[row, column] for row, column in np.ndindex(grid.shape) if holds(rings[0], column + 0.5, row + 0.5)
        )


def test_filling_far_away_or_nothing_changes_nothing():
    grid = np.zeros((5, 6), bool)
    for corner in ([1e12, 1e12], [-1e30, 2.0]):
        fill(grid, [np.array([[0, 0], [3, 0], [3, 3]]) + corner])
    fill(grid, [np.array([[2.0, 2.0]])])
    assert not grid.any()
