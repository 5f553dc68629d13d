# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The keys of a tile, side by side in memory, and what is added to their logits.

Both are made tile after tile in the same place: memory that is fresh for each tile costs more than the copying. The
context tokens of an image come first and stay there for all of its tiles.
"""

from collections.abc import Iterator, Sequence

import torch

from .attention_backend import LayerContext, PreparedGrid
from .attention_sdpa_tables import QueryTile, columns_of_queries, log_weights, near_keys, next_multiple


def _num_context(tile: QueryTile, context: LayerContext | None) -> int:
    """How many keys of a tile are context tokens."""
    return 0 if context is None or tile.block_row < 0 else context.counts[tile.image]


def num_keys(tile: QueryTile, context: LayerContext | None) -> int:
    """How many keys a tile has, context tokens among them."""
    return _num_context(tile, context) + tile.num_keys


class TileKeys:
    """What the tiles take of each packed token: keys and values, or the logarithms of their weights.

    Args:
        packed: (M, heads, features) each.
        tiles: all that will be asked for.
        context: the context tokens of the layer, whose rows come before the others'; `None` for none.
        multiple: of which `filled_up` makes the number of keys.
        of_context: (entries, heads, features) each of the context tokens, where they are not among the packed tokens.
    """

    def __init__(
        self,
        packed: Sequence[torch.Tensor],
        tiles: Sequence[QueryTile],
        context: LayerContext | None = None,
        multiple: int = 1,
        of_context: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.packed = [states.transpose(0, 1) for states in packed]  # (heads, M, features)
        self.context, self.multiple = context, multiple
        self.of_context: list[torch.Tensor] = []  # (heads, entries, features)
        if context is not None:
            if of_context is None:
                of_context = [states[context.tokens] for states in packed]
            # A cell without a token has one of another image, perhaps, whose numbers may not be finite.
            is_empty = (context.weights == 0)[:, None, None]
            self.of_context = [states.masked_fill(is_empty, 0).transpose(0, 1) for states in of_context]
        most = next_multiple(max(num_keys(tile, context) for tile in tiles), multiple)
        self.memories = [states.new_empty(states.shape[0] * most * states.shape[2]) for states in self.packed]
        self.layout = (-1, 0, 0)  # an image, so many context tokens of which come first, and the end of the keys
        self.places: list[torch.Tensor] = []
        self.runs: list[_KeptRun] = []

    def of(self, tile: QueryTile, in_order: bool = True) -> list[torch.Tensor]:
        """(heads, keys, features) each, good until the next tile; views of the packed tokens where keys are one run.

        Args:
            tile: one of those announced.
            in_order: whether the keys are wanted in the order of the tile's runs; if not, they may come in another.
        """
        if len(tile.keys) == 1 and not _num_context(tile, self.context):
            return [states[:, slice(*tile.keys[0])] for states in self.packed]
        places, end = self.filled_up(tile, in_order), num_keys(tile, self.context)
        return [place[:, :end] for place in places]

    def filled_up(self, tile: QueryTile, in_order: bool = True) -> list[torch.Tensor]:
        """(heads, keys, features) each, contiguous, with zeros after the last key; else as `of`."""
        position = _num_context(tile, self.context)
        is_as_before = self._arrange(tile.image, position, position + tile.num_keys)
        if in_order or not is_as_before or not all(map(_KeptRun.may_become, self.runs, tile.keys)):
            self.runs = []
            for start, end in tile.keys:
                self.runs.append(_KeptRun(position, start, end))
                position += end - start
        for run, (_, end) in zip(self.runs, tile.keys, strict=True):
            for first, position, length in run.moved_to(end):
                for place, states in zip(self.places, self.packed, strict=True):
                    place.narrow(1, position, length).copy_(states.narrow(1, first, length))
        return self.places

    def _arrange(self, image: int, num_context: int, end: int) -> bool:
        """Makes `places`, with context tokens and the zeros after the end, unless they are there already."""
        if self.layout == (image, num_context, end):
            return True
        self.layout, length = (image, num_context, end), next_multiple(end, self.multiple)
        self.places = []
        for memory, (heads, _, features) in zip(self.memories, (states.shape for states in self.packed), strict=True):
            self.places.append(memory[: heads * length * features].view(heads, length, features))
        if num_context:
            for place, of_context in zip(self.places, self.of_context, strict=True):
                place[:, :num_context] = of_context[:, self.context.entries_of(image)]
        if end < length:
            for place in self.places:
                place[:, end:] = 0
        return False


class _KeptRun:
    """Where the keys of a run lie in memory, for tiles whose runs are equally long and start further and further right.

    Those that two tiles have in common stay where they are, and new ones take the places of those that are gone: most
    keys of a block are keys of the next one too.

    Args:
        position: of the run in the memory.
        start, end: packed indices of its tokens, of which none has been read.
    """

    def __init__(self, position: int, start: int, end: int) -> None:
        self.position, self.origin, self.length = position, start, end - start
        self.end_of_read = start

    def may_become(self, run: tuple[int, int]) -> bool:
        """Whether (start, end) packed indices are those of a run that may follow."""
        start, end = run
        return self.end_of_read - self.length <= start <= self.end_of_read and end - start == self.length

    def moved_to(self, end: int) -> Iterator[tuple[int, int, int]]:
        """The run now ends there; of what has to be read the packed index, the position in memory and the length."""
        while self.end_of_read < end:
            offset = (self.end_of_read - self.origin) % self.length
            length = min(end - self.end_of_read, self.length - offset)
            yield self.end_of_read, self.position + offset, length
            self.end_of_read += length


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
        own, dtype = log_weights(prepared, dtype), torch.promote_types(dtype, torch.float32)
        self.own = None if own is None else TileKeys([own[:, None, None]], tiles)
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
        near = self.of_context.new_zeros(tile.num_keys) if self.own is None else self.own.of(tile)[0][0, :, 0]
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
