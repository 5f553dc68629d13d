# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The patch tokens of a forward averaged over square tiles: contextual features for multiple-instance learning.

Each vector is of a tile as small as other encoders see alone, but its tokens have seen the region, or the whole slide.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..runtime.short_repr import ShortRepr

_TOKENS_AT_ONCE = 2**16  # as float32 beside the tokens themselves


@dataclass(frozen=True)
class Tiles:
    """How the patch tokens of an image are averaged.

    Attributes:
        side: patch tokens along a tile's side.
        minimum_tissue: share of a tile's area that must be present patch tokens; 0 asks for one token.
    """

    side: int
    minimum_tissue: float = 0.0

    def why_none(self, slide: Path, tile_size: int) -> str:
        """What to say of a slide none of whose tiles was kept."""
        return (
            f"{slide}: no tile of {tile_size} pixels has tissue in at least {self.minimum_tissue:.0%} of its area, and "
            "a patch token left after pruning. Lower minimum_tissue or tile_size, or widen the tissue mask."
        )

    @classmethod
    def of_pixels(cls, tile_size: int, patch_size: int, minimum_tissue: float = 0.0) -> "Tiles":
        """Tiles of `tile_size` pixels.

        Raises:
            ValueError: they are no whole number of patches.
        """
        if tile_size < 1 or tile_size % patch_size:
            lower = max(patch_size, tile_size // patch_size * patch_size)
            raise ValueError(
                f"tile_size={tile_size} is no multiple of the model's patch_size={patch_size}: take {lower} or "
                f"{lower + patch_size}. Tiles of other sizes can be embedded one by one: `regions=` takes coordinates."
            )
        return cls(tile_size // patch_size, minimum_tissue)


@dataclass(frozen=True, repr=False)
class TileFeatures(ShortRepr):
    """The T tiles of one region or slide, in raster order.

    Attributes:
        features: (T, hidden_size) float32, the mean of the patch tokens in a tile after the final norm, each counted as
            often as the patch tokens it stands for.
        positions: (T, 2) int32, (row, column) of the tile's first place in the token grid.
        tissue: (T,) float32, share of the tile's area that is tissue.
        left_out: how many tiles with tissue had less of it than asked for, or no token left after pruning.
    """

    features: np.ndarray
    positions: np.ndarray
    tissue: np.ndarray
    left_out: int


def pool_tiles(
    features: torch.Tensor,
    positions: torch.Tensor,
    weights: torch.Tensor | None,
    present: torch.Tensor,
    tiles: Tiles,
) -> TileFeatures:
    """Averages patch tokens over tiles.

    Args:
        features: (K, hidden_size) of the patch tokens that are left.
        positions: (K, 2) int64, (row, column) of each in the token grid.
        weights: (K,) how many patch tokens each stands for; None where each stands for itself.
        present: (rows, columns) bool, where there was a patch token before pruning.
        tiles: how they are averaged. The tiles at the right and bottom edge may reach over the grid.
    """
    side, (rows, columns) = tiles.side, present.shape
    padding = (0, -columns % side, 0, -rows % side)
    padded = torch.nn.functional.pad(present.float(), padding)  # whole tiles
    share = padded.unflatten(1, (-1, side)).unflatten(0, (-1, side)).mean(dim=(1, 3))  # (tile rows, tile columns)
    place = positions[:, 0] // side * share.shape[1] + positions[:, 1] // side
    sums = torch.zeros(share.numel(), features.shape[1], device=features.device)
    counts = torch.zeros(share.numel(), device=features.device)
    for start in range(0, len(features), _TOKENS_AT_ONCE):
        part = slice(start, start + _TOKENS_AT_ONCE)
        weight = torch.ones(place[part].shape, device=sums.device) if weights is None else weights[part].to(sums)
        sums.index_add_(0, place[part], features[part].float() * weight[:, None])
        counts.index_add_(0, place[part], weight)
    has_tissue, has_tokens = share.flatten() > 0, counts > 0
    chosen = (has_tokens & (share.flatten() >= tiles.minimum_tissue)).nonzero()[:, 0]
    return TileFeatures(
        features=(sums[chosen] / counts[chosen, None]).cpu().numpy(),
        positions=torch.stack([chosen // share.shape[1], chosen % share.shape[1]], dim=1).mul(side).int().cpu().numpy(),
        tissue=share.flatten()[chosen].cpu().numpy(),
        left_out=int(has_tissue.sum()) - len(chosen),
    )


def tile_rows(tiles: TileFeatures, level0: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    """What a slide's file holds of the tiles of one region, dataset by dataset.

    Args:
        tiles: of the region.
        level0: takes (row, column) positions in the token grid to level-0 pixels, (T, 2) x and y.
    """
    return {
        "features": tiles.features,
        "coords": level0(tiles.positions),
        "tile_tissue": tiles.tissue,
        "tile_counts": np.asarray([len(tiles.features)], dtype=np.int64),
    }
