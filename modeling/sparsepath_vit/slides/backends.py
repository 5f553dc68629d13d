# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The three ways to read a slide file: OpenSlide, tifffile for what OpenSlide refuses, Pillow for plain images.

A backend knows its levels, the resolution the file states, and how to read a rectangle that lies inside one level.
Everything else (coordinates, resampling, padding) is `Slide`'s.
"""

import math
import struct
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

from ..runtime.extras import require
from . import resolution
from .resolution import MppXY

_PLAIN_IMAGES = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"RIFF")
_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
DAMAGED = "If it is a slide, it is damaged or truncated: copy it again and compare its size with the original."
_PLAIN_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
_DAMAGED_IMAGE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)  # what Pillow raises


class SlideError(ValueError):
    """A slide cannot be read, or not as asked. The message names the file and the way out."""


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
    """Opens `path` with the first backend that takes it; decoded tiles are cached up to `cache_bytes`.

    Raises:
        SlideError: the file is missing, a folder, unreadable, empty, or no backend takes it; the reasons are listed.
        ImportError: a library of the `slides` extra is missing.
    """
    magic = _first_bytes(path)
    if magic.startswith(_PLAIN_IMAGES):
        attempts = [PillowBackend]
    elif magic.startswith(_TIFF):
        attempts = [OpenSlideBackend, TifffileBackend]
    else:
        attempts = [OpenSlideBackend, PillowBackend]
    reasons = []
    for attempt in attempts:
        try:
            backend = attempt(path, cache_bytes)
        except SlideError as error:
            reasons.append(f"{attempt.name}: {error}")
            continue
        return _with_all_levels(backend, path, cache_bytes)
    raise SlideError(
        f"{path} cannot be read as a slide ({'; '.join(reasons)}). It starts with {magic[:8]!r}. {DAMAGED}"
    )


def _first_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            magic = file.read(16)
    except FileNotFoundError as error:
        raise SlideError(f"{path} does not exist: check the path.") from error
    except IsADirectoryError as error:
        raise SlideError(f"{path} is a folder, not a slide: pass the slide files in it.") from error
    except PermissionError as error:
        raise SlideError(f"{path} may not be read by this user: check its permissions (chmod u+r).") from error
    except OSError as error:
        raise SlideError(f"{path} cannot be read: {error}.") from error
    if not magic:
        raise SlideError(f"{path} is empty (0 bytes): copy it again.")
    return magic


def _with_all_levels(backend: Backend, path: Path, cache_bytes: int) -> Backend:
    """OpenSlide sees only level 0 of an OME-TIFF whose pyramid lies in SubIFDs: take tifffile where it sees more."""
    if not (isinstance(backend, OpenSlideBackend) and backend.is_ome_tiff and len(backend.level_dimensions) == 1):
        return backend
    try:
        other = TifffileBackend(path, cache_bytes)
    except SlideError:
        return backend
    if len(other.level_dimensions) > 1:
        backend.close()
        return other
    other.close()
    return backend


class OpenSlideBackend:
    """All formats of OpenSlide."""

    name = "OpenSlide"

    def __init__(self, path: Path, cache_bytes: int) -> None:
        self._openslide = require("openslide")
        self._path, self._cache_bytes = path, cache_bytes
        self._slide = self._open()
        self.level_dimensions, self._downsamples = self._slide.level_dimensions, self._slide.level_downsamples
        self.objective_power = self._slide.properties.get("openslide.objective-power")
        self.is_ome_tiff = "<OME" in self._slide.properties.get("tiff.ImageDescription", "")
        self.stated_mpp = self._find_mpp()

    def _open(self) -> Any:
        try:
            slide = self._openslide.OpenSlide(self._path)
        except self._openslide.OpenSlideError as error:
            raise SlideError(str(error)) from error
        slide.set_cache(self._openslide.OpenSlideCache(self._cache_bytes))
        return slide

    def _find_mpp(self) -> MppXY | None:
        properties = self._slide.properties
        found = resolution.credible_pair(properties.get("openslide.mpp-x"), properties.get("openslide.mpp-y"))
        found = found or resolution.credible_pair(properties.get("aperio.MPP"), properties.get("aperio.MPP"))
        if self.is_ome_tiff:
            found = resolution.from_ome(properties["tiff.ImageDescription"], self.level_dimensions[0]) or found
        return found

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """See `Backend.read`."""
        slide, downsample = self._slide, self._downsamples[level]
        where = (round(x * downsample), round(y * downsample))
        try:
            region = slide.read_region(where, level, (width, height))
        except self._openslide.OpenSlideError:
            region = self._read_again(slide, where, level, (width, height))
        return _on_white(region)

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


class TifffileBackend:
    """Tiled or striped TIFFs that OpenSlide refuses. Only the tiles of a rectangle are decoded, never a whole level."""

    name = "tifffile"
    objective_power = None

    def __init__(self, path: Path, cache_bytes: int) -> None:
        tifffile = require("tifffile")
        require("imagecodecs")
        try:
            self._file = tifffile.TiffFile(path)
            series = max(self._file.series, key=lambda series: math.prod(series.shape))
            self._pages = [level.keyframe for level in series.levels]
            self._check_colours(series)
            self._check_complete()
        except (ValueError, OSError, LookupError, TypeError, struct.error, tifffile.OmeXmlError) as error:
            if hasattr(self, "_file"):
                self._file.close()
            raise SlideError(str(error) or repr(error)) from error
        self.level_dimensions = tuple((page.imagewidth, page.imagelength) for page in self._pages)
        self.stated_mpp = self._find_mpp()
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._cached_bytes, self._cache_bytes = 0, cache_bytes

    def _check_colours(self, series: Any) -> None:
        page = self._pages[0]
        if page.dtype != np.uint8 or page.samplesperpixel not in (1, 3, 4):
            raise SlideError(
                f"holds {page.samplesperpixel} channels of type {page.dtype}; a bright-field slide has 1, 3 or 4 "
                "channels of uint8. Convert it to 8-bit RGB first"
            )
        if series.axes not in ("YXS", "YX", "SYX"):
            raise SlideError(f"its axes are {series.axes}, not one RGB image: export a single plane as RGB first")
        if page.photometric.name not in ("RGB", "YCBCR", "MINISBLACK", "PALETTE"):
            raise SlideError(f"its colours are stored as {page.photometric.name}: export it as RGB first")

    def _check_complete(self) -> None:
        """A file cut short can still show its first levels: refuse it rather than embed what is left of it."""
        pages, handle = self._file.pages, self._file.filehandle
        count = len(pages)  # walks the chain of pages to where it ends or breaks
        handle.seek(pages.next_page_offset)
        link = handle.read(self._file.tiff.offsetsize)
        if len(link) < self._file.tiff.offsetsize or any(link):
            raise SlideError(f"the file ends before page {count + 1}")
        for level, page in enumerate(self._pages):
            if any(
                offset + size > handle.size for offset, size in zip(page.dataoffsets, page.databytecounts, strict=True)
            ):
                raise SlideError(f"the file ends inside the tiles of level {level}")

    def _find_mpp(self) -> MppXY | None:
        page = self._pages[0]
        found = None
        if self._file.ome_metadata:
            found = resolution.from_ome(self._file.ome_metadata, self.level_dimensions[0])
        found = found or resolution.from_aperio(page.description)
        if found is None and "XResolution" in page.tags and "YResolution" in page.tags:
            unit = {2: "inch", 3: "cm"}.get(int(page.tags.valueof("ResolutionUnit", 2)), "none")
            pixels = [_ratio(page.tags[name].value) for name in ("XResolution", "YResolution")]
            found = resolution.from_resolution_tags(*pixels, unit)
        return found

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """See `Backend.read`."""
        page = self._pages[level]
        chunk_height, chunk_width = (
            (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        )
        columns = -(-page.imagewidth // chunk_width)
        region = np.full((height, width, 3), 255, dtype=np.uint8)
        for row in range(y // chunk_height, -(-(y + height) // chunk_height)):
            for column in range(x // chunk_width, -(-(x + width) // chunk_width)):
                chunk = self._chunk(level, row * columns + column)
                top, left = max(row * chunk_height, y), max(column * chunk_width, x)
                part = chunk[top - row * chunk_height :, left - column * chunk_width :]
                part = part[: y + height - top, : x + width - left]
                region[top - y : top - y + part.shape[0], left - x : left - x + part.shape[1]] = part
        return region

    def _chunk(self, level: int, index: int) -> np.ndarray:
        """The decoded tile or strip as (height, width, 3), from the cache or the file."""
        with self._lock:
            if (level, index) in self._cache:
                self._cache.move_to_end((level, index))
                return self._cache[level, index]
        chunk = self._decode(level, index)  # without the lock: threads decode side by side
        with self._lock:
            if (level, index) not in self._cache:
                self._cache[level, index] = chunk
                self._cached_bytes += chunk.nbytes
            while self._cached_bytes > self._cache_bytes and len(self._cache) > 1:
                self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return chunk

    def _decode(self, level: int, index: int) -> np.ndarray:
        page = self._pages[level]
        # Planar files keep one set of chunks per colour, one set after the other.
        planes = page.samplesperpixel if page.planarconfig == 2 else 1
        step = len(page.dataoffsets) // planes
        parts = [self._decode_segment(page, index + plane * step) for plane in range(planes)]
        chunk = np.concatenate(parts, axis=-1)
        if page.colormap is not None:
            chunk = (page.colormap.T[chunk[..., 0]] >> 8).astype(np.uint8)
        if chunk.shape[-1] == 1:
            chunk = np.repeat(chunk, 3, axis=-1)
        return _on_white(Image.fromarray(chunk)) if chunk.shape[-1] == 4 else chunk

    def _decode_segment(self, page: Any, index: int) -> np.ndarray:
        offset, size = page.dataoffsets[index], page.databytecounts[index]
        try:
            with self._lock:
                self._file.filehandle.seek(offset)
                data = self._file.filehandle.read(size) if size else None
            segment, _, shape = page.decode(data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader)
        except (ValueError, OSError, RuntimeError, struct.error) as error:
            raise SlideError(f"tile {index} cannot be decoded: {error}") from error
        # A tile that was never written has no bytes: the scanner found nothing there. (depth 1, height, width, samples)
        return np.full(shape[1:], 255, dtype=np.uint8) if segment is None else segment[0]

    def close(self) -> None:
        """See `Backend.close`."""
        self._file.close()


class PillowBackend:
    """A PNG, JPEG or other plain image: one level, decoded whole at the first read."""

    name = "Pillow"
    objective_power = None

    def __init__(self, path: Path, cache_bytes: int) -> None:
        self._path = path
        try:
            with Image.open(path) as image:
                if image.mode not in _PLAIN_MODES:
                    raise SlideError(f"its pixels are of mode {image.mode}, not 8-bit colour: convert it to RGB first")
                turned = image.getexif().get(0x0112, 1) >= 5  # EXIF orientations 5..8 swap the axes
                self.level_dimensions = (image.size[::-1] if turned else image.size,)
                dpi = image.info.get("dpi") or (None, None)
        except _DAMAGED_IMAGE as error:
            raise SlideError(_without_path(error)) from error
        self.stated_mpp = resolution.from_resolution_tags(float(dpi[0] or 0), float(dpi[1] or 0), "inch")
        self._pixels: np.ndarray | None = None
        self._lock = threading.Lock()

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """See `Backend.read`."""
        with self._lock:
            if self._pixels is None:
                self._pixels = self._decode()
        return self._pixels[y : y + height, x : x + width].copy()

    def _decode(self) -> np.ndarray:
        try:
            with Image.open(self._path) as image:
                return _on_white(ImageOps.exif_transpose(image))
        except _DAMAGED_IMAGE as error:
            raise SlideError(_without_path(error)) from error

    def close(self) -> None:
        """See `Backend.close`."""
        self._pixels = None


def _on_white(image: Image.Image) -> np.ndarray:
    """`image` composited on white, as (height, width, 3) uint8; opaque pixels are unchanged."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return np.asarray(image.convert("RGB")).copy()
    image = image.convert("RGBA")
    if image.getextrema()[3][0] == 255:
        return np.ascontiguousarray(np.asarray(image)[..., :3])
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB")).copy()


def _ratio(value: tuple[int, int]) -> float | None:
    return value[0] / value[1] if value[1] else None


def _without_path(error: Exception) -> str:
    """Pillow repeats the path in its message; the caller names it already."""
    return "not an image it knows" if isinstance(error, Image.UnidentifiedImageError) else str(error)
