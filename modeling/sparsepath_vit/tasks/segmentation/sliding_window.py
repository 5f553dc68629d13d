# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Segmentation window by window, and how it differs from the whole region where windows meet."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

SEAM_BAND = 32  # pixels on either side of a window's edge


@dataclass(frozen=True)
class WindowGrid:
    """Square windows that cover a region, those at the right and bottom moved back inside.

    Args:
        size: (height, width) of the region in pixels.
        window: side of a window in pixels.
        stride: pixels from one window to the next.

    Raises:
        ValueError: the region is smaller than a window, or the stride leaves gaps.
    """

    size: tuple[int, int]
    window: int
    stride: int

    def __post_init__(self) -> None:
        height, width = self.size
        if self.window < 1 or not 1 <= self.stride <= self.window:
            raise ValueError(
                f"window={self.window}, stride={self.stride}: both are pixels, at least 1, and a stride above the "
                "window would leave gaps."
            )
        if min(height, width) < self.window:
            raise ValueError(
                f"the region is {width} x {height} px (width x height), smaller than a window of {self.window} px: "
                f"pass a window of at most {min(height, width)} px, or none, to segment it as a whole."
            )

    def starts(self, axis: int) -> list[int]:
        """First pixels of the windows along one axis (0 rows, 1 columns)."""
        last = self.size[axis] - self.window
        return [*range(0, last, self.stride), last]

    def __len__(self) -> int:
        return len(self.starts(0)) * len(self.starts(1))

    def windows(self) -> list[tuple[int, int]]:
        """(row, column) of the first pixel of every window, row by row."""
        return list(itertools.product(self.starts(0), self.starts(1)))

    def seam_band(self, width: int = SEAM_BAND) -> np.ndarray:
        """(height, region width) bool: pixels at most `width` px away from a window's edge inside the region.

        Raises:
            ValueError: a band without pixels.
        """
        if width < 1:
            raise ValueError(f"the seam band is {width} px wide: it takes at least 1.")
        near = [np.zeros(side, dtype=bool) for side in self.size]
        for axis, length in enumerate(self.size):
            edges = {edge for start in self.starts(axis) for edge in (start, start + self.window)} - {0, length}
            for edge in edges:
                near[axis][max(0, edge - width) : edge + width] = True
        return near[0][:, None] | near[1][None]


def sliding_probabilities(
    predict: Callable[[int, int], torch.Tensor], grid: WindowGrid, num_labels: int, show_progress: bool = False
) -> torch.Tensor:
    """The mean, at each pixel, of the probabilities of all windows that hold it.

    Args:
        predict: takes (row, column) of a window's first pixel; returns (labels, window, window) probabilities.
        grid: the windows.
        num_labels: how many labels `predict` returns.
        show_progress: whether to show a progress bar.

    Returns:
        (num_labels, height, width) float32 on the CPU; memory does not grow with the number of windows.

    Raises:
        ValueError: a prediction of another shape.
    """
    sums, counts = torch.zeros(num_labels, *grid.size), torch.zeros(grid.size)
    expected = (num_labels, grid.window, grid.window)
    for row, column in tqdm(grid.windows(), desc="windows", disable=not show_progress):
        probabilities = predict(row, column).float().cpu()
        if tuple(probabilities.shape) != expected:
            raise ValueError(f"the window at {row, column} gave {tuple(probabilities.shape)}: expected {expected}.")
        place = np.s_[row : row + grid.window, column : column + grid.window]
        sums[:, *place] += probabilities
        counts[place] += 1
    return sums / counts


def seam_report(whole: np.ndarray, sliding: np.ndarray, grid: WindowGrid, width: int = SEAM_BAND) -> dict[str, Any]:
    """How much the two ways disagree, in the band around the windows' edges and away from it.

    Args:
        whole: (labels, height, width) probabilities of the region segmented as a whole.
        sliding: the same window by window.
        grid: the windows.
        width: of the band on either side of an edge, in pixels.

    Returns:
        The windows, and for "seam_band", "elsewhere" and "all": the number of pixels, the share of them on whose mask
        (probability at least 0.5) both agree, Dice of the two masks (1 where both are empty), and the mean absolute
        difference of the probabilities. Shares and Dice are over all labels; None where there are no pixels.

    Raises:
        ValueError: maps of different sizes, or not of the grid's.
    """
    if whole.shape != sliding.shape or whole.shape[1:] != grid.size:
        raise ValueError(f"the maps are {whole.shape} and {sliding.shape}: both take (labels, {grid.size}).")
    band = grid.seam_band(width)
    difference, masks = np.abs(whole - sliding), (whole >= 0.5, sliding >= 0.5)
    regions = {"seam_band": band, "elsewhere": ~band, "all": np.ones(grid.size, dtype=bool)}
    report: dict[str, Any] = {
        "window": grid.window,
        "stride": grid.stride,
        "num_windows": len(grid),
        "seam_band_px": width,
    }
    for name, pixels in regions.items():
        one, other = (mask[:, pixels] for mask in masks)
        total, is_some = one.sum() + other.sum(), one.size > 0
        report[name] = {
            "pixels": int(pixels.sum()),
            "mask_agreement": float((one == other).mean()) if is_some else None,
            "dice": (float(2 * (one & other).sum() / total) if total else 1.0) if is_some else None,
            "mean_absolute_difference": float(difference[:, pixels].mean()) if is_some else None,
        }
    return report
