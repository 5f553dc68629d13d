# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Who reads a slide file: OpenSlide, tifffile for what that would not read rightly, Pillow for plain images.

A backend knows its levels, the resolution the file states, and how to read a rectangle that lies inside one level.
Everything else (coordinates, resampling, padding) is `Slide`'s.
"""

import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..runtime.extras import require
from .description import GENERIC, SlideDescription, describe, first_bytes
from .errors import DAMAGED, SlideError, UnsupportedSlideError, decoding
from .plain_images import PillowBackend
from .resolution import MppXY
from .samples import image_on_white
from .tiff_backend import TifffileBackend

# How OpenSlide says that it lacks something; "Unsupported marker" and the like are said of damaged pictures.
_NOT_SUPPORTED = re.compile(
    r"Unsupported (TIFF compression|transfer syntax)|Unrecognized subblock dimension|not supported$"
)


class Backend(Protocol):
    """One open slide file."""

    name: str
    level_dimensions: tuple[tuple[int, int], ...]  # (width, height) per level, finest first
    stated_mpp: MppXY | None
    objective_power: str | None

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """The rectangle at level pixels (x, y), which lies inside the level, as (height, width, 3) uint8."""

    def close(self) -> None:
        """Gives the file back."""


def open_backend(path: Path, cache_bytes: int) -> Backend:
    """Opens `path` with the first of its description's readers that takes it.

    Args:
        path: the slide file.
        cache_bytes: decoded tiles are cached up to these.

    Raises:
        SlideError: the file is missing, a folder, unreadable, empty or damaged; the reasons of all readers are listed.
        UnsupportedSlideError: it is sound, and holds what has no one right meaning as RGB or no decoder here.
        ImportError: a library of the `slides` extra is missing.
    """
    description = describe(path)
    if description.refusal:
        raise UnsupportedSlideError(f"{path} is not supported here, because {description.refusal}.")
    reasons, is_sound = [], True
    for name in description.readers:
        try:
            backend = _BACKENDS[name](path, cache_bytes, description)
        except SlideError as error:
            reasons.append(f"{name}: {error}")
            is_sound &= isinstance(error, UnsupportedSlideError)
            continue
        if name == "OpenSlide" and "tifffile" in description.readers and not _sees_all(backend, description):
            backend.close()
            continue
        return backend
    if is_sound:
        raise UnsupportedSlideError(f"{path} is not supported here, because {'; '.join(reasons)}.")
    raise SlideError(
        f"{path} cannot be read as a slide ({'; '.join(reasons)}). It starts with {first_bytes(path)[:8]!r}. {DAMAGED}"
    )


def _sees_all(backend: Backend, description: SlideDescription) -> bool:
    """Whether OpenSlide sees the image that was chosen, with all its levels.

    Of a file of no scanner it takes the first image, be it the macro, and no levels that lie in SubIFDs.
    """
    if description.vendor != GENERIC:
        return True
    levels = backend.level_dimensions
    return levels[0] == description.levels[0] and len(levels) >= len(description.levels)


class OpenSlideBackend:
    """All formats of OpenSlide, where its conversion to RGB is right."""

    name = "OpenSlide"

    def __init__(self, path: Path, cache_bytes: int, description: SlideDescription | None = None) -> None:
        description = description or describe(path)
        if "OpenSlide" not in description.readers:
            raise UnsupportedSlideError(description.refusal or "OpenSlide does not read its pixels rightly")
        self._openslide = require("openslide")
        self._path, self._cache_bytes = path, cache_bytes
        with decoding():
            self._slide = self._open()
        self.level_dimensions, self._downsamples = self._slide.level_dimensions, self._slide.level_downsamples
        self.objective_power = self._slide.properties.get("openslide.objective-power")
        self.stated_mpp = description.resolution.mpp if description.resolution else None

    def _open(self) -> Any:
        try:
            slide = self._openslide.OpenSlide(self._path)
        except self._openslide.OpenSlideError as error:
            # A codec that libtiff was built without (tifffile may have it), another transfer syntax of DICOM, focal
            # planes of a CZI: such a file is sound.
            kind = UnsupportedSlideError if _NOT_SUPPORTED.search(str(error)) else SlideError
            raise kind(str(error)) from error
        slide.set_cache(self._openslide.OpenSlideCache(self._cache_bytes))
        return slide

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """See `Backend.read`."""
        slide, downsample = self._slide, self._downsamples[level]
        where = (round(x * downsample), round(y * downsample))
        with decoding():
            try:
                region = slide.read_region(where, level, (width, height))
            except self._openslide.OpenSlideError:
                region = self._read_again(slide, where, level, (width, height))
        return image_on_white(region)

    def _read_again(self, refused: Any, where: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        """A file refuses every read after a failed one, also what other threads ask of it: only a new one can tell."""
        if self._slide is refused:
            self._slide = self._open()  # the refused file is closed when the last thread lets go of it
        slide = self._open()
        try:
            return slide.read_region(where, level, size)
        except self._openslide.OpenSlideError as error:
            raise SlideError(str(error)) from error
        finally:
            slide.close()

    def close(self) -> None:
        """See `Backend.close`."""
        self._slide.close()


_BACKENDS = {backend.name: backend for backend in (OpenSlideBackend, TifffileBackend, PillowBackend)}
