# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Where else it looks like this: cosine similarity of all tokens of slides to one token, or to a polygon's mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .embedded_slide import EmbeddedSlide

_SMALLEST_NORM = 1e-6


@dataclass(frozen=True)
class SimilarPlace:
    """One of the places that look most alike.

    Attributes:
        slide: which of the slides, from 0.
        token: the number of its kept token.
        center: (x, y) of the token's centre in level-0 pixels.
        similarity: cosine, in [-1, 1].
    """

    slide: int
    token: int
    center: tuple[float, float]
    similarity: float


def token_similarity(slide: EmbeddedSlide, query: np.ndarray) -> np.ndarray:
    """Cosine similarity of every kept token of a slide to a query.

    The features are not copied; the numbers are right to about one part in a thousand, as half precision is.

    Args:
        slide: the slide.
        query: (channels,) a token's feature, or a mean of many.

    Returns:
        (K,) float32.
    """
    query = np.asarray(query, dtype=np.float32)
    direction = query / max(float(np.linalg.norm(query)), _SMALLEST_NORM)
    cosines = slide.features.product(direction) / np.maximum(slide.features.norms(), _SMALLEST_NORM)
    return np.clip(cosines, -1, 1)


def similar_places(
    slides: Sequence[EmbeddedSlide],
    query: np.ndarray,
    similarities: Sequence[np.ndarray] | None = None,
    count: int = 10,
    distance: float = 8.0,
) -> list[SimilarPlace]:
    """The places that look most like the query, best first; neighbours of a place that is listed are left out.

    Args:
        slides: where to look.
        query: (channels,).
        similarities: of each slide, what `token_similarity` returned; computed where None.
        count: at most how many places.
        distance: in tokens: of two places that are nearer to each other along both axes only the better one is listed.
    """
    if similarities is None:
        similarities = [token_similarity(slide, query) for slide in slides]
    places: list[SimilarPlace] = []
    for number, (slide, cosines) in enumerate(zip(slides, similarities, strict=True)):
        left = cosines.copy()
        for _ in range(min(count, len(left))):
            token = int(left.argmax())
            if not np.isfinite(left[token]):
                break
            x, y = slide.kept[token]
            near = (np.abs(slide.kept - (x, y)) < distance * np.asarray(slide.token_size)).all(axis=1)
            left[near] = -np.inf
            center = (float(x + slide.token_size[0] / 2), float(y + slide.token_size[1] / 2))
            places.append(SimilarPlace(number, token, center, _cosine(slide.features.rows([token])[0], query)))
    return sorted(places, key=lambda place: -place.similarity)[:count]


def _cosine(feature: np.ndarray, query: np.ndarray) -> float:
    """In float32: places are ranked by more digits than they are coloured by."""
    lengths = max(float(np.linalg.norm(feature) * np.linalg.norm(query)), _SMALLEST_NORM)
    return float(np.clip(feature @ query.astype(np.float32) / lengths, -1, 1))
