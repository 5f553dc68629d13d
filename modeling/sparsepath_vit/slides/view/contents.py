# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What the page shows of one slide: its tiles, and overlays that are computed when they are asked for."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..annotations import Annotations, read_annotations
from ..embedded_slide import EmbeddedSlide
from ..errors import SlideError
from ..feature_colors import FeatureColors
from ..reader import Slide
from ..token_probabilities import TokenProbe
from ..token_values import TokenValues, attention_values, of_kept, read_array, read_token_values
from .pyramid import TilePyramid

PRUNE_SCORE, KEPT, NORM, COLORS = "prune score", "kept tokens", "norm of the features", "PCA of the features"
_MOST_CELLS = 2**22  # of an overlay, which the browser holds; tokens are merged beyond that
_KEPT_LAYERS = 16
_MOST_REGIONS = 20_000

Values = Callable[[], TokenValues]


class Regions(NamedTuple):
    """The regions that were embedded one by one.

    Attributes:
        boxes: (regions, 4) x, y, width and height in level-0 pixels.
        tissue: (regions,) how many tissue tokens each has.
        kept: (regions,) how many of them were kept.
        labels: of each, "" for none.
    """

    boxes: np.ndarray
    tissue: np.ndarray
    kept: np.ndarray
    labels: list[str]


class ViewedSlide:
    """One slide of the page.

    Attributes:
        notice: what the user should know of the tokens before trusting them; None for nothing.

    Args:
        slide: the slide.
        embedded: its tokens; None to show the slide alone.
        colors: gives what the colours of the features are, the same for all slides of the page.
        files: `.npy` files with numbers, or a table of class probabilities, for the tokens.
        probe: a linear classifier of tokens.
        polygons: GeoJSON files with segmented pieces or annotations.

    Raises:
        SlideError: the tokens are of a slide of another size, or a file does not fit, is no GeoJSON or holds no
            numbers of the tokens.
    """

    def __init__(
        self,
        slide: Slide,
        embedded: EmbeddedSlide | None = None,
        colors: Callable[[], FeatureColors] | None = None,
        files: Sequence[Path] = (),
        probe: TokenProbe | None = None,
        polygons: Sequence[Path] = (),
    ) -> None:
        self.slide, self.embedded = slide, embedded
        self.unit = np.asarray(self.mpp or (1.0, 1.0))
        self.pyramid = TilePyramid(slide, self.unit[0] / self.unit[1])
        self.polygons: dict[str, Annotations] = {path.name: _annotations(path) for path in polygons}
        self.notice: str | None = None
        self._layers: dict[str, Values] = {}
        self._computed: dict[str, TokenValues] = {}
        if embedded is not None:
            self.notice = embedded.check(slide)
            self._layers = self._layers_of(embedded, colors, files, probe)

    def to_page(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) level-0 pixels -> micrometres from the frame's corner, y pointing up as on the page.

        Without a known resolution a micrometre stands for a pixel.
        """
        return (np.asarray(points, dtype=float) - self.slide.frame[:2]) * self.unit * (1, -1)

    def to_slide(self, points: np.ndarray) -> np.ndarray:
        """The inverse of `to_page`."""
        return np.asarray(points, dtype=float) * (1, -1) / self.unit + self.slide.frame[:2]

    @property
    def mpp(self) -> tuple[float, float] | None:
        """Micrometres per level-0 pixel along x and y; None where nobody knows."""
        try:
            return self.slide.mpp_xy
        except SlideError:
            return None if self.embedded is None else self.embedded.mpp

    @property
    def layers(self) -> list[str]:
        """The names of the overlays that there are."""
        return list(self._layers)

    def values(self, layer: str) -> TokenValues:
        """The numbers of an overlay; the last ones are kept.

        Raises:
            SlideError: the file does not hold what they are made from.
        """
        if layer not in self._computed:
            if len(self._computed) >= _KEPT_LAYERS:
                del self._computed[next(iter(self._computed))]
            self._computed[layer] = self._layers[layer]()
        return self._computed[layer]

    def merged(self, values: TokenValues) -> int:
        """How many tokens along each side share a cell of the overlay, so that it does not become too large."""
        extent = (values.corners.max(axis=0) - values.corners.min(axis=0)) / values.token_size + 1
        return max(1, int(np.ceil(np.sqrt(extent.prod() / _MOST_CELLS))))

    def regions(self) -> Regions | None:
        """The regions that were embedded; None where there are none, or too many to draw."""
        if self.embedded is None:
            return None
        sizes, corners = self.embedded.dataset("region_sizes"), self.embedded.dataset("coords")
        if sizes is None or len(sizes[0]) != len(corners[0]) or len(sizes[0]) > _MOST_REGIONS:
            return None
        (tissue, _), (kept, _) = self.embedded.dataset("token_counts"), self.embedded.dataset("patch_counts")
        scale = corners[1]["mpp"] / np.asarray(self.embedded.mpp)  # level-0 pixels per pixel of a region
        boxes = np.concatenate([corners[0] + self.embedded.origin, sizes[0] * scale], axis=1)
        labels = self.embedded.dataset("labels")
        texts = [""] * len(boxes) if labels is None else [_text(label) for label in labels[0]]
        return Regions(boxes, tissue, kept, texts) if len(tissue) == len(boxes) else None

    @staticmethod
    def _layers_of(
        embedded: EmbeddedSlide,
        colors: Callable[[], FeatureColors] | None,
        files: Sequence[Path],
        probe: TokenProbe | None,
    ) -> dict[str, Values]:
        layers: dict[str, Values] = {}
        if embedded.shape_of("prune_scores") is not None:
            layers[PRUNE_SCORE] = partial(read_token_values, embedded, "prune_scores")
        layers[KEPT] = partial(read_token_values, embedded, "kept")
        layers[NORM] = partial(read_token_values, embedded, "norm")
        if colors is not None:
            layers[COLORS] = lambda: of_kept(embedded, "pca", colors().of(embedded))
        layers |= _attention_layers(embedded)
        if probe is not None:
            for number, name in enumerate(probe.names):
                layers[f"probability of {name}"] = partial(probe.values, embedded, number)
        for path in files:
            layers |= _file_layers(embedded, path)
        return layers


def _attention_layers(embedded: EmbeddedSlide) -> dict[str, Values]:
    shape = embedded.shape_of("attention")
    if shape is None:
        return {}
    layers: dict[str, Values] = {"attention, all global tokens": partial(attention_values, embedded)}
    heads = [None, *range(shape[2])] if len(shape) > 2 else [None]
    for token in range(shape[1]):
        name = "CLS" if token == 0 else f"register {token}"
        for head in heads:
            of_head = "" if head is None else f", head {head}"
            layers[f"attention, {name}{of_head}"] = partial(attention_values, embedded, token, head)
    return layers


def _annotations(path: Path) -> Annotations:
    try:
        return read_annotations(path)
    except (OSError, ValueError, LookupError) as error:
        raise SlideError(f"polygons={str(path)!r} is no GeoJSON of polygons ({error!r}).") from error


def _file_layers(embedded: EmbeddedSlide, path: Path) -> dict[str, Values]:
    shape = read_array(path).shape
    columns = [""] if len(shape) != 2 else [f":{column}" for column in range(shape[1])]
    read_token_values(embedded, f"{path}{columns[0]}")  # a file that does not fit is refused before the page opens
    return {path.stem + column: partial(read_token_values, embedded, f"{path}{column}") for column in columns}


def _text(label: bytes | str) -> str:
    return label.decode() if isinstance(label, bytes) else label
