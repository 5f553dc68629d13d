# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Features as colours: their three principal components as red, green and blue."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .embedded_slide import EmbeddedSlide

_FITTED_TOKENS = 4096
_OUTLIERS = 1.0  # per cent of the tokens at either end of a component that get the end's colour


@dataclass(frozen=True)
class FeatureColors:
    """The three directions along which tokens differ most, and what of each is dark and bright.

    Attributes:
        mean: (channels,) float32.
        components: (3, channels) float32, orthonormal, the strongest first.
        low: (3,) what is shown as 0.
        high: (3,) what is shown as 1.
    """

    mean: np.ndarray
    components: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def of(self, slide: EmbeddedSlide) -> np.ndarray:
        """(K, 3) float32 red, green and blue in [0, 1] of the kept tokens of a slide."""
        shares = np.empty((len(slide.features), 3), dtype=np.float32)
        for first, block in slide.features.blocks():
            shares[first : first + len(block)] = (block.numpy() - self.mean) @ self.components.T
        return np.clip((shares - self.low) / np.maximum(self.high - self.low, 1e-12), 0, 1)


def fit_feature_colors(slides: Sequence[EmbeddedSlide]) -> FeatureColors:
    """Principal components of the tokens of all slides together, so that a colour means the same on each.

    They are fitted to up to 4,096 tokens, evenly spaced; the same files give the same colours.
    """
    total = sum(len(slide.features) for slide in slides)
    step = max(1, total // _FITTED_TOKENS)
    tokens = np.concatenate([slide.features.rows(np.arange(0, len(slide.features), step)) for slide in slides])
    mean = tokens.mean(axis=0)
    centred = tokens - mean
    _, vectors = np.linalg.eigh(centred.T @ centred)  # ascending
    components = np.zeros((3, tokens.shape[1]), dtype=np.float32)
    strongest = vectors[:, ::-1][:, :3].T
    # An eigenvector's sign is anybody's choice: its largest entry is positive here.
    signs = np.sign(np.take_along_axis(strongest, np.abs(strongest).argmax(axis=1)[:, None], axis=1))
    components[: len(strongest)] = strongest * signs
    low, high = np.percentile(centred @ components.T, [_OUTLIERS, 100 - _OUTLIERS], axis=0)
    return FeatureColors(mean, components, low, high)
