# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Label masks stored as slides: one class index per pixel, in the red channel of a pyramidal TIFF."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from ...slides.backends import SlideError, open_backend

_CACHE_BYTES = 16 * 2**20
_BAND_PIXELS = 8 * 2**20


class LabelMaskError(SlideError):
    """A mask is missing, damaged, or not as its table of labels says."""


class LabelOutsideTable(LabelMaskError):
    """A mask has a label that its table does not know."""


class LabelMask:
    """An open label mask. Pixels are never resampled: a mean of two labels is a third.

    Args:
        path: the mask file.
        label_names: by label, 0 first.

    Raises:
        LabelMaskError: the file is missing or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], label_names: Sequence[str]) -> None:
        self.path = Path(path)
        self.label_names = tuple(label_names)
        try:
            self._backend = open_backend(self.path, _CACHE_BYTES)
        except SlideError as error:
            raise LabelMaskError(str(error)) from error

    def __enter__(self) -> "LabelMask":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._backend.close()

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of every level in pixels, finest first."""
        return self._backend.level_dimensions

    def coarse(self, max_downsample: float = 16.5) -> np.ndarray:
        """The coarsest level that is reduced by no more than `max_downsample`, (rows, columns) uint8.

        Raises:
            LabelMaskError: pixels that cannot be decoded, or a label outside `label_names`.
        """
        width = self.levels[0][0]
        level = max(index for index, size in enumerate(self.levels) if width / size[0] <= max_downsample)
        return np.concatenate(list(self._bands(level, 0, 0, *self.levels[level])))

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """The labels of a rectangle of level-0 pixels inside the mask, (height, width) uint8. Raises as `coarse`."""
        return np.concatenate(list(self._bands(0, x, y, width, height)))

    def areas(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """(labels,) int64: how many level-0 pixels of the rectangle have each label. Raises as `coarse`."""
        counts = np.zeros(len(self.label_names), dtype=np.int64)
        for band in self._bands(0, x, y, width, height):
            counts += np.bincount(band.ravel(), minlength=len(counts))
        return counts

    def _bands(self, level: int, x: int, y: int, width: int, height: int) -> Iterator[np.ndarray]:
        """The rectangle's labels from the top down, a few rows at a time: colours take three times their memory."""
        rows = max(1, _BAND_PIXELS // width)
        for top in range(y, y + height, rows):
            try:
                band = self._backend.read(level, x, top, width, min(rows, y + height - top))[..., 0]
            except SlideError as error:
                raise LabelMaskError(f"{self.path}: its pixels cannot be decoded ({error}).") from error
            if band.max() >= len(self.label_names):
                unknown = np.unique(band[band >= len(self.label_names)]).tolist()
                known = ", ".join(f"{label} {name}" for label, name in enumerate(self.label_names))
                raise LabelOutsideTable(f"{self.path} holds the labels {unknown}; the table has {known}.")
            yield band
