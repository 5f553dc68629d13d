# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Reads tiled and striped TIFFs with tifffile: only the tiles of a rectangle are decoded, never a whole level."""

import threading
from collections import OrderedDict
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.extras import require
from .declared_sizes import places_of_chunks
from .description import SlideDescription, describe
from .errors import SlideError, UnsupportedSlideError, decoding
from .ome_parts import open_parts
from .samples import to_rgb

# How a stored image is turned to be displayed, and a displayed rectangle's place in the stored one: orientations of
# TIFF as (transpose, mirror columns, mirror rows), the transposition first.
_ORIENTATIONS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


class TifffileBackend:
    """TIFFs by their tags, where OpenSlide does not read them or would misread their samples."""

    name = "tifffile"
    objective_power = None

    def __init__(self, path: Path, cache_bytes: int, description: SlideDescription | None = None) -> None:
        description = description or describe(path)
        if description.refusal or (description.samples is not None and "tifffile" not in description.readers):
            raise UnsupportedSlideError(description.refusal or "tifffile does not read its pixels rightly")
        tifffile = require("tifffile")
        require("imagecodecs")
        with decoding(), ExitStack() as close_after_failure:
            self._file = close_after_failure.enter_context(tifffile.TiffFile(path))
            if description.series >= len(self._file.series):
                raise SlideError("it holds no image")
            levels = self._file.series[description.series].levels
            self._levels = [list(level.pages) for level in levels]
            self._keyframes = [level.keyframe for level in levels]
            for file in (self._file, *open_parts(self._file, [page for pages in self._levels for page in pages])):
                _check_complete(file)
            self._check_chunks()
            close_after_failure.pop_all()
        if description.samples is None:
            self._file.close()
            raise SlideError("its tags cannot be understood")
        self._samples = description.samples
        self._is_transposed, self._mirrors_columns, self._mirrors_rows = _ORIENTATIONS[description.orientation]
        self._stored_sizes = tuple((page.imagewidth, page.imagelength) for page in self._keyframes)
        self.level_dimensions = tuple(size[::-1] if self._is_transposed else size for size in self._stored_sizes)
        self.stated_mpp = description.resolution.mpp if description.resolution else None
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._cached_bytes, self._cache_bytes = 0, cache_bytes

    def _check_chunks(self) -> None:
        """As `_check_complete`, for what the pages of each level point to."""
        for level, level_pages in enumerate(self._levels):
            for page in level_pages:
                most = page.parent.filehandle.size
                if any(offset + size > most for offset, size in places_of_chunks(page)):
                    raise SlideError(f"the file ends inside the tiles of level {level}")

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """See `Backend.read`."""
        level_width, level_height = self.level_dimensions[level]
        if self._mirrors_columns:
            x = level_width - x - width
        if self._mirrors_rows:
            y = level_height - y - height
        if self._is_transposed:
            x, y, width, height = y, x, height, width
        region = self._read_stored(level, x, y, width, height)  # (rows, columns, 3) as they lie in the file
        if self._is_transposed:
            region = region.transpose(1, 0, 2)
        if self._mirrors_columns:
            region = region[:, ::-1]
        if self._mirrors_rows:
            region = region[::-1]
        return np.ascontiguousarray(region)

    def _read_stored(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        page = self._keyframes[level]
        chunk_height, chunk_width = self._chunk_shape(level)
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
        pages = self._levels[level]  # one, or one for each colour
        # Planar files keep one set of chunks per colour, one set after the other.
        planes = self._keyframes[level].samplesperpixel if self._keyframes[level].planarconfig == 2 else 1
        step = len(pages[0].dataoffsets) // planes
        parts = [self._decode_segment(level, page, index + plane * step) for page in pages for plane in range(planes)]
        if any(part is None for part in parts):
            # A tile that was never written has no bytes: the scanner found nothing there.
            return np.full((*self._chunk_shape(level), 3), 255, dtype=np.uint8)
        with decoding(f"tile {index} cannot be converted to RGB"):
            return to_rgb(np.concatenate(parts, axis=-1), self._samples)

    def _chunk_shape(self, level: int) -> tuple[int, int]:
        page = self._keyframes[level]
        return (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)

    def _decode_segment(self, level: int, page: Any, index: int) -> np.ndarray | None:
        """(height, width, samples) without the tile's padding; None where the file holds no bytes for it."""
        keyframe, handle = self._keyframes[level], page.parent.filehandle  # another file's for parts of an OME-TIFF
        offset, size = page.dataoffsets[index], page.databytecounts[index]
        if not size:
            return None
        with decoding(f"tile {index} cannot be decoded"):
            with self._lock:
                handle.seek(offset)
                data = handle.read(size)
            segment, place, _ = keyframe.decode(
                data, index, jpegtables=keyframe.jpegtables, jpegheader=keyframe.jpegheader
            )
            rows, columns = keyframe.imagelength - place[2], keyframe.imagewidth - place[3]
            # (depth 1, height, width, samples)
            return None if segment is None else segment[0, :rows, :columns]

    def close(self) -> None:
        """See `Backend.close`."""
        self._file.close()


def _check_complete(file: Any) -> None:
    """A file cut short can still show its first levels: refuse it rather than embed what is left of it."""
    pages, handle = file.pages, file.filehandle
    count = len(pages)  # walks the chain of pages to where it ends or breaks
    handle.seek(pages.next_page_offset)
    link = handle.read(file.tiff.offsetsize)
    if len(link) < file.tiff.offsetsize or any(link):
        raise SlideError(f"the file {file.filename} ends before page {count + 1}")
