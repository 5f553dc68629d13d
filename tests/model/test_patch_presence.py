# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Which patches are present: each rule against a loop over patches."""

import numpy as np
import pytest
import torch

from sparsepath_vit.model.patch_presence import background_patches, covered_patches


def patches(array, patch_size):
    """Row, column and pixels of each patch of a (height, width) array, the last ones cut short."""
    for row in range(-(-array.shape[0] // patch_size)):
        for column in range(-(-array.shape[1] // patch_size)):
            top, left = row * patch_size, column * patch_size
            yield row, column, array[top : top + patch_size, left : left + patch_size]


@pytest.mark.parametrize("min_coverage", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("height, width", [(14, 14), (15, 27), (21, 20), (24, 24), (41, 28)])
def test_covered_patches(height, width, min_coverage):
    covered = covered_patches(height, width, 14, min_coverage)
    image = np.ones((height, width))
    expected = np.zeros(covered.shape, dtype=bool)
    for row, column, pixels in patches(image, 14):
        expected[row, column] = pixels.size / 14**2 >= min_coverage
    np.testing.assert_array_equal(covered.numpy(), expected)
    assert covered[: height // 14, : width // 14].all()


def test_half_a_patch_is_the_edge_of_the_default():
    assert covered_patches(14 + 7, 14, 14, 0.5).all()
    assert not covered_patches(14 + 6, 14, 14, 0.5)[1].any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("min_fraction", [0.5, 0.95, 1.0])
def test_background_patches(dtype, min_fraction):
    generator = np.random.default_rng(0)
    image = generator.integers(60, 200, (45, 52, 3))
    for _, _, pixels in patches(image, 14):  # some of the pixels of every patch turn white, in some patches all
        white = generator.random(pixels.shape[:2]) < generator.choice([0.3, 0.7, 0.97, 1.0])
        pixels[white] = 240 + generator.integers(-5, 6, 3)
    tensor = torch.from_numpy(image.astype(np.uint8)).permute(2, 0, 1)
    tensor = tensor if dtype == torch.uint8 else tensor / 255
    background = background_patches(tensor, 14, min_fraction)

    is_white = (image.min(-1) >= 0.8 * 255) & (image.max(-1) - image.min(-1) <= 0.08 * 255)
    expected = np.zeros((4, 4), dtype=bool)
    for row, column, pixels in patches(is_white, 14):
        expected[row, column] = pixels.mean() >= min_fraction
    np.testing.assert_array_equal(background.numpy(), expected)
    assert 0 < expected.sum() < expected.size


@pytest.mark.parametrize(
    "color, is_background",
    [
        ((255, 255, 255), True),
        ((243, 243, 243), True),
        ((240, 236, 242), True),  # glass as scanners see it
        ((235, 200, 220), False),  # pale stroma
        ((180, 180, 180), False),  # gray
        ((212, 198, 205), False),  # grayish lilac: bright enough in its brightest channel only
        ((0, 0, 0), False),  # a scanner's missing tile is black, not glass
        ((200, 120, 180), False),
    ],
    ids=str,
)
def test_colors(color, is_background):
    image = torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, 28, 28)
    assert background_patches(image, 14, 0.95).all() == is_background
