# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The correction of `mean_query_correction.py` inside the tiles: a few more queries a tile.

The first tile of an image has its global tokens for queries: there the mean query attends to all tokens. In each other
tile it attends once for each of the tile's blocks, to the keys of that block.
"""

import torch

from .attention_backend import LayerContext, PreparedGrid
from .attention_sdpa_tables import QueryTile, columns_of_queries


class MeanQueryCorrection:
    """Which mean queries the tiles have, and what becomes of what they attend to.

    Args:
        prepared: the tiles.
        context: the context tokens of the layer and the mean queries; without them nothing is corrected.
        of_all: (heads, head_dim), what the mean query gets from all tokens, where it is known: in strips of one image.
    """

    def __init__(
        self, prepared: PreparedGrid, context: LayerContext | None, of_all: torch.Tensor | None = None
    ) -> None:
        self.prepared, self.context, self.of_all = prepared, context, of_all

    def queries(self, tile: QueryTile) -> torch.Tensor | tuple[()]:
        """(mean queries, heads, head_dim); none where the tile is a whole image, whose queries see everything."""
        if self.context is None or (tile.queries == tile.keys[0] and tile.block_row < 0):
            return ()
        first, last = tile.block_columns
        return self.context.mean_query[tile.image].expand(last - first + 1, -1, -1)

    def applied(self, tile: QueryTile, attended: torch.Tensor, of_mean: torch.Tensor | tuple[()]) -> torch.Tensor:
        """What a tile's queries attended to, corrected by its mean queries; (queries, heads, head_dim) each."""
        if not len(of_mean):
            return attended
        if tile.block_row < 0:
            self.of_all = of_mean.to(torch.promote_types(of_mean.dtype, torch.float32))
            return attended
        correction = self.of_all - of_mean
        if tile.joins_blocks:
            correction = correction[self._blocks_of_queries(tile)]
        return attended + correction

    def gradient(self, tile: QueryTile, grad_output: torch.Tensor) -> torch.Tensor:
        """The gradient of what a tile's mean queries attended to, (mean queries, heads, head_dim).

        Args:
            tile: one that has mean queries.
            grad_output: (M, heads, head_dim).
        """
        dtype = torch.promote_types(grad_output.dtype, torch.float32)
        if tile.block_row < 0:
            first, end = tile.queries[1], tile.keys[-1][1]  # of the image's patch tokens: each got it once
            return grad_output[first:end].sum(dim=0, keepdim=True, dtype=dtype)
        of_queries = grad_output[slice(*tile.queries)]
        if not tile.joins_blocks:
            return -of_queries.sum(dim=0, keepdim=True, dtype=dtype)
        of_blocks = torch.zeros_like(self.queries(tile), dtype=dtype)
        return of_blocks.index_add_(0, self._blocks_of_queries(tile), of_queries.to(dtype), alpha=-1)

    def _blocks_of_queries(self, tile: QueryTile) -> torch.Tensor:
        """(queries,) int64, in which of the tile's blocks each query lies, counted from the left."""
        return columns_of_queries(tile, self.prepared) - tile.block_columns[0]
