# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The tiles of SDPA calls against the attention pattern: every query in one tile, and its keys those that it sees."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from token_batches import batches

from sparsepath_vit import TokenGrid, block_attention
from sparsepath_vit.model import attention_sdpa_tables
from sparsepath_vit.model.attention_backend import prepared_grid
from sparsepath_vit.model.attention_sdpa_tables import near_keys, query_tiles
from sparsepath_vit.model.attention_sdpa_tiles import SDPA_TILES
from sparsepath_vit.model.attention_specification import attention_pattern
from sparsepath_vit.model.context_tokens import draw_context_tokens


@given(batches(), st.sampled_from([1, 3, 32]))
def test_tiles_hold_each_query_once_with_the_keys_it_sees(batch, queries_per_tile):
    grid = batch.grid()
    is_seen = torch.zeros(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    occurrences = torch.zeros(grid.num_tokens, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_sdpa_tables, "MIN_QUERIES_PER_TILE", queries_per_tile)
        prepared = prepared_grid(SDPA_TILES, grid)
        for tile in query_tiles(prepared):
            queries = slice(*tile.queries)
            keys = torch.cat([torch.arange(*run) for run in tile.keys])
            shape = (tile.queries[1] - tile.queries[0], len(keys))
            is_seen[queries, keys] = near_keys(tile, prepared, False) if tile.joins_blocks else torch.ones(shape).bool()
            occurrences[queries] += 1
    assert torch.equal(is_seen, torch.block_diag(*attention_pattern(grid).float()).bool())
    assert (occurrences == 1).all()


def test_the_table_lies_on_the_host_and_has_the_shape_that_torch_compile_is_told():
    grid = TokenGrid.create([(33, 17), (16, 16)], num_global_tokens=5, window_size=8)
    pruned = grid.select(torch.arange(0, 800, 9), [63, 26])
    shapes = {prepared_grid(SDPA_TILES, one).tensors[0].shape for one in (grid, pruned)}
    assert shapes == {(2 + 5 * 3 + 2 * 2, 7 + 2 * 4)}
    meta = prepared_grid(SDPA_TILES, grid.to("meta"))
    assert [tensor.device.type for tensor in meta.tensors] == ["cpu", "meta"]


def test_a_cell_without_a_token_takes_nothing_from_another_image(block_attention_backend):
    """Its entry names the first token of the batch, whose numbers were multiplied by 0."""
    block_attention_backend("sdpa_tiles")
    present = torch.ones(2, 12, 12, dtype=torch.bool)
    present[1, :6, :6] = False
    grid = TokenGrid.create([(12, 12)] * 2, num_global_tokens=2, window_size=2, num_context_tokens=16, present=present)
    context = draw_context_tokens(grid)
    assert not context.weights.all()
    states = [torch.randn(*grid.batch_shape, 2, 8).transpose(1, 2) for _ in range(3)]
    expected = block_attention(*states, grid, context=context)
    for part in states:
        part[0, :, 0] = torch.nan
    of_second = slice(grid.image_offsets[1], None)
    actual = block_attention(*states, grid, context=context)
    flat = [output.transpose(1, 2).flatten(0, 1)[of_second] for output in (actual, expected)]
    torch.testing.assert_close(*flat, rtol=0, atol=0)
