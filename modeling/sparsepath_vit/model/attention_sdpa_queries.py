# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What the queries of tiles attend to, by SDPA or, where that is faster, by explicit products."""

from collections.abc import Sequence

import torch

from .attention_backend import PreparedGrid
from .attention_products import MULTIPLE_OF_KEYS, fit_products, most_at_once, products_are_faster, products_of_thread
from .attention_sdpa_batches import GatheredTiles, tile_batches
from .attention_sdpa_correction import MeanQueryCorrection
from .attention_sdpa_keys import TileKeys, TileMasks, num_keys
from .attention_sdpa_probabilities import at_least_float32, attention_logits, heads_first
from .attention_sdpa_tables import QueryTile

# Numbers in the keys of tiles that one SDPA call computes: fewer calls, as long as keys and values stay in the cache.
MOST_KEY_FEATURES = 2**20


class TileAttention:
    """Attends, tile after tile or batch after batch in the same memory.

    Args:
        key, value: (M, heads, head_dim) packed tokens.
        prepared: where they are.
        tiles: all that may be asked for.
        scale: factor on the logits.
        correction: by the mean queries of the context tokens.
        of_context: (entries, heads, head_dim) keys and values of the context tokens, where these are not among the
            packed tokens.
    """

    def __init__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        prepared: PreparedGrid,
        tiles: Sequence[QueryTile],
        scale: float,
        correction: MeanQueryCorrection,
        of_context: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.context, self.scale, self.correction = correction.context, scale, correction
        self.packed, self.prepared = (key, value), prepared
        self.products = products_of_thread() if products_are_faster(key) else None
        multiple = 1 if self.products is None else MULTIPLE_OF_KEYS
        self.keys = TileKeys([key, value], tiles, self.context, multiple, of_context)
        self.masks = TileMasks(prepared, tiles, self.context, key.dtype)

    def of(self, tile: QueryTile, query: torch.Tensor) -> torch.Tensor:
        """(queries, heads, head_dim) of the queries of a tile, in that form."""
        mean_queries = self.correction.queries(tile)
        rows = torch.cat([query, mean_queries]) if len(mean_queries) else query
        attended = self.of_rows(tile, rows, self.masks.of(tile))
        return self.correction.applied(tile, attended[: len(query)], attended[len(query) :])

    def of_rows(self, tile: QueryTile, query: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(queries, heads, head_dim) of any queries of that form, for each of which the mask has a row."""
        keys = num_keys(tile, self.context)
        in_order = self.masks.own is not None or tile.joins_blocks  # as the mask has them
        if self._uses_products(len(query), keys):
            return self.products.attend(query, *self.keys.filled_up(tile, in_order), keys, mask, self.scale)[0]
        output = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None],  # (1, heads, tokens, head_dim): a 5-D tensor would take SDPA's slow path
            *(states[None] for states in self.keys.of(tile, in_order)),
            attn_mask=mask,
            scale=self.scale,
        )
        return output[0].transpose(0, 1)

    def with_logsumexp(self, tile: QueryTile, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(queries, heads, head_dim), and the log-sum-exp of their logits, (heads, queries) of at least float32."""
        keys, mask = num_keys(tile, self.context), self.masks.of(tile)
        if self._uses_products(len(query), keys):
            return self.products.attend(query, *self.keys.filled_up(tile), keys, mask, self.scale)
        key, value = map(at_least_float32, self.keys.of(tile))
        logits = attention_logits(heads_first(query), key, mask, self.scale)
        logsumexp = logits.logsumexp(dim=-1)
        probabilities = logits.sub_(logsumexp[..., None]).exp_()
        return (probabilities @ value).transpose(0, 1), logsumexp

    def _uses_products(self, num_queries: int, keys: int) -> bool:
        return self.products is not None and fit_products(num_queries, keys)

    def write_batches(
        self, tiles: Sequence[QueryTile], query: torch.Tensor, output: torch.Tensor, first_query: int
    ) -> None:
        """Writes what tiles of block rows attend to; for layers without context tokens.

        Args:
            tiles: in any order.
            query, output: (queries, heads, head_dim) of the tokens from `first_query` on.
            first_query: a packed index.
        """
        batches = list(tile_batches(tiles, self._most_at_once))
        tokens = GatheredTiles(query, *self.packed, first_query, self.prepared, batches)
        for batch in batches:
            *states, mask = tokens.of(batch)
            if self._uses_products(batch.num_queries, batch.num_keys):
                attended = self.products.attend_batch(*states, mask, self.scale)
            else:
                attended = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=mask, scale=self.scale)
            for tile, of_tile in zip(batch.tiles, attended.transpose(1, 2), strict=False):
                start, end = tile.queries
                output[start - first_query : end - first_query] = of_tile[: end - start]

    def _most_at_once(self, num_queries: int, keys: int) -> int:
        """How many tiles of that size are attended to fastest together."""
        _, heads, head_dim = self.packed[0].shape
        if self._uses_products(num_queries, keys):
            return most_at_once(heads, num_queries, keys)
        return max(1, MOST_KEY_FEATURES // (heads * keys * head_dim))
