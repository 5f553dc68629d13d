# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A slide as the square tiles that map viewers ask for."""

import io
import math
import threading
from collections import OrderedDict

import numpy as np
from PIL import Image

from ..errors import DecoderEndedError
from ..reader import Slide

TILE_SIZE = 512
_ENLARGED_ZOOMS = 4  # beyond level 0: up to 16 screen pixels for one of the slide
_JPEG_QUALITY = 90
_CACHED_TILES = 256  # about 20 MB
_OVERVIEW_SIDE = 1024


class TilePyramid:
    """Tiles of a slide's frame, as JPEG.

    At zoom 0 one tile holds all of it; each zoom doubles the resolution, up to that of level 0 at `native_zoom` and
    enlarged beyond. Tiles are counted from the frame's corner, to the right and down. What lies beyond the slide is
    white. Thread-safe.

    Args:
        slide: the slide.
        y_per_x: level-0 pixels along y that are as long as one along x; other than 1 where pixels are oblong.
    """

    def __init__(self, slide: Slide, y_per_x: float = 1.0) -> None:
        self.slide, self._y_per_x = slide, y_per_x
        longest = max(slide.frame[2], slide.frame[3] / y_per_x)
        self.native_zoom = max(0, math.ceil(math.log2(longest / TILE_SIZE)))
        self.max_zoom = self.native_zoom + _ENLARGED_ZOOMS
        self._overview: Image.Image | None = None
        self._lock, self._overview_lock, self._again_lock = threading.Lock(), threading.Lock(), threading.Lock()
        self._cache: OrderedDict[tuple[int, int, int], bytes] = OrderedDict()

    @property
    def side(self) -> int:
        """Level-0 pixels along x of the square that the one tile of zoom 0 covers."""
        return TILE_SIZE << self.native_zoom

    def tile(self, zoom: int, column: int, row: int) -> bytes:
        """One tile.

        Raises:
            IndexError: there is no such tile.
            SlideError: its pixels cannot be decoded.
        """
        if not 0 <= zoom <= self.max_zoom or not (0 <= column < 1 << zoom and 0 <= row < 1 << zoom):
            raise IndexError(f"there is no tile {column}, {row} at zoom {zoom}")
        key = (zoom, column, row)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        try:
            pixels = self._pixels(zoom, column, row)
        except DecoderEndedError:
            # Perhaps by another tile that was decoded at the same time: read alone, each answers for itself.
            with self._again_lock:
                pixels = self._pixels(zoom, column, row)
        encoded = jpeg(pixels)
        with self._lock:
            self._cache[key] = encoded
            while len(self._cache) > _CACHED_TILES:
                self._cache.popitem(last=False)
        return encoded

    def around(self, x: float, y: float, side: float, pixels: int) -> np.ndarray:
        """(pixels, pixels, 3) uint8 of the square, `side` level-0 pixels wide, around the level-0 pixel (x, y)."""
        scale = (side / pixels, side / pixels * self._y_per_x)
        corner = (x - side / 2, y - side / 2 * self._y_per_x)
        return self.slide.read_scaled(corner, (pixels, pixels), scale)

    def _pixels(self, zoom: int, column: int, row: int) -> np.ndarray:
        scale_x = self.side / (TILE_SIZE << zoom)  # level-0 pixels per pixel of the tile
        scale = (scale_x, scale_x * self._y_per_x)
        x, y, width, height = self.slide.frame
        left, top = column * TILE_SIZE * scale[0], row * TILE_SIZE * scale[1]
        if left >= width or top >= height:
            return np.full((TILE_SIZE, TILE_SIZE, 3), 255, dtype=np.uint8)
        corner = (x + left, y + top)
        if min(scale) * _OVERVIEW_SIDE >= max(self.slide.dimensions):
            return self._from_overview(corner, scale)
        return self.slide.read_scaled(corner, (TILE_SIZE, TILE_SIZE), scale)

    def _from_overview(self, corner: tuple[float, float], scale: tuple[float, float]) -> np.ndarray:
        """A tile of low resolution: files seldom have levels so coarse, and would be read from end to end for each."""
        with self._overview_lock:
            if self._overview is None:
                self._overview = Image.fromarray(self.slide.thumbnail(_OVERVIEW_SIDE))
        sides = zip(self.slide.dimensions, self._overview.size, corner, scale, strict=True)
        starts, ends, sizes = [], [], []
        for slide_side, overview_side, start, step in sides:
            own = slide_side / overview_side  # level-0 pixels per pixel of the overview
            start, length = start / own, TILE_SIZE * step / own
            starts.append(start)
            ends.append(min(start + length, overview_side))  # the part of the tile that lies in the slide
            sizes.append(max(1, round(TILE_SIZE * (ends[-1] - start) / length)))
        tile = Image.new("RGB", (TILE_SIZE, TILE_SIZE), "white")
        tile.paste(self._overview.resize(sizes, Image.Resampling.BICUBIC, box=(*starts, *ends)))
        return np.asarray(tile)


def jpeg(pixels: np.ndarray) -> bytes:
    """(height, width, 3) uint8 as a JPEG file with colours at full resolution."""
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
    return encoded.getvalue()
