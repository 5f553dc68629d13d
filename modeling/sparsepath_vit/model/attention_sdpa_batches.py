# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Tiles of about one size together: a tile alone is too little work for the twenty operations that it takes.

What is gathered for them, queries, keys and what is added to the logits, is filled up to the size of the largest.

With context tokens each tile goes alone. The context tokens of an image stay in one place then; beside the keys of each
tile of a batch they fill the caches, which costs more than there is to save: at 1400 px (ViT-S/14, two threads) a
layer's attention took 212 ms in batches and 178 ms tile by tile in float32, 137 and 119 ms in bfloat16.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from .attention_backend import PreparedGrid
from .attention_products import MULTIPLE_OF_KEYS, MULTIPLE_OF_QUERIES
from .attention_sdpa_tables import QueryTile, are_near, log_weights, next_multiple

# oneDNN compiles a product for the sizes and the number of its tiles, and keeps 2 MB for the three of attention. So
# there are few sizes: one that so many tiles have is kept, all others are filled up.
MIN_TILES_OF_A_SIZE = 8


class TileBatch(NamedTuple):
    """Tiles of one image that are attended to together.

    Attributes:
        tiles: which have a block row.
        count: of the tiles that are computed; where it is more, the last one is repeated.
        num_queries, num_keys: what each is filled up to.
    """

    tiles: list[QueryTile]
    count: int
    num_queries: int
    num_keys: int


def tile_batches(tiles: Sequence[QueryTile], most_at_once: Callable[[int, int], int]) -> Iterator[TileBatch]:
    """The tiles, all of which have a block row, in batches.

    Args:
        tiles: of one or several images.
        most_at_once: takes the number of queries and keys of a tile, gives that of tiles which go together well.
    """
    sizes = [(tile.image, tile.queries[1] - tile.queries[0], tile.num_keys) for tile in tiles]
    counts, of_size = Counter(sizes), {}
    for tile, size in zip(tiles, sizes, strict=True):
        num_queries, num_keys = size[1:]
        if counts[size] < MIN_TILES_OF_A_SIZE:
            num_queries = next_multiple(num_queries, MULTIPLE_OF_QUERIES)
            num_keys = next_multiple(num_keys, MULTIPLE_OF_KEYS)
        of_size.setdefault((tile.image, num_queries, num_keys), []).append(tile)
    # Image by image: one in a batch of images gets what it gets alone, bit by bit.
    for (_, num_queries, num_keys), alike in of_size.items():
        start = 0
        for count in _counts(len(alike), most_at_once(num_queries, num_keys)):
            yield TileBatch(alike[start : start + count], count, num_queries, num_keys)
            start += count


def _counts(number: int, most: int) -> Iterator[int]:
    """Parts of at most so many, which are the number together or more, in at most three sizes."""
    few = 1 if most < 4 else 2 if most < 8 else 4
    while number > 0:
        if number + few > most:
            part = most
        else:
            part = few if 2 * number > few else 1
        yield part
        number -= part


