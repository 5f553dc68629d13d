# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Tiny slides with real structure (tiled, pyramidal TIFFs) and tissue-like pixels, written by the tests themselves."""

import numpy as np
import tifffile


def stained_image(width, height, tissue, seed=0):
    """(height, width, 3) uint8: pink tissue with dark nuclei in the boxes (x, y, width, height), else white."""
    generator = np.random.default_rng(seed)
    repeats = (-(-height // 256), -(-width // 256))
    nuclei = np.tile(generator.random((256, 256)) < 0.15, repeats)[:height, :width, None]
    noise = np.tile(generator.integers(-4, 5, (256, 256, 3), dtype=np.int8), (*repeats, 1))[:height, :width]
    image = np.full((height, width, 3), 243, dtype=np.uint8)
    stained = np.where(nuclei, np.uint8([96, 60, 140]), np.uint8([214, 150, 190]))
    for x, y, box_width, box_height in tissue:
        box = np.s_[y : y + box_height, x : x + box_width]
        image[box] = stained[box]
    return image + noise.view(np.uint8)  # no value is near 0 or 255: the sum wraps to the right one


def write_pyramid(path, image, mpp=0.5, factors=(4,), tile=64, compression="deflate", description=None):
    """A tiled TIFF that OpenSlide reads as generic-tiff; `mpp` goes into the resolution tags (None: none)."""
    tags = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"} if mpp else {"resolutionunit": "NONE"}
    options = {"tile": (tile, tile), "compression": compression, "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(image, description=description, **tags, **options)
        for factor in factors:
            height, width = (side // factor for side in image.shape[:2])
            blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
            tiff.write(blocks.mean((1, 3)).astype(np.uint8), subfiletype=1, **options)
    return path
