# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What the embedding of a region adds to the datasets of its slide's file."""

from typing import Any

import numpy as np

from .forward import Embedding
from .reader import Slide
from .regions import Region
from .tiles import tile_rows


def level0_coordinates(
    slide: Slide, positions: np.ndarray, mpp: float, patch_size: int, corner: tuple[float, float] = (0, 0)
) -> np.ndarray:
    """Where tokens have their top left corner in the frame.

    Args:
        slide: the slide.
        positions: (tokens, 2) row and column in the token grid of a region.
        mpp: resolution of the region.
        patch_size: pixels per token side.
        corner: x and y of the region, level-0 pixels of the slide.

    Returns:
        (tokens, 2) int64 x, y in level-0 pixels.
    """
    origin = np.asarray(corner) - slide.frame[:2]
    return np.rint(origin + positions[:, ::-1] * patch_size * np.asarray(slide.scale(mpp))).astype(np.int64)


def region_rows(
    slide: Slide, region: Region, embedding: Embedding, mpp: float, patch_size: int, num_patches: int | None
) -> dict[str, Any]:
    """What a region adds to the datasets of a file.

    Args:
        slide: the slide.
        region: of it.
        embedding: of the region.
        mpp: its resolution.
        patch_size: pixels per token side.
        num_patches: how many patch tokens will be written where `embedding` has only the first of them.
    """
    corner = np.asarray([region.x, region.y]) - slide.frame[:2]  # level-0 pixels

    def level0(positions: np.ndarray) -> np.ndarray:  # (tokens, 2) row, column -> x, y
        return level0_coordinates(slide, positions, mpp, patch_size, (region.x, region.y))

    rows: dict[str, Any] = {
        "features": embedding.pooled[None],
        "coords": np.rint(corner).astype(np.int64)[None],
        "region_sizes": np.asarray([[region.width, region.height]], dtype=np.int32),
    }
    if embedding.tiles is not None:  # a row of features is a tile then
        rows |= {"region_features": rows["features"], "region_coords": rows["coords"]}
        rows |= tile_rows(embedding.tiles, level0)
    if region.label is not None:
        rows["labels"] = [region.label]
    if embedding.patch_features is not None:
        scores, own = embedding.prune_scores, len(embedding.patch_positions)
        rows |= {
            "patch_features": embedding.patch_features,
            "patch_positions": embedding.patch_positions,
            "patch_coords": level0(embedding.patch_positions),
            "patch_counts": np.asarray([own if num_patches is None else num_patches], dtype=np.int64),
            "token_coords": level0(embedding.token_positions),
            "token_counts": np.asarray([len(embedding.token_positions)], dtype=np.int64),
        }
        if scores is not None:
            rows["prune_scores"] = scores
        if embedding.patch_weights is not None:
            rows["patch_weights"] = embedding.patch_weights
        if embedding.attention is not None:
            rows["attention"] = embedding.attention
    return rows
