# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""TokenGrid against the definition of block-major order, for random grids, windows, radii, masks and subsets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import random_mask
from token_batches import batches

from sparsepath_vit import TokenGrid


def positions_of(grid, image):
    """(row, column) of an image's patch tokens, in the grid's order."""
    start = sum(grid.counts[:image])
    tokens = slice(start, start + grid.counts[image])
    return list(zip(grid.rows[tokens].tolist(), grid.columns[tokens].tolist(), strict=True))


def check_blocks(batch, grid):
    """Each block row owns entries of `block_offsets` between which exactly its blocks' packed tokens lie."""
    offsets = grid.block_offsets.tolist()
    entry = 0
    for image, (block_rows, block_columns) in enumerate(grid.block_counts):
        first_packed = grid.image_offsets[image] + grid.num_global_tokens
        positions = positions_of(grid, image)
        for block_row in range(block_rows):
            for block_column in range(block_columns):
                start, end = offsets[entry : entry + 2]
                inside = positions[start - first_packed : end - first_packed]
                expected = [token for token in positions if batch.block(*token) == (block_row, block_column)]
                assert inside == expected
                first_token = sum(grid.counts[:image]) + start - first_packed
                assert grid.blocks[first_token : first_token + len(inside)].tolist() == [entry] * len(inside)
                entry += 1
            entry += 1  # the end of the last block
    assert entry == len(offsets)


@given(batches())
def test_present_tokens_lie_in_block_major_order(batch):
    grid = batch.grid()
    for image in range(len(batch.sizes)):
        expected = sorted(batch.positions(image), key=lambda token: (batch.block(*token), token))
        assert positions_of(grid, image) == expected
    check_blocks(batch, grid)


@given(batches(), st.integers(0, 99))
def test_selection_keeps_order_blocks_and_images(batch, seed):
    grid = batch.grid()
    present = sum(grid.counts)
    is_kept = random_mask(1, 1, present, 0.5, seed)[0, 0]
    kept = is_kept.nonzero()[:, 0]
    counts = [int(share.sum()) for share in is_kept.split(grid.counts)]
    selected = grid.select(kept, counts)
    assert selected.rows.tolist() == grid.rows[kept].tolist()
    assert selected.columns.tolist() == grid.columns[kept].tolist()
    assert selected.images().tolist() == grid.images()[kept].tolist()
    assert selected.grid_sizes == grid.grid_sizes
    check_blocks(batch, selected)


@given(batches())
def test_to_raster_undoes_block_major_order(batch):
    grid = batch.grid()
    packed = torch.full((grid.num_tokens, 3), -1)  # (image, row, column); -1 for global tokens
    packed[grid.patch_indices()] = torch.stack([grid.images(), grid.rows, grid.columns], dim=1)
    packed[grid.global_indices(), 0] = torch.arange(len(batch.sizes)).repeat_interleave(batch.num_global_tokens)
    in_raster = grid.to_raster(packed.view(*grid.batch_shape, 3)).tolist()
    longest = batch.num_global_tokens + max(grid.counts)
    for image in range(len(batch.sizes)):
        expected = [[image, -1, -1]] * batch.num_global_tokens
        expected += [[image, row, column] for row, column in batch.positions(image)]
        expected += [[0, 0, 0]] * (longest - len(expected))
        assert in_raster[image] == expected


@given(batches())
def test_raster_permutation_is_a_permutation_that_keeps_global_tokens(batch):
    grid = batch.grid()
    permutation = grid.raster_permutation()
    assert sorted(permutation.tolist()) == list(range(grid.num_tokens))
    assert torch.equal(permutation[grid.global_indices()], grid.global_indices())
    tokens = torch.randn(grid.num_tokens, 2)
    assert torch.equal(tokens[permutation][torch.argsort(permutation)], tokens)


