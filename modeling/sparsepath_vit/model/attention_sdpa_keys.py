# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The keys of a tile, side by side in memory, and what is added to their logits.

Both are made tile after tile in the same place: memory that is fresh for each tile costs more than the copying. The
context tokens of an image come first and stay there for all of its tiles.
"""

from collections.abc import Sequence

import torch

from .attention_backend import LayerContext, PreparedGrid
from .attention_sdpa_tables import QueryTile, columns_of_queries, near_keys, own_weights


def _num_context(tile: QueryTile, context: LayerContext | None) -> int:
    """How many keys of a tile are context tokens."""
    return 0 if context is None or tile.block_row < 0 else context.counts[tile.image]


class TileKeys:
    """What the tiles take of each packed token: keys, values, or the logarithms of their weights.

    Args:
        packed: (M, ...).
        tiles: all that will be asked for.
        context: the context tokens of the layer, whose rows come before the others'; `None` for none.
        of_context: (entries, ...) of the context tokens, where they are not among the packed tokens.
    """

    def __init__(
        self,
        packed: torch.Tensor,
        tiles: Sequence[QueryTile],
        context: LayerContext | None = None,
        of_context: torch.Tensor | None = None,
    ) -> None:
        self.packed, self.context = packed, context
        self.of_context = packed[context.tokens] if context is not None and of_context is None else of_context
        most = max(_num_context(tile, context) + tile.num_keys for tile in tiles)
        self.place = packed.new_empty((most, *packed.shape[1:]))
        self.image = -1  # whose context tokens lie in their place

    def of(self, tile: QueryTile) -> torch.Tensor:
        """(keys, ...), good until the next tile; a view where its keys are one run."""
        position = _num_context(tile, self.context)
        if not position and len(tile.keys) == 1:
            start, end = tile.keys[0]
            return self.packed[start:end]
        if not position:
            self.image = -1
        elif self.image != tile.image:
            self.image = tile.image
            self.place[:position] = self.of_context[self.context.entries_of(tile.image)]
        for start, end in tile.keys:
            self.place[position : position + end - start] = self.packed[start:end]
            position += end - start
        return self.place[:position]


class KeyGradients:
    """The sum of what the tiles say of the gradient of each packed token, in at least float32.

    Args:
        packed: (M, heads, head_dim), the keys or values.
        context: the context tokens of the layer.
    """

    def __init__(self, packed: torch.Tensor, context: LayerContext | None) -> None:
        self.context, self.dtype = context, packed.dtype
        dtype = torch.promote_types(packed.dtype, torch.float32)
        self.packed, self.of_context = torch.zeros_like(packed, dtype=dtype), None
        if context is not None:
            self.of_context = self.packed.new_zeros((len(context.tokens), *packed.shape[1:]))

    def add(self, tile: QueryTile, additions: torch.Tensor) -> None:
        """Adds (heads, keys, head_dim), in the order of `TileKeys.of`."""
        position = _num_context(tile, self.context)
        if position:
            self.of_context[self.context.entries_of(tile.image)] += additions[:, :position].transpose(0, 1)
        for start, end in tile.keys:
            self.packed[start:end] += additions[:, position : position + end - start].transpose(0, 1)
            position += end - start

    def total(self) -> torch.Tensor:
        """(M, heads, head_dim): what context tokens received goes to the packed tokens that they are."""
        if self.of_context is not None:
            # Each token is at most one context token; cells without one share a place and received nothing.
            self.packed.index_add_(0, self.context.tokens, self.of_context)
        return self.packed.to(self.dtype)


class TileMasks:
    """Which keys the queries of a tile see, and what is added to their logits.

    Args:
        prepared: the tiles' tables.
        tiles: all that will be asked for.
        context: the context tokens of the layer; `None` for none.
        dtype: of the queries; what is added is of at least float32.
    """

    def __init__(
        self, prepared: PreparedGrid, tiles: Sequence[QueryTile], context: LayerContext | None, dtype: torch.dtype
    ) -> None:
        self.prepared, self.context = prepared, context
        dtype, weights = torch.promote_types(dtype, torch.float32), own_weights(prepared)
        self.own = None if weights is None else TileKeys(weights.to(dtype).log(), tiles)
        self.of_context = None if context is None else context.weights.to(dtype).log()
        self.row, self.row_of_context = (-1, -1), None  # an image's block row, and `_context_of_row` of it

    def of(self, tile: QueryTile) -> torch.Tensor | None:
        """(queries, keys) bool where queries see different keys; what is added to logits where keys have weights.

        That is (1, keys) where all queries see the same keys, and `None` where they see all and nothing is added. With
        context tokens the last rows are of the mean queries, one for each block.
        """
        is_near = near_keys(tile, self.prepared, self.context is not None) if tile.joins_blocks else None
        has_context = _num_context(tile, self.context) > 0
        if self.own is None and not has_context:
            return is_near
        near = self.of_context.new_zeros(tile.num_keys) if self.own is None else self.own.of(tile)
        near = near[None] if is_near is None else torch.where(is_near, near, -torch.inf)
        if not has_context:
            return near
        return torch.cat([self._of_context(tile), near], dim=1)

    def _of_context(self, tile: QueryTile) -> torch.Tensor:
        """What is added to the logits of context tokens, (queries, entries), or (1, entries) for those of one block."""
        if self.row != (tile.image, tile.block_row):
            self.row = tile.image, tile.block_row
            self.row_of_context = self._context_of_row(tile)
        first, last = tile.block_columns
        of_blocks = self.row_of_context[first : last + 1]
        if not tile.joins_blocks:
            return of_blocks
        return torch.cat([self.row_of_context[columns_of_queries(tile, self.prepared)], of_blocks])

    def _context_of_row(self, tile: QueryTile) -> torch.Tensor:
        """(block columns, entries) for the blocks of a row: -inf for context tokens inside their neighbourhood."""
        entries, radius = self.context.entries_of(tile.image), self.prepared.numbers[1]
        columns = torch.arange(tile.num_block_columns, device=self.of_context.device)
        is_far_row = (self.context.block_rows[entries] - tile.block_row).abs() > radius
        is_far = (columns[:, None] - self.context.block_columns[entries]).abs().gt(radius) | is_far_row
        return torch.where(is_far, self.of_context[entries], -torch.inf)
