# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The image that comparisons use where the user names none, and one image at several sizes."""

from PIL import Image


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
