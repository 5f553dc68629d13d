# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Block-local and stratified attention by tiles of queries, dense SDPA calls or products of some of them at once.

A tile is a run of consecutive blocks of one block row. Its keys are the global tokens and, for each of the 2r+1 block
rows around it, one contiguous run of packed tokens, however ragged the blocks are. Tiles of about one size go together
(`attention_sdpa_batches.py`). Where there are context tokens, each tile goes alone and all of the image's follow its
keys: a number per key is added to the logits, -inf for those inside the neighbourhood; and the image's mean query is
one more query for each block. It uses torch operations only, so it also serves as the correct path on devices without a
kernel. Where `attention_products.py` is faster than SDPA (bfloat16 on CPUs with instructions for it), that computes. It
computes in the dtype of its arguments, probabilities in at least float32: autocast has no say in it.
"""

from collections.abc import Sequence

import torch

from .attention_backend import AttentionBackend, LayerContext, PreparedGrid, StripContext
from .attention_precision import without_autocast
from .attention_sdpa_backward import tiled_block_attention_backward
from .attention_sdpa_correction import MeanQueryCorrection
from .attention_sdpa_probabilities import attend_with_dropout, rows_of_mask
from .attention_sdpa_queries import TileAttention
from .attention_sdpa_tables import QueryTile, prepare_tiles, query_tiles


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
    tiles, correction = list(query_tiles(prepared)), MeanQueryCorrection(prepared, context)
    attention = TileAttention(key, value, prepared, tiles, scale, correction)
    with without_autocast(query.device.type):
        if dropout > 0.0:
            _attend_with_dropout(attention, tiles, query, output, dropout, generator)
        else:
            _attend(attention, tiles, query, output)
    return output, None


def _attend(
    attention: TileAttention,
    tiles: Sequence[QueryTile],
    query: torch.Tensor,
    output: torch.Tensor,
    first_query: int = 0,
) -> None:
    """Writes what tiles attend to; query and output are (queries, heads, head_dim), from that packed index on."""
    together = [] if attention.context is not None else [tile for tile in tiles if tile.block_row >= 0]
    if together:
        attention.write_batches(together, query, output, first_query)
        tiles = [tile for tile in tiles if tile.block_row < 0]
    for tile in tiles:
        queries = slice(tile.queries[0] - first_query, tile.queries[1] - first_query)
        output[queries] = attention.of(tile, query[queries])


def _attend_with_dropout(
    attention: TileAttention,
    tiles: Sequence[QueryTile],
    query: torch.Tensor,
    output: torch.Tensor,
    dropout: float,
    generator: torch.Generator | None,
) -> None:
    """Likewise in the order of the tiles, in which the generator draws."""
    for tile in tiles:
        mask, queries = attention.masks.of(tile), slice(*tile.queries)
        of_tile, correction = attention.keys.of(tile), attention.correction
        attended = attend_with_dropout(query, tile, *of_tile, mask, attention.scale, dropout, generator)
        of_mean = mean_queries = correction.queries(tile)
        if len(mean_queries):
            of_mean = attention.of_rows(tile, mean_queries, rows_of_mask(mask, slice(len(attended), None)))
        output[queries] = correction.applied(tile, attended, of_mean)


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
    (of_globals, *of_patches), num_globals = query_tiles(prepared), prepared.numbers[0]
    as_of_layer = of_all = of_context = None
    if context is not None:
        as_of_layer, of_all, of_context = context.as_layer_context(), context.of_mean, (context.key, context.value)
    correction = MeanQueryCorrection(prepared, as_of_layer, of_all)

    attention = TileAttention(key, value, prepared, [of_globals, *of_patches], scale, correction, of_context)
    with without_autocast(query.device.type):
        output[:num_globals], logsumexp = attention.with_logsumexp(of_globals, query[:num_globals])
        _attend(attention, of_patches, query, output, first_query=of_patches[0].queries[0] - num_globals)
    return output, logsumexp


SDPA_TILES = AttentionBackend(
    name="sdpa_tiles",
    description="tiles of SDPA calls",
    device_type=None,
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
