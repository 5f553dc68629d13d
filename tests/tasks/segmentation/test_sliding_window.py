# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsepath_vit.tasks.segmentation.sliding_window import WindowGrid, seam_report, sliding_probabilities


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 20), st.integers(0, 20))
def test_windows_cover_the_region_and_stay_inside(window, stride, more_rows, more_columns):
    grid = WindowGrid((window + more_rows, window + more_columns), window, min(stride, window))
    covered = np.zeros(grid.size, int)
    for row, column in grid.windows():
        place = covered[row : row + window, column : column + window]
        assert place.shape == (window, window)
        place += 1
    assert covered.min() >= 1
    assert len(grid) == len(grid.windows()) == len(set(grid.windows()))


def test_strides_as_asked_for():
    grid = WindowGrid((2088, 896), 896, 596)
    assert grid.windows() == [(0, 0), (596, 0), (1192, 0)]
    assert WindowGrid((2000, 896), 896, 596).starts(0) == [0, 596, 1104]


def test_probabilities_are_the_mean_over_windows():
    grid = WindowGrid((5, 7), 4, 2)
    values = {place: float(number + 1) for number, place in enumerate(grid.windows())}

    def predict(row, column):
        return torch.stack([torch.full((4, 4), values[row, column]), torch.full((4, 4), -values[row, column])])

    found = sliding_probabilities(predict, grid, 2)
    for row in range(5):
        for column in range(7):
            held = [v for (top, left), v in values.items() if top <= row < top + 4 and left <= column < left + 4]
            assert found[0, row, column].item() == pytest.approx(np.mean(held))
    assert torch.equal(found[1], -found[0])


def test_a_map_cut_into_windows_is_put_together_again():
    whole = torch.rand(3, 41, 29)
    for stride in (7, 10, 13):
        grid = WindowGrid((41, 29), 13, stride)
        found = sliding_probabilities(lambda row, column: whole[:, row : row + 13, column : column + 13], grid, 3)
        torch.testing.assert_close(found, whole)


def test_seam_band_against_distances():
    grid = WindowGrid((30, 24), 12, 9)
    rows, columns = {9, 12, 18, 21}, {9, 12, 21}
    assert grid.starts(0) == [0, 9, 18] and grid.starts(1) == [0, 9, 12]
    band = grid.seam_band(2)
    for row in range(30):
        for column in range(24):
            # a pixel's distance to an edge between two pixels, of its nearer side
            near = any(edge - 2 <= row < edge + 2 for edge in rows)
            near |= any(edge - 2 <= column < edge + 2 for edge in columns)
            assert band[row, column] == near
    assert not WindowGrid((12, 12), 12, 12).seam_band(3).any()


def test_report_tells_the_band_from_elsewhere():
    grid = WindowGrid((20, 40), 20, 20)
    whole = np.zeros((1, 20, 40))
    whole[0, 5:15] = 0.9
    sliding = whole.copy()
    sliding[0, 5:15, 18:22] = 0.1  # only at the seam
    report = seam_report(whole, sliding, grid, 4)
    assert report["num_windows"] == 2 and report["seam_band"]["pixels"] == 20 * 8
    assert report["seam_band"]["mask_agreement"] == pytest.approx(1 - 40 / 160)
    assert report["seam_band"]["dice"] == pytest.approx(2 * 40 / (80 + 40))
    assert report["seam_band"]["mean_absolute_difference"] == pytest.approx(0.8 * 40 / 160)
    assert report["elsewhere"] == {
        "pixels": 20 * 32, "mask_agreement": 1.0, "dice": 1.0, "mean_absolute_difference": 0.0,
    }  # fmt: skip
    assert report["all"]["mask_agreement"] == pytest.approx(1 - 40 / 800)


def test_one_window_has_no_seam():
    report = seam_report(np.zeros((1, 8, 8)), np.zeros((1, 8, 8)), WindowGrid((8, 8), 8, 4), 2)
    assert report["seam_band"] == {"pixels": 0, "mask_agreement": None, "dice": None, "mean_absolute_difference": None}


@pytest.mark.parametrize(
    ("size", "window", "stride", "message"),
    [
        ((300, 1000), 896, 596, r"1000 x 300 px .*smaller than a window of 896 px.*at most 300 px"),
        ((1, 1000), 896, 596, r"1000 x 1 px"),
        ((1000, 1000), 896, 900, r"window=896, stride=900.*gaps"),
        ((1000, 1000), 896, 0, r"stride=0"),
    ],
)
def test_impossible_windows_are_refused(size, window, stride, message):
    with pytest.raises(ValueError, match=message):
        WindowGrid(size, window, stride)


def test_what_does_not_fit_is_refused():
    grid = WindowGrid((8, 8), 4, 4)
    with pytest.raises(ValueError, match=r"gave \(1, 4, 5\): expected \(1, 4, 4\)"):
        sliding_probabilities(lambda row, column: torch.zeros(1, 4, 5), grid, 1)
    with pytest.raises(ValueError, match="both take"):
        seam_report(np.zeros((1, 8, 8)), np.zeros((1, 8, 9)), grid)
    with pytest.raises(ValueError, match="0 px wide"):
        grid.seam_band(0)
