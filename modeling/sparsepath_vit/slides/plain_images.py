# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""PNG, JPEG and other plain images: one level, decoded whole at the first read, by the image processor's rules."""

import logging
import threading
from pathlib import Path

import numpy as np
from PIL import Image

from ..model.pillow_images import open_without_limit, pil_to_rgb, reason_to_refuse_pil
from . import resolution
from .declared_sizes import check_plain_image
from .description import SlideDescription, Statement, describe
from .errors import DAMAGED, DeclaredSizeError, SlideError, UnsupportedSlideError, decoding

logger = logging.getLogger(__name__)

_MOST_PIXELS = 2**29  # 1.6 GB of RGB
_EXIF_ORIENTATION = 0x0112


def describe_image(path: Path) -> SlideDescription:
    """Describes a plain image by its header; without levels where Pillow does not know the file."""
    try:
        with decoding(), open_without_limit(path) as image:
            check_plain_image(image.format, image.size, len(image.getbands()), path.stat().st_size)
            orientation = int(image.getexif().get(_EXIF_ORIENTATION, 1))
            size = image.size[::-1] if orientation >= 5 else image.size  # 5..8 swap the axes
            refusal = _sentence(reason_to_refuse_pil(image))
            found = SlideDescription(
                path, image.format or "image", readers=("Pillow",), levels=(size,), axes="YX", tiled=False,
                orientation=orientation, codec=image.format, resolution=_resolution(image),
            )  # fmt: skip
    except DeclaredSizeError as error:
        raise SlideError(f"{path} cannot be read as an image: {error}. {DAMAGED}") from error
    except SlideError as error:
        if isinstance(error.__cause__, MemoryError):  # a PNG is decoded for its EXIF, which may lie at its end
            raise SlideError(f"{path} cannot be read: {error}.") from error
        logger.debug("Pillow cannot describe %s: %s", path, error)
        return SlideDescription(path, "image", readers=("Pillow",))
    if refusal is None and size[0] * size[1] > _MOST_PIXELS:
        refusal = (
            f"it is {size[0]} x {size[1]} pixels, and a {found.format} can only be decoded whole: convert it to a "
            "tiled TIFF, such as vips tiffsave IN OUT.tif --tile --pyramid --compression deflate"
        )
    return SlideDescription(**{**vars(found), "refusal": refusal, "readers": () if refusal else found.readers})


def _sentence(refusal: str | None) -> str | None:
    """The image processor's words, which follow an image's name, as they follow "because"."""
    return f"it {refusal.rstrip('.')}" if refusal else None


def _resolution(image: Image.Image) -> Statement | None:
    dpi = image.info.get("dpi") or (None, None)
    mpp = resolution.from_resolution_tags(float(dpi[0] or 0), float(dpi[1] or 0), "inch")
    return Statement(mpp, f"{image.format} pixels per inch") if mpp else None


class PillowBackend:
    """A PNG, JPEG or other plain image: one level, decoded whole at the first read."""

    name = "Pillow"
    objective_power = None

    def __init__(self, path: Path, cache_bytes: int, description: SlideDescription | None = None) -> None:
        description = description or describe(path)
        if description.refusal:
            raise UnsupportedSlideError(description.refusal)
        self._path = path
        if not description.levels or "Pillow" not in description.readers:
            _raise_reason(path)
        self.level_dimensions = description.levels
        self.stated_mpp = description.resolution.mpp if description.resolution else None
        self._pixels: np.ndarray | None = None
        self._lock = threading.Lock()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """See `Backend.read`."""
        with self._lock:
            if self._pixels is None:
                self._pixels = self._decode()
        return self._pixels[y : y + height, x : x + width].copy()

    def _decode(self) -> np.ndarray:
        with decoding(), open_without_limit(self._path) as image:
            pixels, refusal = pil_to_rgb(image, transpose=True)
        if refusal:
            raise UnsupportedSlideError(_sentence(refusal))
        return pixels

    def close(self) -> None:
        """See `Backend.close`."""
        self._pixels = None


def _raise_reason(path: Path) -> None:
    """Says what Pillow says of a file that it does not open."""
    with decoding():
        try:
            with open_without_limit(path):
                pass
        except Image.UnidentifiedImageError as error:  # which repeats the path; the caller names it already
            raise SlideError("not an image it knows") from error
    raise SlideError("not a plain image")
