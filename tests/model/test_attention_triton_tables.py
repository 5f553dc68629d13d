# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The kernel's tables against the attention pattern: every query in one tile, and its keys those that it sees."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import random_mask
from token_batches import batches

from sparsepath_vit import TokenGrid
from sparsepath_vit.model import attention_triton_tables
from sparsepath_vit.model.attention_specification import attention_pattern
from sparsepath_vit.model.attention_triton_tables import attention_tile_size, attention_tiles


def seen_by_tiles(grid):
    """(M, M) bool, which patch key each patch query sees according to the tables, and how often each query occurs."""
    tiles = attention_tiles(grid)
    is_seen = torch.zeros(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    occurrences = torch.zeros(grid.num_tokens, dtype=torch.int64)
    for size, first, count in tiles.widths():
        for start, end, _, *runs in tiles.table[first : first + count].tolist():
            assert end - start <= size
            for run_start, length in zip(runs[::2], runs[1::2], strict=True):
                is_seen[start:end, run_start : run_start + length] = True
            occurrences[start:end] += 1
    assert sum(count for _, _, count in tiles.widths()) == len(tiles.table)
    return is_seen, occurrences


def patch_pattern(grid):
    """(M, M) bool, which patch key each patch query sees by definition."""
    pattern = torch.block_diag(*[image.float() for image in attention_pattern(grid)]).bool()
    is_patch = torch.zeros(grid.num_tokens, dtype=torch.bool)
    is_patch[grid.patch_indices()] = True
    return pattern & is_patch[:, None] & is_patch, is_patch


def check_tiles(grid):
    is_seen, occurrences = seen_by_tiles(grid)
    pattern, is_patch = patch_pattern(grid)
    assert torch.equal(is_seen, pattern)
    assert torch.equal(occurrences, is_patch.long())
    tiles = attention_tiles(grid)
    assert tiles.image_offsets.tolist() == list(grid.image_offsets)
    for start, end, image_start, *_ in tiles.table.tolist():
        assert start == end or image_start == max(offset for offset in grid.image_offsets if offset <= start)


@settings(max_examples=60)
@given(batches(max_side=12), st.sampled_from([4, 8, 64]), st.sampled_from([1, 10, 256]))
def test_tiles_hold_each_query_once_with_the_keys_it_sees(batch, tile_size, least_tiles):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_triton_tables, "attention_tile_size", lambda window: tile_size)
        patch.setattr(attention_triton_tables, "LEAST_TILES_FOR_NARROW_ONES", least_tiles)
        check_tiles(batch.grid())


@pytest.mark.parametrize("least_tiles", [1, 256])
@pytest.mark.parametrize("window", [2, 8, 14, 16, None])
@pytest.mark.parametrize("radius", [0, 1, 2])
def test_tiles_of_a_pruned_grid_with_empty_block_rows(window, radius, least_tiles, monkeypatch):
    monkeypatch.setattr(attention_triton_tables, "LEAST_TILES_FOR_NARROW_ONES", least_tiles)
    present = random_mask(2, 33, 17, 0.4, seed=3)
    present[0, 8:24] = False
    present[1, :20] = False
    grid = TokenGrid.create(
        [(33, 17)] * 2, num_global_tokens=5, window_size=window, neighbor_radius=radius, present=present
    )
    check_tiles(grid)
    counts = [count // 2 for count in grid.counts]
    kept = torch.cat([torch.arange(counts[0]), grid.counts[0] + torch.arange(counts[1])])
    check_tiles(grid.select(kept, counts))


def test_without_masked_tokens_no_tile_is_empty():
    grid = TokenGrid.create([(33, 17), (16, 16)], num_global_tokens=1, window_size=8)
    table = attention_tiles(grid).table
    assert (table[:, 0] < table[:, 1]).all()


def test_the_number_of_tiles_never_exceeds_what_the_full_grid_needs():
    full = TokenGrid.create([(33, 17)], num_global_tokens=1, window_size=8)
    present = random_mask(1, 33, 17, 0.9, seed=0)
    masked = TokenGrid.create([(33, 17)], num_global_tokens=1, window_size=8, present=present)
    assert len(attention_tiles(masked).table) <= len(attention_tiles(full).table)


def test_tiles_are_made_without_reading_the_device():
    """A read of the device stalls it, and cannot be captured in a CUDA graph; on the meta device it raises."""
    grid = TokenGrid.create([(33, 17), (16, 16)], num_global_tokens=5, window_size=8).to("meta")
    assert attention_tiles(grid).table.device.type == "meta"


def test_large_blocks_get_large_tiles():
    assert [attention_tile_size(window) for window in (2, 8, 15, 16, 64, None)] == [64, 64, 64, 128, 128, 128]


class Lowered(Exception):
    """Inductor took the graph; its code is not compiled, which takes a CPU a minute."""


@pytest.mark.parametrize(("batch", "num_context_tokens"), [(1, 0), (3, 0), (1, 9), (3, 9)])
@pytest.mark.parametrize("is_dynamic", [True, False], ids=["symbolic sizes", "fixed sizes"])
def test_inductor_takes_the_making_of_the_tables(is_dynamic, batch, num_context_tokens, monkeypatch):
    """torch 2.11 failed on the cumulative sum of a filled tensor, and, on GPUs, on a search in a slice."""
    from torch._inductor.graph import GraphLowering

    def stop(self):
        raise Lowered("lowered")

    monkeypatch.setattr(GraphLowering, "compile_to_module", stop)
    monkeypatch.setattr(GraphLowering, "has_feature", lambda *_: True)  # the searches of a GPU

    def tables(pixels):
        size = (pixels.shape[2] // 4, pixels.shape[3] // 4)
        settings = {"num_global_tokens": 3, "window_size": 4, "num_context_tokens": num_context_tokens}
        grid = TokenGrid.create([size] * batch, **settings, device=pixels.device)
        pruned = grid.select(torch.arange(0, sum(grid.counts), 2), [count // 2 for count in grid.counts])
        made = [attention_tiles(one) for one in (grid, pruned)]
        return [one.table if one.context is None else (one.table, *one.context) for one in made]

    torch._dynamo.reset()
    compiled = torch.compile(tables, fullgraph=True, dynamic=is_dynamic)
    with torch._inductor.config.patch(force_disable_caches=True), pytest.raises(Exception, match="lowered"):
        compiled(torch.empty(batch, 3, 48, 52))
