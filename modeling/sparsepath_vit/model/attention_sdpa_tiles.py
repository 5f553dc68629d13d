# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Block-local and stratified attention as a loop over tiles of queries, each one dense SDPA call or its products.

A tile is a run of consecutive blocks of one block row. Its keys are the global tokens and, for each of the 2r+1 block
rows around it, one contiguous run of packed tokens: no padding, no gather, no dense mask, however ragged the blocks
are. Where there are context tokens, all of the image's follow: a number per key is added to the logits, -inf for those
inside the neighbourhood; and the image's mean query is one more query for each block. It uses torch operations only, so
it also serves as the correct path on devices without a kernel. Where `attention_products.py` is faster than SDPA
(bfloat16 on CPUs with instructions for it), that computes a tile. It computes in the dtype of its arguments,
probabilities in at least float32: autocast has no say in it.
"""

from collections.abc import Iterator, Sequence

import torch

from .attention_backend import AttentionBackend, LayerContext, PreparedGrid, StripContext
from .attention_precision import without_autocast
from .attention_products import MULTIPLE_OF_KEYS, TileProducts, fit_products, products_are_faster
from .attention_sdpa_correction import MeanQueryCorrection
from .attention_sdpa_keys import KeyGradients, TileKeys, TileMasks, num_keys
from .attention_sdpa_tables import QueryTile, own_weights, prepare_tiles, query_tiles

# Where probabilities are kept, of this many queries at a time: those of a large block do not fit the cache, nor at
# 60,000 keys the memory (measured with 32 to 4,900 queries).
MAX_QUERIES_AT_ONCE = 128


class _TileAttention:
    """What the queries of a tile attend to, by SDPA or, where that is faster, by explicit products.

    Args:
        key, value: (M, heads, head_dim) packed tokens.
        tiles: all that will be asked for.
        context: the context tokens of the layer; `None` for none.
        are_weighted: whether packed tokens have weights.
        scale: factor on the logits.
        of_context: (entries, heads, head_dim) keys and values of the context tokens, where these are not among the
            packed tokens.
    """

    def __init__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        tiles: Sequence[QueryTile],
        context: LayerContext | None,
        are_weighted: bool,
        scale: float,
        of_context: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self.products = TileProducts() if products_are_faster(key) else None
        multiple = 1 if self.products is None else MULTIPLE_OF_KEYS
        self.keys = TileKeys([key, value], tiles, context, multiple, of_context)
        self.context, self.scale, self.are_weighted = context, scale, are_weighted

    def of(self, tile: QueryTile, query: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(queries, heads, head_dim) of queries of that form and the tile's mask."""
        keys, in_order = num_keys(tile, self.context), self.are_weighted or tile.joins_blocks  # as the mask has them
        if self._uses_products(len(query), keys):
            return self.products.attend(query, *self.keys.filled_up(tile, in_order), keys, mask, self.scale)[0]
        output = torch.nn.functional.scaled_dot_product_attention(
            query.transpose(0, 1)[None],  # (1, heads, tokens, head_dim): a 5-D tensor would take SDPA's slow path
            *(states[None] for states in self.keys.of(tile, in_order)),
            attn_mask=mask,
            scale=self.scale,
        )
        return output[0].transpose(0, 1)

    def with_logsumexp(
        self, tile: QueryTile, query: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Likewise, and the natural log-sum-exp of their logits, (heads, queries) of at least float32."""
        keys = num_keys(tile, self.context)
        if self._uses_products(len(query), keys):
            return self.products.attend(query, *self.keys.filled_up(tile), keys, mask, self.scale)
        key, value = map(_at_least_float32, self.keys.of(tile))
        logits = _logits(_heads_first(query), key, mask, self.scale)
        logsumexp = logits.logsumexp(dim=-1)
        probabilities = logits.sub_(logsumexp[..., None]).exp_()
        return (probabilities @ value).transpose(0, 1), logsumexp

    def corrected(
        self,
        tile: QueryTile,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        correction: MeanQueryCorrection,
    ) -> torch.Tensor:
        """(queries, heads, head_dim): what a tile's queries attend to, corrected by its mean queries, in one call."""
        mean_queries = correction.queries(tile)
        rows = torch.cat([query, mean_queries]) if len(mean_queries) else query
        attended = self.of(tile, rows, mask)
        return correction.applied(tile, attended[: len(query)], attended[len(query) :])

    def _uses_products(self, num_queries: int, keys: int) -> bool:
        return self.products is not None and fit_products(num_queries, keys)


def _query_parts(tile: QueryTile, mask: torch.Tensor | None) -> Iterator[tuple[slice, torch.Tensor | None]]:
    """At most `MAX_QUERIES_AT_ONCE` queries of a tile at a time, with their rows of its mask."""
    first, end = tile.queries
    for start in range(first, end, MAX_QUERIES_AT_ONCE):
        stop = min(start + MAX_QUERIES_AT_ONCE, end)
        yield slice(start, stop), _rows(mask, slice(start - first, stop - first))


def _rows(mask: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    """Some rows of a mask; all queries share one that has a single row."""
    return mask[rows] if mask is not None and len(mask) > 1 else mask


def _heads_first(states: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, head_dim) -> (heads, tokens, head_dim), of at least float32."""
    return _at_least_float32(states.transpose(0, 1))


def _at_least_float32(states: torch.Tensor) -> torch.Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


def _probabilities(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """(heads, queries, keys) attention probabilities of (heads, tokens, head_dim) queries and keys."""
    return torch.softmax(_logits(query, key, mask, scale), dim=-1)


def _logits(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """(heads, queries, keys) of (heads, tokens, head_dim) queries and keys."""
    logits = (query * scale) @ key.mT
    if mask is not None and mask.dtype == torch.bool:
        logits.masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        logits += mask
    return logits


def _dropout_factors(probabilities: torch.Tensor, dropout: float, generator: torch.Generator | None) -> torch.Tensor:
    """0 where a probability is dropped, 1 / (1 - dropout) elsewhere."""
    drawn = torch.rand(probabilities.shape, generator=generator, device=probabilities.device)
    return (drawn >= dropout).to(probabilities.dtype) / (1.0 - dropout)


def tiled_block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prepared: PreparedGrid,
    scale: float,
    dropout: float,
    generator: torch.Generator | None,
    context: LayerContext | None = None,
) -> tuple[torch.Tensor, None]:
    """Block-local or stratified attention, tile by tile.

    Args:
        query, key, value: (M, heads, head_dim) packed tokens.
        prepared: where the tokens are, see `prepare_tiles`.
        scale: factor on the logits.
        dropout: share of attention probabilities set to zero; those of mean queries stay.
        generator: draws the dropout.
        context: the context tokens of the layer; `None` for block-local attention.

    Returns:
        (M, heads, head_dim), and `None`: the backward computes the log-sum-exps anew.
    """
    output = query.new_empty(query.shape)
    tiles = list(query_tiles(prepared))
    attention = _TileAttention(key, value, tiles, context, own_weights(prepared) is not None, scale)
    masks, correction = TileMasks(prepared, tiles, context, query.dtype), MeanQueryCorrection(prepared, context)
    with without_autocast(query.device.type):
        for tile in tiles:
            mask, queries = masks.of(tile), slice(*tile.queries)
            if dropout == 0.0:
                output[queries] = attention.corrected(tile, query[queries], mask, correction)
                continue
            of_tile = attention.keys.of(tile)
            attended = _attend_with_dropout(query, tile, *of_tile, mask, scale, dropout, generator)
            of_mean = mean_queries = correction.queries(tile)
            if len(mean_queries):
                of_mean = attention.of(tile, mean_queries, _rows(mask, slice(len(attended), None)))
            output[queries] = correction.applied(tile, attended, of_mean)
    return output, None


def _attend_with_dropout(
    query: torch.Tensor,
    tile: QueryTile,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    dropout: float,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """(queries, heads, head_dim) of one tile, whose `key` and `value` are (heads, keys, head_dim)."""
    key, value, attended = _at_least_float32(key), _at_least_float32(value), []
    for queries, part_mask in _query_parts(tile, mask):
        probabilities = _probabilities(_heads_first(query[queries]), key, part_mask, scale)
        probabilities *= _dropout_factors(probabilities, dropout, generator)
        attended.append((probabilities @ value).transpose(0, 1))
    return torch.cat(attended)


def tiled_strip_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prepared: PreparedGrid,
    scale: float,
    context: StripContext | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-local or stratified attention of one strip, tile by tile.

    Args:
        query: (G + S, heads, head_dim) of the global tokens and the strip's own patch tokens.
        key, value: (M, heads, head_dim) of all tokens of the strip.
        prepared: where they are, see `prepare_tiles`.
        scale: factor on the logits.
        context: the context tokens; `None` for block-local attention.

    Returns:
        (G + S, heads, head_dim), and the log-sum-exp of the global tokens' logits, (heads, G).
    """
    output = query.new_empty(query.shape)
    tiles = list(query_tiles(prepared))
    as_of_layer = of_mean = of_context = None
    if context is not None:
        as_of_layer, of_mean, of_context = context.as_layer_context(), context.of_mean, (context.key, context.value)
    are_weighted = own_weights(prepared) is not None
    attention = _TileAttention(key, value, tiles, as_of_layer, are_weighted, scale, of_context)
    masks, num_globals = TileMasks(prepared, tiles, as_of_layer, query.dtype), prepared.numbers[0]
    correction = MeanQueryCorrection(prepared, as_of_layer, of_mean)
    with without_autocast(query.device.type):
        of_globals, *of_patches = tiles
        output[:num_globals], logsumexp = attention.with_logsumexp(
            of_globals, query[:num_globals], masks.of(of_globals)
        )
        position = num_globals
        for tile in of_patches:
            queries = slice(position, position + tile.queries[1] - tile.queries[0])
            output[queries] = attention.corrected(tile, query[queries], masks.of(tile), correction)
            position = queries.stop
    return output, logsumexp


def tiled_block_attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    prepared: PreparedGrid,
    scale: float,
    dropout: float,
    generator: torch.Generator | None,
    context: LayerContext | None = None,
) -> tuple[torch.Tensor, ...]:
    """Gradients of `tiled_block_attention`; each tile's probabilities are recomputed, `output` and `logsumexp` unused.

    `generator` must be seeded as it was for the forward: the dropout is drawn again in the same order.

    Returns:
        Gradients with respect to query, key and value, each (M, heads, head_dim), and with context tokens with respect
        to the mean queries, (images, heads, head_dim).
    """
    grad_query = query.new_empty(query.shape)
    tiles = list(query_tiles(prepared))
    keys = TileKeys([key, value], tiles, context)
    grad_key, grad_value = (KeyGradients(states, context) for states in (key, value))
    masks, correction = TileMasks(prepared, tiles, context, query.dtype), MeanQueryCorrection(prepared, context)
    grad_means = () if context is None else (torch.zeros_like(context.mean_query, dtype=grad_key.packed.dtype),)
    with without_autocast(query.device.type):
        for tile in tiles:
            gradients, mask = _TileGradients(*keys.of(tile), scale), masks.of(tile)
            for queries, part_mask in _query_parts(tile, mask):
                grad_query[queries] = gradients.of(query[queries], grad_output[queries], part_mask, dropout, generator)
            mean_queries = correction.queries(tile)
            if len(mean_queries):
                mean_mask = _rows(mask, slice(-len(mean_queries), None))
                of_mean = gradients.of(mean_queries, correction.gradient(tile, grad_output), mean_mask, 0.0, None)
                grad_means[0][tile.image] += of_mean.sum(dim=0)
            grad_key.add(tile, gradients.key)
            grad_value.add(tile, gradients.value)
    return grad_query, grad_key.total(), grad_value.total(), *(gradient.to(query.dtype) for gradient in grad_means)


class _TileGradients:
    """Gradients of one tile's keys and values, (heads, keys, head_dim) of at least float32, summed over its queries."""

    def __init__(self, tile_key: torch.Tensor, tile_value: torch.Tensor, scale: float) -> None:
        self.tile_key, self.tile_value = (_at_least_float32(states).contiguous() for states in (tile_key, tile_value))
        self.key, self.value = torch.zeros_like(self.tile_key), torch.zeros_like(self.tile_value)
        self.scale = scale

    def of(
        self,
        query: torch.Tensor,
        grad_output: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """(queries, heads, head_dim), the gradient of some queries; adds what they give to keys and values."""
        query, grad_output = _heads_first(query), _heads_first(grad_output)
        probabilities = _probabilities(query, self.tile_key, mask, self.scale)  # (heads, queries, keys)
        grad_logits = grad_output @ self.tile_value.mT  # with respect to the probabilities, so far
        dropped = probabilities
        if dropout > 0.0:
            factors = _dropout_factors(probabilities, dropout, generator)
            dropped, grad_logits = probabilities * factors, grad_logits * factors
        self.value.baddbmm_(dropped.mT, grad_output)
        delta = (probabilities * grad_logits).sum(dim=-1, keepdim=True)
        grad_logits.sub_(delta).mul_(probabilities)
        self.key.baddbmm_(grad_logits.mT, query, alpha=self.scale)
        return (grad_logits @ self.tile_key).mul_(self.scale).transpose(0, 1)


SDPA_TILES = AttentionBackend(
    name="sdpa_tiles",
    description="tiles of SDPA calls",
    missing=lambda device: None,
    unwanted=lambda device: None,
    check_query=lambda query: None,
    prepare=prepare_tiles,
    forward=tiled_block_attention,
    backward=tiled_block_attention_backward,
    forward_strip=tiled_strip_attention,
    has_dropout=True,
    takes_key_weights=True,
    returns_logsumexp=False,
    strips_take_context=True,
)