class GatheredTiles:
    """What batches of tiles take of the packed tokens, each batch in the same memory.

    Args:
        query: (queries, heads, head_dim), of the tokens from `first_query` on.
        key, value: (M, heads, head_dim).
        first_query: a packed index.
        prepared: where the tokens are.
        batches: all that will be asked for, in this order.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        first_query: int,
        prepared: PreparedGrid,
        batches: Sequence[TileBatch],
    ) -> None:
        self.query = query.flatten(1)  # (queries, heads * head_dim)
        # (heads * M, head_dim): rows of one head are copied as fast as memory can.
        self.rows = [states.transpose(0, 1).reshape(-1, states.shape[2]) for states in (key, value)]
        self.memories = [states.new_empty(0) for states in (key, value)]
        self.num_heads, self.head_dim = query.shape[1:]
        self.first_rows = torch.arange(self.num_heads, device=query.device)[:, None] * len(key)
        tiles = [tile for batch in batches for tile in _repeated(batch)]
        most_queries, most_keys = (max(batch[index] for batch in batches) for index in (2, 3))
        device = query.device
        self.queries, _ = _tokens_of_runs([[tile.queries] for tile in tiles], most_queries, device)
        self.keys, self.num_keys = _tokens_of_runs([tile.keys for tile in tiles], most_keys, device)
        self.first_query, self.num_passed = first_query, 0
        self.prepared, self.addition = prepared, log_weights(prepared, key.dtype)

    def of(self, batch: TileBatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Queries, keys, values and mask of the next batch, good until the one after it.

        Returns:
            (count, heads, queries or keys, head_dim) each, contiguous, filled up with what is there already; and where
            queries see keys, as a bool or a number that is added to the logits, (count, 1, queries or 1, keys), `None`
            where all see all.
        """
        tiles = slice(self.num_passed, self.num_passed + batch.count)
        self.num_passed = tiles.stop
        queries, keys = self.queries[tiles, : batch.num_queries], self.keys[tiles, : batch.num_keys]
        rows = (keys[:, None] + self.first_rows).flatten()
        shape = batch.count, self.num_heads, -1, self.head_dim
        key, value = (self._gathered(index, rows).view(shape) for index in (0, 1))
        query = self.query.index_select(0, (queries - self.first_query).flatten())
        query = query.unflatten(0, queries.shape).unflatten(2, (self.num_heads, -1)).transpose(1, 2).contiguous()
        return query, key, value, self._mask(batch, queries, keys, self.num_keys[tiles])

    def _gathered(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        """(rows, head_dim) of keys or values."""
        size = len(rows) * self.head_dim
        if self.memories[index].numel() < size:
            self.memories[index] = self.rows[index].new_empty(size)
        return torch.index_select(self.rows[index], 0, rows, out=self.memories[index][:size].view(-1, self.head_dim))

    def _mask(
        self, batch: TileBatch, queries: torch.Tensor, keys: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor | None:
        """The mask of (count, queries) and (count, keys) tokens, of which those before the ends are keys."""
        is_seen = None
        if any(tile.num_keys < batch.num_keys for tile in batch.tiles):
            is_seen = (torch.arange(batch.num_keys, device=ends.device) < ends[:, None])[:, None]
        if any(tile.joins_blocks for tile in batch.tiles):
            block_columns = self.prepared.tensors[1]
            is_near = are_near(block_columns[queries], block_columns[keys], self.prepared)
            is_seen = is_near if is_seen is None else is_near & is_seen
        if self.addition is None:
            return None if is_seen is None else is_seen[:, None]
        addition = self.addition[keys][:, None]
        return (addition if is_seen is None else torch.where(is_seen, addition, -torch.inf))[:, None]


def _repeated(batch: TileBatch) -> list[QueryTile]:
    """As many tiles of a batch as are computed."""
    return batch.tiles + batch.tiles[-1:] * (batch.count - len(batch.tiles))


def _tokens_of_runs(
    runs: list[list[tuple[int, int]]], length: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The packed indices of each tile's runs, one after the other, and how many these are.

    Returns:
        (tiles, length) int64, filled up with a tile's last token; (tiles,) int64.
    """
    most = max(map(len, runs))
    # (tiles, runs, 2); where a tile has fewer runs, empty ones at the end of its last follow
    bounds = [of_tile + [(of_tile[-1][1],) * 2] * (most - len(of_tile)) for of_tile in runs]
    starts, ends = torch.tensor(bounds, device=device).unbind(dim=-1)
    passed = (ends - starts).cumsum(dim=1)
    positions = torch.arange(length, device=device)
    tokens = positions + starts[:, :1]
    for run in range(1, most):
        jump = starts[:, run : run + 1] - ends[:, run - 1 : run]
        tokens += torch.where(positions >= passed[:, run - 1 : run], jump, 0)
    return torch.minimum(tokens, ends[:, -1:] - 1), passed[:, -1]