@given(batches())
def test_images_of_equal_counts_form_a_batch_and_others_are_packed(batch):
    grid = batch.grid()
    counts = [len(batch.positions(image)) for image in range(len(batch.sizes))]
    assert list(grid.counts) == counts
    if len(set(counts)) == 1:
        assert grid.batch_shape == (len(counts), batch.num_global_tokens + counts[0])
    else:
        assert grid.batch_shape == (1, sum(counts) + len(counts) * batch.num_global_tokens)
    starts = [sum(counts[:image]) + image * batch.num_global_tokens for image in range(len(counts) + 1)]
    assert list(grid.image_offsets) == starts


@given(batches())
def test_is_dense_only_where_every_token_sees_its_whole_image(batch):
    every_block_is_near = True
    for rows, columns in batch.sizes:
        last_block = batch.block(rows - 1, columns - 1)
        every_block_is_near &= max(last_block) <= batch.neighbor_radius
    assert batch.grid().is_dense == every_block_is_near


def test_canvas_indices_point_into_the_canvas_of_all_images():
    grid = TokenGrid.create([(2, 3), (4, 1)], num_global_tokens=1, window_size=2)
    canvas = torch.arange(2 * 4 * 3).view(2, 4, 3)
    assert torch.equal(canvas[grid.images(), grid.rows, grid.columns], grid.canvas_indices())


def test_moving_to_another_device_moves_every_tensor():
    grid = TokenGrid.create([(3, 3)], num_global_tokens=1, window_size=2)
    moved = grid.to("meta")
    tensors = ("rows", "columns", "blocks", "block_offsets", "entry_shifts")
    assert all(getattr(moved, name).device.type == "meta" for name in tensors)
    assert (moved.grid_sizes, moved.counts) == (grid.grid_sizes, grid.counts)
    assert grid.to("cpu") is grid


def test_grids_made_from_another_share_nothing_that_was_prepared_for_it():
    grid = TokenGrid.create([(3, 3)], num_global_tokens=1, window_size=2)
    grid.prepared["a backend"] = "its tables"
    made = [grid.to("meta"), grid.select(torch.arange(4), [4]), grid.with_global_tokens(2)]
    assert [one.prepared for one in made] == [{}, {}, {}]
    assert TokenGrid.create([(3, 3)], num_global_tokens=1, window_size=2).prepared == {}


class TestBadInput:
    def create(self, sizes, present=None):
        return TokenGrid.create(sizes, num_global_tokens=1, window_size=2, present=present)

    def test_an_image_without_present_tokens(self):
        present = torch.ones(2, 3, 3, dtype=torch.bool)
        present[1] = False
        with pytest.raises(ValueError, match=r"patch_mask leaves image 1 without a present patch token.*Drop"):
            self.create([(3, 3), (3, 3)], present)

    def test_a_mask_that_covers_only_the_padding_of_a_smaller_image(self):
        present = torch.zeros(1, 3, 3, dtype=torch.bool)
        present[0, 2, 2] = True
        with pytest.raises(ValueError, match="patch_mask leaves image 0"):
            self.create([(2, 2)], present)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
    def test_a_mask_that_is_not_bool(self, dtype):
        with pytest.raises(ValueError, match=rf"patch_mask is {dtype}: it takes torch.bool"):
            self.create([(3, 3)], torch.ones(1, 3, 3, dtype=dtype))

    @pytest.mark.parametrize("shape", [(1, 2, 3), (1, 3, 2), (2, 3, 3), (3, 3), (1, 9), (1, 1, 3, 3)])
    def test_a_mask_of_another_shape(self, shape):
        with pytest.raises(ValueError, match=r"patch_mask has shape \(.*\(1, 3, 3\)"):
            self.create([(3, 3)], torch.ones(shape, dtype=torch.bool))

    @pytest.mark.parametrize("size", [(0, 3), (3, 0)])
    def test_a_grid_without_tokens(self, size):
        with pytest.raises(ValueError, match=rf"grid_sizes holds \({size[0]}, {size[1]}\)"):
            self.create([size])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"window_size": 0}, "window_size=0 is not possible: it takes at least 1, or None"),
        ({"neighbor_radius": -1}, "neighbor_radius=-1 is not possible: it takes at least 0"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        TokenGrid.create([(3, 3)], num_global_tokens=1, **{"window_size": 2, **setting})
