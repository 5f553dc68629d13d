# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Image files and PIL images: which of them have one right meaning as 8-bit RGB, and that meaning."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

try:
    import PIL.Image
    import PIL.ImageOps
except ImportError:  # arrays and tensors do without
    PIL = None

PIL_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")

# TIFF tags
_SAMPLES, _EXTRA_SAMPLES = 277, 338
_LOWEST_VALUES, _LARGEST_VALUES = (280, 340), (281, 341)
_TIFF_FRAMES_AT_MOST = 64  # of which sizes are compared
_pil_limit_lock = threading.Lock()


@contextmanager
def open_without_limit(path: str | os.PathLike) -> Iterator["PIL.Image.Image"]:
    """Opens an image file, its header only, without Pillow's own size limit, which a region of a slide exceeds.

    Raises:
        PIL.UnidentifiedImageError: it is not an image Pillow can read.
    """
    # The limit is a global of Pillow, hence the lock and the shortest possible time.
    with _pil_limit_lock:
        pil_limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
        try:
            image = PIL.Image.open(path)
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = pil_limit
    with image:
        yield image


def reason_to_refuse_pil(image: "PIL.Image.Image") -> str | None:
    """Why a PIL image has no one right meaning as RGB, with the way out; None where its header tells of none.

    Pillow opens much that it does not mean: it takes the first of many pages, the upper byte of 16-bit colours, and
    drops a fourth sample of which the file does not say what it is.
    """
    if image.mode not in PIL_MODES:
        return (
            f"has the mode {image.mode!r}, which has no agreed white level in 8 bits; it takes {PIL_MODES}. "
            "Scale it yourself: for 16 bits pass numpy.asarray(image, dtype='float32') / 65535."
        )
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        extra = tags.get(_EXTRA_SAMPLES, ())
        if tags.get(_SAMPLES, 1) > 3 and image.mode == "RGB" and 0 in (extra if isinstance(extra, tuple) else (extra,)):
            return (
                "has a fourth sample of which it does not say what it is: state it in the tag ExtraSamples (1 "
                "premultiplied, 2 straight transparency), or export it as RGB."
            )
        if _is_deep(image) and not _states_full_range(tags):
            return (
                "has 16-bit samples and does not state which value is white (a 12-bit camera also writes 16-bit "
                "files): scale it to 8-bit RGB first."
            )
    return _refused_frames(image)


def _is_deep(image: "PIL.Image.Image") -> bool:
    """Whether Pillow will drop the lower byte of the file's samples; known until the image is loaded."""
    raw_modes = [
        str(part.args[0] if isinstance(part.args, tuple) else part.args) for part in getattr(image, "tile", ())
    ]
    return image.mode in ("RGB", "RGBA", "LA", "CMYK") and any(";16" in mode for mode in raw_modes)


def _states_full_range(tags: Any) -> bool:
    """Whether a TIFF with 16-bit samples says that they lie in 0..65535."""

    def values(names: tuple[int, int]) -> set[float]:
        found = [tags.get(name, ()) for name in names]
        return {float(value) for values in found for value in (values if isinstance(values, tuple) else (values,))}

    return values(_LARGEST_VALUES) == {65535.0} and values(_LOWEST_VALUES) <= {0.0}


def _refused_frames(image: "PIL.Image.Image") -> str | None:
    """Refuses a file whose first image is not all of it: channels, focal planes, an animation, a macro first."""
    if getattr(image, "filename", "") == "" or image.format == "MPO" or getattr(image, "n_frames", 1) == 1:
        return None  # an image in memory stands for itself; an MPO's second picture is the other eye
    if image.format != "TIFF":
        return f"holds {image.n_frames} pictures of equal rank (a {image.format}): save the one that is meant."
    first, place = image.size, image.tell()
    try:
        for frame in range(1, min(image.n_frames, _TIFF_FRAMES_AT_MOST)):
            image.seek(frame)
            if image.width * image.height >= first[0] * first[1]:
                kind = "of the same size" if image.size == first else f"of {image.width} x {image.height} pixels"
                return (
                    f"holds another page {kind} beside the first of {first[0]} x {first[1]}: channels, focal planes or "
                    "a macro. Save the image that is meant as 8-bit RGB, or read it with sparsepath_vit.slides.Slide."
                )
    finally:
        image.seek(place)
    return None


def pil_to_rgb(image: "PIL.Image.Image", transpose: bool = False) -> tuple[np.ndarray, str | None]:
    """Decodes a PIL image that `reason_to_refuse_pil` lets pass.

    Args:
        image: the image; it is left as it is, but for being loaded (and turned, with `transpose`).
        transpose: turn it upright by its EXIF orientation.

    Returns:
        (height, width, 3) uint8 on white, and why its values have no one right meaning, or None.
    """
    was_deep = _is_deep(image)
    if transpose:
        PIL.ImageOps.exif_transpose(image, in_place=True)
    image.load()
    if image.mode in ("RGBa", "La"):  # premultiplied transparency
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    pixels = np.array(image)  # (height, width, 3)
    refusal = None
    if was_deep and pixels.size and pixels.max() < 64:
        refusal = (
            "has 16-bit samples, none of them in the upper three quarters of their range: a 10-, 12- or 14-bit camera "
            "may have written them. Scale it to 8-bit RGB first."
        )
    return pixels, refusal
