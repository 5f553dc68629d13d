# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`EmbeddedSlide`: what `sparsepath embed --dense` stored of one slide, opened to look at it."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.extras import require
from .errors import SlideError, decoding
from .mapped_rows import MappedRows
from .reader import Slide
from .records import slide_content

logger = logging.getLogger(__name__)


class EmbeddedSlide:
    """The tokens of one slide: where they are, and their features, which stay in the file until they are used.

    K tokens were kept of the N tissue tokens; regions that overlap give some places twice. All coordinates are level-0
    pixels from the corner of level 0.

    Attributes:
        path: the HDF5 file.
        dimensions: (width, height) of the slide in level-0 pixels.
        origin: (x, y) of the level-0 pixel that coordinates in the file count from.
        token_size: (width, height) of a token in level-0 pixels.
        tissue: (N, 2) x and y of the tissue tokens' top left corners.
        kept: (K, 2) likewise of the tokens with features.
        weights: (K,) how many tissue tokens each kept one stands for.
        features: (K, channels), mapped into memory.
        mpp: micrometres per level-0 pixel along x and y, as they were taken when the slide was embedded.

    Args:
        path: the HDF5 file.

    Raises:
        SlideError: the file holds no tokens, or is none of `embed`; the message says which command makes it.
        ImportError: h5py is missing; the message gives the install command.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        h5py = require("h5py")
        self.path = Path(path)
        if not self.path.is_file():
            found = "is a folder" if self.path.is_dir() else "does not exist"
            raise SlideError(f"{path} {found}: pass the HDF5 file of the slide that `sparsepath embed --dense` wrote.")
        with decoding(f"{path} cannot be read as an HDF5 file of `sparsepath embed`"), h5py.File(path, "r") as stored:
            if "token_coords" not in stored:
                raise SlideError(
                    f"{path} holds no tokens: run `sparsepath embed` again with --dense, into a new folder."
                )
            self.tissue, self.kept = rows_of(stored, "token_coords"), rows_of(stored, "patch_coords")
            coords, tokens = stored["coords"].attrs, stored["token_coords"].attrs
            self.dimensions = (int(coords["level0_width"]), int(coords["level0_height"]))
            # Absent where coordinates in the file are level-0 pixels themselves.
            self.origin: tuple[int, int] = tuple(np.asarray(coords.get("origin_level0", (0, 0))).tolist())
            self.tissue, self.kept = self.tissue + self.origin, self.kept + self.origin
            self.token_size: tuple[float, float] = tuple(tokens["token_size_level0"].tolist())
            side = float(tokens["token_size"] * coords["mpp"])  # micrometres, along both axes
            self.mpp: tuple[float, float] = (side / self.token_size[0], side / self.token_size[1])
            weights = stored.get("patch_weights")
            self.weights = np.ones(len(self.kept), dtype=np.int32) if weights is None else weights[:]
            self.features = MappedRows(self.path, stored["patch_features"])
            self._content = json.loads(stored.attrs.get("source", "{}")).get("content")

    def dataset(self, name: str) -> tuple[np.ndarray, dict[str, Any]] | None:
        """The rows of a dataset of the file and its attributes; None where there is none of that name."""
        with decoding(f"{self.path} cannot be read"), require("h5py").File(self.path, "r") as stored:
            return (rows_of(stored, name), dict(stored[name].attrs)) if name in stored else None

    def blocks(self, name: str, rows: int = 8192) -> Iterator[np.ndarray]:
        """The rows of a dataset of the file, some at a time: of what would be large in memory."""
        with decoding(f"{self.path} cannot be read"), require("h5py").File(self.path, "r") as stored:
            dataset = stored[name]
            for start in range(0, len(dataset), rows):
                yield dataset[start : start + rows]

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape of a dataset of the file; None where there is none of that name."""
        with decoding(f"{self.path} cannot be read"), require("h5py").File(self.path, "r") as stored:
            return stored[name].shape if name in stored else None

    def check(self, slide: Slide) -> str | None:
        """Whether these are tokens of `slide`.

        Returns:
            Where its content has changed since, what to do about it; that is logged, too.

        Raises:
            SlideError: they are of a slide of another size.
        """
        if self.dimensions != slide.dimensions:
            raise SlideError(
                f"{self.path} holds tokens of a slide of {self.dimensions[0]} x {self.dimensions[1]} pixels; "
                f"{slide.path} has {slide.dimensions[0]} x {slide.dimensions[1]}: pass the slide they were embedded "
                "from, or run `sparsepath embed` on this one."
            )
        if self._content is None or self._content == slide_content(slide.path):
            return None
        notice = (
            f"{slide.path} has changed since it was embedded, or is another slide of the same size: what {self.path} "
            "says may not fit. Run `sparsepath embed --dense` again."
        )
        logger.warning("%s", notice)
        return notice

    def nearest_token(self, x: float, y: float) -> int:
        """The number of the kept token whose centre is nearest to the level-0 pixel (x, y).

        Raises:
            SlideError: nothing was kept within two tokens of it.
        """
        width, height = self.token_size
        distances = np.hypot((self.kept[:, 0] - x) / width + 0.5, (self.kept[:, 1] - y) / height + 0.5)
        nearest = int(distances.argmin())
        if distances[nearest] > 2:
            raise SlideError(
                f"no token was kept within two tokens of x={x:.0f}, y={y:.0f}: choose a place on tissue, where pruning "
                "left some."
            )
        return nearest


def rows_of(stored: Any, name: str) -> np.ndarray:
    """All rows of a dataset of an open HDF5 file.

    Raises:
        SlideError: `name` is something else.
    """
    rows = stored[name]
    if not isinstance(rows, require("h5py").Dataset):
        raise SlideError(f"{name} is no dataset in it")
    return rows[:]
