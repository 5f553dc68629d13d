# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`Slide`: one whole-slide image, read at any resolution."""

import logging
import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .backends import Backend, open_backend
from .description import SlideDescription, describe
from .errors import DAMAGED, SlideError, UnsupportedSlideError
from .reading_process import ApartBackend
from .resolution import CREDIBLE_MPP, MppXY, is_credible
from .viewer_frame import Frame, checked_origin, viewer_frame

logger = logging.getLogger(__name__)

# Scanners state mpp to about 1 %. Within it a level is taken as it is: resampling 0.499 to 0.5 would only blur.
MPP_TOLERANCE = 0.01
_NOTEWORTHY = 0.1  # of a resolution: more than scanners, and people who round, differ by
_CACHE_BYTES = 64 * 2**20
_BAND_PIXELS = 8 * 2**20  # level pixels held at once while a large region is read
_COMPOUND_SUFFIXES = (".ome.tif", ".ome.tiff")


class Slide:
    """A slide file: OpenSlide's formats, (OME-)TIFFs that only tifffile reads, and plain PNG or JPEG images.

    The file is opened here, so that a damaged one is refused at once, and opened again by every process that the
    object reaches by pickle or fork (DataLoader workers): handles are never shared. Decoded tiles are cached up to
    64 MiB per process. Reading is thread-safe.

    Coordinates are level-0 pixels, sizes are output pixels at the resolution asked for.

    Args:
        path: the slide file.
        mpp: micrometres per pixel of level 0, for a file that does not state it or states it wrongly.
        origin: where coordinates of annotations, manifests and results start: "bounds" at the scanned area that the
            file states, as in QuPath; "slide" at the corner of level 0. `read_region` always counts from the latter.
        apart: decode in another process, for runs over many slides: damaged bytes that abort a decoder, fill the
            memory or never come to an end are then a `SlideError` too. The pixels are the same. The process starts
            once, with the first such slide.

    Raises:
        SlideError: the file is missing, a folder, unreadable, empty or damaged; `mpp` cannot be a full resolution; an
            unknown `origin`.
        ImportError: a library of the `slides` extra is missing; the message gives the install command.

    Example:
    ```python
    >>> with Slide("CMU-1.svs") as slide:
    ...     region = slide.read_region(4000, 6000, 1120, 1120, mpp=0.5)  # (1120, 1120, 3) uint8
    ```
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        mpp: float | None = None,
        origin: str = "bounds",
        apart: bool = False,
    ) -> None:
        self.path = Path(path)
        self._origin, self._frame = checked_origin(origin), None
        if mpp is not None and not is_credible(mpp):
            raise SlideError(
                f"mpp={mpp!r} cannot be the full resolution of {self.path}: it is in micrometres per pixel, between "
                f"{CREDIBLE_MPP[0]} and {CREDIBLE_MPP[1]}, not the objective power or dpi (a 40x scan has about 0.25, "
                "a 20x scan about 0.5)."
            )
        self._given_mpp, self._apart = mpp, apart
        self._has_warned = False  # of being enlarged: once a slide
        self._forget_handle()
        self._open()
        self._warn_of_contradiction()

    def _forget_handle(self) -> None:
        self._handle: Backend | None = None
        self._process: int | None = None
        self._lock = threading.Lock()

    def _open(self) -> Backend:
        if self._process not in (None, os.getpid()):
            self._forget_handle()  # inherited by fork: the parent's file position and locks are not ours
        with self._lock:
            if self._handle is None:
                self._handle = (ApartBackend if self._apart else open_backend)(self.path, _CACHE_BYTES)
                self._process = os.getpid()
            return self._handle

    def __getstate__(self) -> dict[str, Any]:
        kept = ("path", "_given_mpp", "_apart", "_has_warned", "_origin", "_frame")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_handle()

    def __repr__(self) -> str:
        return f"Slide({str(self.path)!r}, mpp={self._given_mpp})"

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the file back; a later read opens it again."""
        if self._handle is not None and self._process == os.getpid():
            self._handle.close()
        self._forget_handle()

    @property
    def name(self) -> str:
        """The file's name without its suffix (`.ome.tif` counts as one)."""
        return self.name_of(self.path)

    @staticmethod
    def name_of(path: Path) -> str:
        """The `name` of the slide at `path`, which need not exist."""
        for suffix in _COMPOUND_SUFFIXES:
            if path.name.lower().endswith(suffix):
                return path.name[: -len(suffix)]
        return path.stem

    @property
    def dimensions(self) -> tuple[int, int]:
        """(width, height) of level 0 in pixels."""
        return self.levels[0]

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """(width, height) of every level in pixels, finest first."""
        return self._open().level_dimensions

    @property
    def description(self) -> SlideDescription:
        """What the file holds and who reads it, found out anew."""
        return describe(self.path)

    @property
    def frame(self) -> Frame:
        """(x, y, width, height) in level-0 pixels of what the users' viewer shows as the slide.

        Annotations, manifests and results count from its corner. It is all of level 0, unless the file states a
        scanned area and the slide was opened with `origin="bounds"`. The first use logs a line where they differ.
        """
        if self._frame is None:
            self._frame = viewer_frame(self.path, self.dimensions, self._origin)
        return self._frame

    @property
    def states_mpp(self) -> bool:
        """Whether the file itself states a believable resolution."""
        return self._open().stated_mpp is not None

    @property
    def is_plain_image(self) -> bool:
        """Whether it is an image of one level that no scanner says anything of."""
        return len(self.levels) == 1 and self._open().objective_power is None

    @property
    def mpp_xy(self) -> MppXY:
        """Micrometres per level-0 pixel along x and y: as given, else as the file states.

        Where both agree within 1 % their mean is used for both.

        Raises:
            SlideError: neither given nor stated.
        """
        if self._given_mpp is not None:
            return (self._given_mpp, self._given_mpp)
        backend = self._open()
        if backend.stated_mpp is None:
            power = f"; its objective power is stated as {backend.objective_power}x" if backend.objective_power else ""
            raise SlideError(
                f"{self.path} does not state its resolution in micrometres per pixel{power}. Find it out and pass it, "
                "such as 0.25 for a 40x scan: Slide(path, mpp=0.25), on the command line --slide-mpp 0.25 (--mpp is "
                "the resolution asked for, not the slide's own), in a CSV the column mpp."
            )
        mpp_x, mpp_y = backend.stated_mpp
        if abs(mpp_x / mpp_y - 1) <= MPP_TOLERANCE:
            mpp_x = mpp_y = (mpp_x + mpp_y) / 2
        return (mpp_x, mpp_y)

    @property
    def mpp(self) -> float:
        """Micrometres per level-0 pixel, the mean of both axes. Raises as `mpp_xy` does."""
        return sum(self.mpp_xy) / 2

    def _warn_of_contradiction(self) -> None:
        stated = self._open().stated_mpp
        if self._given_mpp and stated and any(abs(self._given_mpp / own - 1) > _NOTEWORTHY for own in stated):
            along_y = f" (along y {stated[1]:.4g})" if abs(stated[0] / stated[1] - 1) > MPP_TOLERANCE else ""
            message = "%s states %.4g micrometres per pixel%s, and is read at the %.4g that was passed instead."
            logger.warning(message, self.path, stated[0], along_y, self._given_mpp)

    def enlargement(self, mpp: float | None) -> float:
        """How many times larger than its own pixels the slide is shown at `mpp`: above 1 detail is made up.

        Raises:
            SlideError: the slide's own resolution is unknown.
        """
        return 1.0 if mpp is None else max(self.mpp_xy) / mpp

    def scale(self, mpp: float | None) -> tuple[float, float]:
        """Level-0 pixels per output pixel along x and y at `mpp` (None: level 0 itself).

        A level within 1 % of `mpp` counts as being at `mpp`, so that its pixels are taken unchanged; all geometry
        (regions, token grids, strips) goes through this function and stays consistent with the pixels.

        Raises:
            SlideError: `mpp` is not positive, or the slide's own resolution is unknown.
        """
        if mpp is None:
            return (1.0, 1.0)
        if not mpp > 0 or not math.isfinite(mpp):
            raise SlideError(f"mpp={mpp!r} is not possible: it is in micrometres per pixel and positive, e.g. 0.5.")
        wanted = tuple(mpp / own for own in self.mpp_xy)
        for downsample in self._downsamples():
            if all(abs(own / asked - 1) <= MPP_TOLERANCE for own, asked in zip(downsample, wanted, strict=True)):
                return downsample
        self._warn_of_enlargement(mpp, min(wanted))
        return wanted

    def _warn_of_enlargement(self, mpp: float, scale: float) -> None:
        if scale * (1 + _NOTEWORTHY) >= 1 or self._has_warned:
            return
        self._has_warned = True
        logger.warning(
            "%s is asked for at %.4g micrometres per pixel and has %s itself: it is enlarged %.2g times, which adds no "
            "detail. If that is not meant, ask for a coarser mpp, or correct the slide's own (--slide-mpp).",
            self.path, mpp, " x ".join(f"{own:.4g}" for own in dict.fromkeys(self.mpp_xy)), 1 / scale,
        )  # fmt: skip

    def size_at(self, mpp: float | None) -> tuple[int, int]:
        """(width, height) in output pixels of the whole slide at `mpp`, rounded down."""
        return tuple(
            math.floor(side / scale + 1e-6) for side, scale in zip(self.dimensions, self.scale(mpp), strict=True)
        )

    def _downsamples(self) -> list[tuple[float, float]]:
        width, height = self.dimensions
        return [(width / level_width, height / level_height) for level_width, level_height in self.levels]

    def read_region(
        self, x: float, y: float, width: int, height: int, mpp: float | None = None, pad: bool = False
    ) -> np.ndarray:
        """Reads the region whose top left corner is the level-0 pixel (x, y).

        It comes from the lowest-resolution level that is still at least as fine as `mpp`, resampled bicubically with
        antialiasing. At a level's own resolution the pixels are the level's, bit for bit; transparent ones become
        white. Memory is the result plus about 100 MB, whatever the size.

        Args:
            x: left edge, level-0 pixels.
            y: top edge, level-0 pixels.
            width: output pixels.
            height: output pixels.
            mpp: resolution of the output; None for level 0 unchanged.
            pad: white beyond the slide's edge. Without it a region that does not lie in the slide is an error.

        Returns:
            `np.ndarray` of shape (height, width, 3), uint8 RGB.

        Raises:
            SlideError: an empty region, one beyond the edge, unknown mpp, or pixels that cannot be decoded.
        """
        if width < 1 or height < 1:
            raise SlideError(f"a region of {width} x {height} pixels is empty: width and height are at least 1.")
        scale = self.scale(mpp)
        right, bottom = x + width * scale[0], y + height * scale[1]
        slide_width, slide_height = self.dimensions
        if not pad and (x < 0 or y < 0 or right > slide_width + 1e-3 or bottom > slide_height + 1e-3):
            raise SlideError(
                f"the region x={x:g}..{right:g}, y={y:g}..{bottom:g} (level-0 pixels) is not inside {self.path}, which "
                f"is {slide_width} x {slide_height}. Move or shrink it, or pass pad=True for white beyond the edge."
            )
        return self.read_scaled((x, y), (width, height), scale)

    def thumbnail(self, max_size: int = 1024) -> np.ndarray:
        """The whole slide with its longer side at most `max_size` pixels, (height, width, 3) uint8; needs no mpp."""
        scale = max(1.0, max(self.dimensions) / max_size)
        size = tuple(max(1, round(side / scale)) for side in self.dimensions)
        scales = tuple(side / out for side, out in zip(self.dimensions, size, strict=True))
        return self.read_scaled((0, 0), size, scales)

    def read_scaled(self, origin: tuple[float, float], size: tuple[int, int], scale: tuple[float, float]) -> np.ndarray:
        """As `read_region` with `pad=True`, at any `scale`, level-0 pixels per output pixel (x, y); needs no mpp.

        Tries the best level, then finer ones where it turns out damaged; every region tries anew.
        """
        downsamples = self._downsamples()
        fine_enough = [
            level for level, downsample in enumerate(downsamples)
            if all(own <= asked * (1 + 1e-6) for own, asked in zip(downsample, scale, strict=True))
        ] or [0]  # fmt: skip
        for level in reversed(fine_enough):
            try:
                return self._read_from(level, downsamples[level], origin, size, scale)
            except UnsupportedSlideError as error:  # of a sound file: a finer level has no other meaning
                raise UnsupportedSlideError(f"{self.path} is not supported here, because {error}.") from error
            except SlideError as error:
                if level == 0:
                    raise type(error)(
                        f"{self.path}: pixels of the region at x={origin[0]:g}, y={origin[1]:g} cannot be decoded "
                        f"({error}). {DAMAGED}"
                    ) from error
                logger.warning(
                    "%s: level %d is damaged at x=%g, y=%g (%s); reading a finer one instead.",
                    self.path, level, *origin, error,
                )  # fmt: skip
        raise AssertionError("level 0 returns or raises")

    def _read_from(
        self,
        level: int,
        downsample: tuple[float, float],
        origin: tuple[float, float],
        size: tuple[int, int],
        scale: tuple[float, float],
    ) -> np.ndarray:
        """Reads band by band, so that memory does not grow with the level pixels behind the region."""
        step = tuple(asked / own for asked, own in zip(scale, downsample, strict=True))  # level pixels per output pixel
        left, top = (position / own for position, own in zip(origin, downsample, strict=True))
        width, height = size
        unchanged = all(abs(ratio - 1) < 1e-9 for ratio in step)
        rows = max(1, math.floor(_BAND_PIXELS / (width * min(step[0], 4)) / min(step[1], 4)))
        region = np.empty((height, width, 3), dtype=np.uint8)
        for first in range(0, height, rows):
            last = min(height, first + rows)
            if unchanged:
                band = self._window(level, math.floor(left + 0.5), math.floor(top + 0.5) + first, width, last - first)
            else:
                box = (left, top + first * step[1], left + width * step[0], top + last * step[1])
                band = self._resample(level, box, (width, last - first), step)
            region[first:last] = band
        return region

    def _resample(
        self, level: int, box: tuple[float, float, float, float], size: tuple[int, int], step: tuple[float, float]
    ) -> np.ndarray:
        """The level pixels of `box` (left, top, right, bottom), resized to `size` (width, height).

        Strong reductions average whole blocks of level pixels first, so that the filter needs few rows around a band.
        Pixels around the box are read as far as the filter reaches inside the slide: a region then has the same
        pixels whether it is read whole or in strips (above level 0 up to OpenSlide's own sub-pixel placement).
        """
        block = max(1, math.floor(min(step) / 2))
        edges = []
        for start, end, ratio, level_side in zip(box[:2], box[2:], step, self.levels[level], strict=True):
            start, end, limit = start / block, end / block, math.ceil(level_side / block)
            reach = 2 * max(ratio / block, 1.0) + 1  # of the bicubic filter
            first = min(max(0, math.floor(start - reach)), math.floor(start))
            last = max(min(limit, math.ceil(end + reach)), math.ceil(end - 1e-6))
            edges.append((first, last, start - first, min(end, last) - first))
        (first_x, last_x, left, right), (first_y, last_y, top, bottom) = edges
        window = self._block_means(level, block, first_x, first_y, last_x - first_x, last_y - first_y)
        return np.asarray(
            Image.fromarray(window).resize(size, Image.Resampling.BICUBIC, box=(left, top, right, bottom))
        )

    def _block_means(self, level: int, block: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Means over `block` x `block` level pixels, (height, width, 3); x, y, width and height count blocks."""
        if block == 1:
            return self._window(level, x, y, width, height)

        def without_overhang(end: int, level_side: int) -> int:
            # The level's last block may be a part of one: its mean is that of the pixels it has.
            return level_side if end - block < level_side < end else end

        level_width, level_height = self.levels[level]
        right = without_overhang((x + width) * block, level_width)
        means = np.empty((height, width, 3), dtype=np.uint8)
        rows = max(1, _BAND_PIXELS // (width * block * block))
        for first in range(0, height, rows):
            last = min(height, first + rows)
            top, bottom = (y + first) * block, without_overhang((y + last) * block, level_height)
            pixels = self._window(level, x * block, top, right - x * block, bottom - top)
            means[first:last] = np.asarray(Image.fromarray(pixels).reduce(block))
        return means

    def _window(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """The rectangle at level pixels (x, y), white where it leaves the level."""
        level_width, level_height = self.levels[level]
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, level_width), min(y + height, level_height)
        if (left, top, right, bottom) == (x, y, x + width, y + height):
            return self._open().read(level, x, y, width, height)
        window = np.full((height, width, 3), 255, dtype=np.uint8)
        if left < right and top < bottom:
            pixels = self._open().read(level, left, top, right - left, bottom - top)
            window[top - y : bottom - y, left - x : right - x] = pixels
        return window
