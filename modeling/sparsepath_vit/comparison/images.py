# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The image that comparisons use: a user's, or the one that comes along; and one image at several sizes."""

import os

from PIL import Image

from ..model.image_inputs import load_rgb
from ..model.image_processing_sparsepath_vit import SparsePathViTImageProcessor


def read_image(path: str | os.PathLike[str], argument: str = "image") -> Image.Image:
    """The first page of an image file, in RGB.

    Args:
        path: any file Pillow reads.
        argument: what messages call it.

    Raises:
        OSError: it is missing, damaged or no image.
        ValueError: its pixels have no known white, or are too many.
    """
    pixels = load_rgb(path, f"{argument}={os.fspath(path)!r}", SparsePathViTImageProcessor.max_pixels)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def bundled_image() -> Image.Image:
    """The immunohistochemistry image that comes with scikit-image, 512 x 512 px.

    Raises:
        ImportError: scikit-image is missing; the message gives the install command.
    """
    try:
        from skimage.data import immunohistochemistry
    except ImportError as error:
        raise ImportError(
            'The default image comes with scikit-image: pip install "sparsepath-vit[slides]", or name an image.'
        ) from error
    return Image.fromarray(immunohistochemistry())


def resized(image: Image.Image, size: int | None) -> Image.Image:
    """The image with `size` pixels on its longer side; `None` leaves it as it is."""
    if size is None:
        return image
    scale = size / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC)
