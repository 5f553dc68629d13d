# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""How much of what the kernel computes counts: the query-key slots of its real tile tables, however tokens are kept."""

import pytest
import torch
from skimage.data import immunohistochemistry

from sparsepath_vit import SparsePathViTModel, TokenGrid, tiny_checkpoint
from sparsepath_vit.model.attention_triton_tables import attention_tiles
from studies.benchmarks.attention import AttentionCase

pytest.importorskip("triton")

from sparsepath_vit.model.attention_triton_launch import launch_shape


def useful_share(grid, dtype=torch.bfloat16, head_dim=64, capability=9):
    """Of the query-key slots that the forward kernel computes, the share that counts, and the share that is masked."""
    tiles = attention_tiles(grid)
    useful = executed = masked = 0
    for size, first, count in tiles.widths():
        shape = launch_shape("forward", head_dim, dtype, size, capability)
        for start, end, _, *runs in tiles.table[first : first + count].tolist():
            lengths = runs[1::2]
            whole = sum(length // shape.block_n * shape.block_n for length in lengths)
            rest = sum(length % shape.block_n for length in lengths) + tiles.num_global_tokens
            half = shape.block_n // 2
            bounded = -(-(rest % half) // 16) * 16
            programs = -(-(end - start) // shape.block_m)
            useful += (end - start) * (sum(lengths) + tiles.num_global_tokens)
            executed += programs * shape.block_m * (whole + rest // half * half + bounded)
            masked += programs * shape.block_m * bounded
    return useful / executed, masked / executed


@pytest.mark.parametrize(("is_clustered", "least_share"), [(False, 0.65), (True, 0.85)], ids=["random", "clustered"])
def test_most_slots_that_are_computed_count_where_tokens_were_pruned(is_clustered, least_share):
    """Regression: tiles that spanned blocks computed 1.5 to 2 slots for one that counts, nearly all behind a mask."""
    case = AttentionCase(60_025, 8, 0.4, 1, 64, torch.bfloat16, "cpu", is_clustered=is_clustered)
    share, masked = useful_share(case.grid())
    assert share >= least_share
    assert masked <= 0.2


@pytest.mark.parametrize(("window", "least_share"), [(8, 0.95), (14, 0.9), (16, 0.95), (64, 0.95)])
def test_most_slots_that_are_computed_count_where_no_token_was_pruned(window, least_share):
    share, masked = useful_share(AttentionCase(60_025, window, 1.0, 1, 64, torch.bfloat16, "cpu").grid())
    assert share >= least_share
    assert masked <= 0.05


def test_most_slots_that_are_computed_count_in_the_prune_map_of_a_real_image():
    pixels = torch.from_numpy(immunohistochemistry()).permute(2, 0, 1)[None].float() / 127.5 - 1.0
    pixels = torch.nn.functional.interpolate(pixels, size=(2044, 2044), mode="bilinear")
    model = SparsePathViTModel.from_pretrained(tiny_checkpoint(), dtype=torch.float32, prune_ratio=0.6, window_size=8)
    with torch.inference_mode():
        positions = model(pixels).patch_positions[0]
    present = torch.zeros(1, 146, 146, dtype=torch.bool)
    present[0, positions[:, 0], positions[:, 1]] = True
    grid = TokenGrid.create([(146, 146)], num_global_tokens=5, window_size=8, present=present)
    share, masked = useful_share(grid)
    assert share >= 0.65
    assert masked <= 0.2
