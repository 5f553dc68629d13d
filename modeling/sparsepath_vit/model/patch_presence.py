# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Which patches of an image are present: enough of them is image rather than padding, and not all of it is glass."""

import torch

from .image_inputs import white_level

# A pixel is white background where its darkest channel is at least this bright and its channels differ by at most this
# much (both as shares of white). Glass measures 0.90 to 0.97 with a spread below 0.03, pale stroma a spread above 0.1.
BACKGROUND_MIN_BRIGHTNESS = 0.8
BACKGROUND_MAX_SPREAD = 0.08


def covered_patches(height: int, width: int, patch_size: int, min_coverage: float) -> torch.Tensor:
    """Which patches of an image's grid hold enough of the image.

    Args:
        height: of the image in pixels, before padding.
        width: likewise.
        patch_size: pixels per patch side.
        min_coverage: share of a patch's pixels that must lie in the image.

    Returns:
        `torch.Tensor`: (ceil(height / patch_size), ceil(width / patch_size)) bool, True = present. True everywhere
        but in a last row or column that the image fills too little.
    """

    def coverage(length: int) -> torch.Tensor:
        starts = torch.arange(0, length, patch_size, dtype=torch.float64)
        return (length - starts).clamp(max=patch_size) / patch_size

    return coverage(height)[:, None] * coverage(width) >= min_coverage


def background_patches(image: torch.Tensor, patch_size: int, min_fraction: float) -> torch.Tensor:
    """Which patches are white slide background.

    A pixel counts as white where its darkest channel is at least 80 % of white and its channels differ by at most 8 %
    of white; a patch where at least `min_fraction` of its pixels inside the image do.

    Args:
        image: (3, height, width), uint8 in 0..255 or float32 in 0..1.
        patch_size: pixels per patch side.
        min_fraction: share of white pixels from which a patch is background.

    Returns:
        `torch.Tensor`: (ceil(height / patch_size), ceil(width / patch_size)) bool, True = background.
    """
    white = white_level(image)
    darkest, brightest = image.amin(dim=0), image.amax(dim=0)
    is_white = (darkest >= BACKGROUND_MIN_BRIGHTNESS * white) & (brightest - darkest <= BACKGROUND_MAX_SPREAD * white)
    # With ceil_mode the average is over the pixels that exist, so a partly padded patch is judged by its image pixels.
    share = torch.nn.functional.avg_pool2d(is_white[None].float(), patch_size, ceil_mode=True)[0]
    return share >= min_fraction
