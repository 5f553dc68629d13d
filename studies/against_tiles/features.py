# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Features of a region and of its tokens: in one forward by several attention patterns, and by 224 px tiles."""

import copy
from dataclasses import dataclass

import numpy as np
import torch

from sparsepath_vit.model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel
from sparsepath_vit.runtime.configured import configured
from sparsepath_vit.runtime.pixels import prepare

TILE_SIZE = 224  # px
NUM_SAMPLES = 1024  # context tokens, representatives
TILES, DENSE = "224 px tiles", "dense"
_LOCAL = {"window_size": 8, "prune_ratio": 0.0}
_STRATIFIED = {**_LOCAL, "num_context_tokens": NUM_SAMPLES}
PATTERNS = {
    DENSE: {"window_size": None, "prune_ratio": 0.0},
    "w = 8": _LOCAL,
    "w = 8, 60 % pruned": {**_LOCAL, "prune_ratio": 0.6},
    "stratified": _STRATIFIED,
    "stratified, 60 % pruned": {**_STRATIFIED, "prune_ratio": 0.6, "num_representatives": NUM_SAMPLES},
}
TOKEN_PATTERNS = (DENSE, "w = 8", "stratified")  # pruning would leave labelled tokens out
POSITION_PATTERNS = (DENSE, "w = 8")
POSITIONS = ("stretched", "periodic", "mirrored")


@dataclass(frozen=True)
class Encoder:
    """A model in evaluation mode and its image processor."""

    model: SparsePathViTModel
    processor: SparsePathViTImageProcessor

    @torch.inference_mode()
    def pooled(self, image: np.ndarray) -> np.ndarray:
        """(pooled_size,) of a (height, width, 3) image, its pixels taken as they are."""
        return self.model(**prepare(self.processor, [image], self.model.device)).pooler_output[0].float().numpy()

    @torch.inference_mode()
    def tokens(self, image: np.ndarray) -> np.ndarray:
        """(rows, columns, hidden_size) of the patch tokens; NaN where a patch holds too little of the image."""
        outputs = self.model(**prepare(self.processor, [image], self.model.device))
        rows, columns = outputs.grid_sizes[0].tolist()
        dense = np.full((rows, columns, self.model.config.hidden_size), np.nan, dtype=np.float32)
        row, column = outputs.patch_positions[0].T.numpy()
        dense[row, column] = outputs.last_hidden_state[0, self.model.config.num_global_tokens :].float().numpy()
        return dense


def region_features(encoder: Encoder, image: np.ndarray, name: str) -> np.ndarray:
    """(pooled_size,) of a region by a pattern, or the mean over its tiles, each counted by its area."""
    if name != TILES:
        with configured(encoder.model, **PATTERNS[name]):
            return encoder.pooled(image)
    parts, areas = tiles_of(image, encoder)
    with configured(encoder.model, **PATTERNS[DENSE]):
        return np.average([encoder.pooled(part) for part in parts], axis=0, weights=areas)


def with_positions(encoder: Encoder, kind: str, size: int) -> Encoder:
    """The model with other position embeddings, for images of `size` x `size` pixels only.

    Args:
        encoder: its position grid is that of its pretraining window.
        kind: "stretched" over the image, as the model does by itself; "periodic", the same in each window; "mirrored",
            with every second window turned round, so that neighbours stay neighbours.
        size: a multiple of the patch size.
    """
    if kind == "stretched":
        return encoder
    config = copy.deepcopy(encoder.model.config)
    side, num_prefix = config.image_size // config.patch_size, config.num_prefix_position_embeddings
    places = torch.arange(size // config.patch_size) % (2 * side)
    places = places % side if kind == "periodic" else torch.minimum(places, 2 * side - 1 - places)
    states = dict(encoder.model.state_dict())
    prefix, grid = states["embeddings.position_embeddings"].split([num_prefix, side**2], dim=1)
    grid = grid.unflatten(1, (side, side))[:, places][:, :, places].flatten(1, 2)
    states["embeddings.position_embeddings"] = torch.cat([prefix, grid], dim=1)
    config.image_size = size
    model = SparsePathViTModel(config).eval()
    model.load_state_dict(states)
    return Encoder(model, encoder.processor)


def token_features(encoder: Encoder, image: np.ndarray, name: str) -> np.ndarray:
    """(rows, columns, hidden_size) by a pattern, or tile by tile; tokens have the same places in both."""
    if name != TILES:
        with configured(encoder.model, **PATTERNS[name]):
            return encoder.tokens(image)
    patch_size = encoder.model.config.patch_size
    shape = [-(-side // patch_size) for side in image.shape[:2]]
    dense = np.full((*shape, encoder.model.config.hidden_size), np.nan, dtype=np.float32)
    with configured(encoder.model, **PATTERNS[DENSE]):
        for top, left in corners_of_tiles(image, encoder):
            of_tile = encoder.tokens(image[top : top + TILE_SIZE, left : left + TILE_SIZE])
            row, column = top // patch_size, left // patch_size
            dense[row : row + of_tile.shape[0], column : column + of_tile.shape[1]] = of_tile
    return dense


def tiles_of(image: np.ndarray, encoder: Encoder) -> tuple[list[np.ndarray], list[int]]:
    """The tiles of a region and how many pixels each has."""
    parts = [image[top : top + TILE_SIZE, left : left + TILE_SIZE] for top, left in corners_of_tiles(image, encoder)]
    return parts, [part.shape[0] * part.shape[1] for part in parts]


def corners_of_tiles(image: np.ndarray, encoder: Encoder) -> list[tuple[int, int]]:
    """(top, left) of each tile; remnants narrower than a patch are none."""
    least = encoder.model.config.patch_size
    tops, lefts = ([start for start in range(0, side, TILE_SIZE) if side - start >= least] for side in image.shape[:2])
    return [(top, left) for top in tops for left in lefts]


def tokens_to_border(shape: tuple[int, int], patch_size: int) -> np.ndarray:
    """(rows, columns) int64, how many tokens lie between a token and the nearest border of two tiles; 0 at it."""
    of_tile = TILE_SIZE // patch_size

    def along(count: int) -> np.ndarray:
        borders = np.arange(of_tile, count, of_tile)
        if not len(borders):
            return np.full(count, count)
        places = np.arange(count)[:, None]
        return np.where(places < borders, borders - 1 - places, places - borders).min(axis=1)

    return np.minimum(along(shape[0])[:, None], along(shape[1])[None, :])
