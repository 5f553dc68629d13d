# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Describes a TIFF by its tags and its OME-XML: which of its images is the slide, and what its samples mean."""

import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.extras import require
from . import resolution
from .declared_sizes import check_page, check_pages, places_of_chunks
from .description import SlideDescription, Statement
from .errors import DeclaredSizeError
from .ome_parts import describing_file, open_parts, reason_to_refuse_parts
from .resolution import OmeImage
from .samples import Samples, YCbCr, white_of

logger = logging.getLogger(__name__)

_BESIDE_THE_SLIDE = re.compile(r"\b(macro|label|overview|thumbnail|barcode|map)\b", re.IGNORECASE)
_RGB_NAMES = ({"r", "red"}, {"g", "green"}, {"b", "blue"})
_MPP_RATIO = 1.1  # images of one file whose resolutions differ by less are of one scan
# Decoders that give back what the file holds; all others turn luma and chroma to RGB themselves.
_CODECS_WITHOUT_COLOURS = {1, 5, 8, 32773, 32946, 34925, 50000, 50013}
_JPEG_2000 = {33003, 33004, 33005, 34712}
_APERIO_YCBCR = 33003
_JPEG = {6, 7, 34892, 33007}
_MOST_PIXELS_OF_A_CHUNK = 2**28
_KINDS = {1: "uint", 2: "int", 3: "float", 4: "uint", 5: "complex", 6: "complex"}
_STACK_AXES = {"Z": "focal planes", "T": "time points", "C": "channels", "I": "images", "Q": "images", "P": "positions"}


@dataclass(frozen=True)
class _Image:
    """One of the images of a file, in the order of tifffile's series."""

    index: int
    name: str
    size: tuple[int, int]  # (width, height)
    resolution: Statement | None
    ome: OmeImage | None

    @property
    def area(self) -> int:
        return self.size[0] * self.size[1]

    def __str__(self) -> str:
        scale = f" at {self.resolution.mpp[0]:.4g} micrometres per pixel" if self.resolution else ""
        return f"image {self.index} {self.name!r}, {self.size[0]} x {self.size[1]}{scale}"


def describe_tiff(path: Path) -> tuple[SlideDescription, str | None]:
    """Describes the TIFF at `path`; who reads it is for the caller to say.

    Returns:
        The description, its `refusal` set where no decoder could make the file right, and why tifffile in particular
        cannot decode it (None where it can).

    Raises:
        DeclaredSizeError: the sizes in the tags contradict each other.
        Exception: of any kind that `errors.decoding` knows: the file is damaged.
        ImportError: tifffile is missing.
    """
    tifffile = require("tifffile")
    require("imagecodecs")
    with tifffile.TiffFile(path) as file:
        check_pages(file)
        images = _images(file)
        chosen, refusal = choose_image(images)
        series = file.series[chosen.index]
        parts = open_parts(file, [page for level in series.levels for page in level.pages])
        for part in parts:
            check_pages(part)
        pages = [level.keyframe for level in series.levels]
        for level, level_page in enumerate(pages):
            check_page(level_page, level)
            if not any(size for _, size in places_of_chunks(level_page)):
                raise DeclaredSizeError(f"level {level} holds no tile or strip: what wrote the file stopped early")
        page = pages[0]
        orientation = _number(page, "Orientation", 1)
        orientation = orientation if 1 <= orientation <= 8 else 1  # what no viewer turns
        samples = _samples(page, chosen.ome)
        separate = _pages_of_colours(series, samples, chosen.ome)
        if separate:
            samples = Samples(3, samples.bits, samples.kind, "RGB", None, samples.white)
        refusal = refusal or _refused_axes(series, separate) or _refused_files(file, series)
        refusal = refusal or samples.reason_to_refuse() or _refused_colours(page)
        turned = orientation in (5, 6, 7, 8)
        stated = chosen.resolution
        if stated and turned:
            stated = Statement(stated.mpp[::-1], stated.source)
        description = SlideDescription(
            path, "OME-TIFF" if file.is_ome else "TIFF", refusal=refusal, series=chosen.index,
            levels=tuple(_size(level, turned) for level in pages), series_names=tuple(map(str, images)),
            axes=series.axes, samples=samples, planar=page.planarconfig == 2 or separate, orientation=orientation,
            codec=getattr(page.compression, "name", str(page.compression)), tiled=page.is_tiled, resolution=stated,
            parts=tuple(part.filename for part in parts),
        )  # fmt: skip
        return description, _undecodable(pages)


def choose_image(images: list[_Image]) -> tuple[_Image, str | None]:
    """The image that is the slide, and the reason to refuse the file where that cannot be told.

    Macro, label and overview are told by their names. Of the others those with a resolution go first, and of them the
    one with most pixels: it must also be of the finest resolution, else either could be meant.
    """
    scans = [image for image in images if not _BESIDE_THE_SLIDE.search(image.name)] or images
    scans = [image for image in scans if image.resolution] or scans
    largest = max(scans, key=lambda image: image.area)
    finest = min((min(image.resolution.mpp) for image in scans if image.resolution), default=None)
    others = [image for image in scans if image is not largest and image.area * 4 > largest.area]
    if finest is not None and min(largest.resolution.mpp) > finest * _MPP_RATIO:
        listed = "; ".join(map(str, scans))
        return largest, f"it holds several images, and which is the slide cannot be told ({listed}): export one of them"
    if others:
        logger.warning("%s is read; the file also holds %s", largest, "; ".join(map(str, others)))
    return largest, None


def _images(file: Any) -> list[_Image]:
    known = resolution.ome_images(file.ome_metadata) if file.is_ome and file.ome_metadata else []
    images = []
    for index, series in enumerate(file.series):
        page = series.keyframe
        size = _size(page)
        matching = [image for image in known if image.dimensions == size]
        ome = known[index] if index < len(known) and known[index] in matching else next(iter(matching), None)
        name = (ome.name if ome else "") or series.name or ""
        images.append(_Image(index, name, size, _resolution(file, page, ome), ome))
    if not images:
        raise ValueError("it holds no image")
    return images


def _size(page: Any, turned: bool = False) -> tuple[int, int]:
    return (page.imagelength, page.imagewidth) if turned else (page.imagewidth, page.imagelength)


def _resolution(file: Any, page: Any, ome: OmeImage | None) -> Statement | None:
    pixels = [_ratio(_values(page, name)) for name in ("XResolution", "YResolution")]
    unit = {2: "inch", 3: "cm"}.get(_number(page, "ResolutionUnit", 2), "none")
    imagej_unit = (file.imagej_metadata or {}).get("unit") if file.is_imagej else None
    statements = [
        ("OME-XML", ome.mpp if ome else None),
        ("Aperio description", resolution.from_aperio(page.description)),
        ("ImageJ metadata", resolution.from_imagej(imagej_unit, *pixels) if unit == "none" else None),
        (f"TIFF resolution tags ({unit})", resolution.from_resolution_tags(*pixels, unit)),
    ]
    return next((Statement(mpp, source) for source, mpp in statements if mpp), None)


def _ratio(value: tuple[float, ...]) -> float | None:
    return value[0] / value[1] if len(value) == 2 and value[1] else None


def _samples(page: Any, ome: OmeImage | None) -> Samples:
    kind = _KINDS.get(_only(page.sampleformat), "unknown")
    bits = _only(page.bitspersample)
    photometric = getattr(page.photometric, "name", str(page.photometric))
    alpha = None
    if page.samplesperpixel in (2, 4) and photometric in ("RGB", "YCBCR", "MINISBLACK", "MINISWHITE", "PALETTE"):
        alpha = {1: "premultiplied", 2: "straight"}.get(int((page.extrasamples or (0,))[0]), "unspecified")
    if photometric == "SEPARATED" and _number(page, "InkSet", 1) != 1:
        photometric = "inks other than CMYK"
    stated = [float(value) for name in ("SMaxSampleValue", "MaxSampleValue") for value in _values(page, name)]
    lowest = [float(value) for name in ("SMinSampleValue", "MinSampleValue") for value in _values(page, name)]
    white = white_of(kind, bits, sorted(set(stated)), lowest, ome.significant_bits if ome else None)
    ycbcr = _ycbcr(page) if _leaves_ycbcr(page, photometric) else None
    colormap = _colormap(page) if photometric == "PALETTE" else None
    return Samples(page.samplesperpixel, bits, kind, photometric, alpha, white, ycbcr, colormap)


def _only(value: Any) -> int:
    """A value that must be the same for all samples; 0 where it is not."""
    values = set(map(int, value)) if isinstance(value, tuple) else {int(value)}
    return values.pop() if len(values) == 1 else 0


def _values(page: Any, name: str) -> tuple[float, ...]:
    """The numbers of a tag. Raises ValueError where damage put other things there."""
    value = page.tags.valueof(name)
    values = () if value is None else tuple(value) if isinstance(value, tuple | list) else (value,)
    if not all(isinstance(number, int | float) for number in values):
        raise ValueError(f"its tag {name} holds {str(value)[:40]!r} where numbers are due")
    return values


def _number(page: Any, name: str, default: int) -> int:
    values = _values(page, name) or (default,)
    return int(values[0])


def _leaves_ycbcr(page: Any, photometric: str) -> bool:
    """Whether the decoder leaves luma and chroma, which the tags or the codec tell, for us to convert."""
    if page.compression in _JPEG_2000 and page.samplesperpixel == 3:
        states_ycbcr = photometric == "YCBCR" or page.compression == _APERIO_YCBCR
        return states_ycbcr and not _codestream_transforms(page)
    return photometric == "YCBCR" and page.compression in _CODECS_WITHOUT_COLOURS


def _codestream_transforms(page: Any) -> bool:
    """Whether a JPEG 2000 code stream has its own colour transformation, which its decoder undoes: RGB comes out."""
    first = next((place for place in zip(page.dataoffsets, page.databytecounts, strict=True) if place[1]), None)
    if first is None:
        return False
    handle = page.parent.filehandle
    handle.seek(first[0])
    data = handle.read(min(first[1], 65536))
    place = data.find(b"\xff\x4f\xff\x51") + 2  # start of the code stream, then its marker segments
    while place >= 2 and place + 9 <= len(data) and data[place : place + 2] != b"\xff\x90":
        if data[place : place + 2] == b"\xff\x52":  # COD: length, style, progression, layers (2), transformation
            return data[place + 8] == 1
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return False


def _ycbcr(page: Any) -> YCbCr:
    default = YCbCr()
    luma = tuple(_ratios(_values(page, "YCbCrCoefficients"))) or default.luma
    reference = tuple(_ratios(_values(page, "ReferenceBlackWhite"))) or default.reference
    # JPEG 2000 has neither tag: what an encoder of pictures means is JFIF.
    return YCbCr(luma, reference) if len(luma) == 3 and len(reference) == 6 else default


def _ratios(numbers: tuple[float, ...]) -> list[float]:
    pairs = zip(numbers[::2], numbers[1::2], strict=True) if len(numbers) in (6, 12) else []
    return [top / bottom if bottom else math.nan for top, bottom in pairs]


def _colormap(page: Any) -> np.ndarray | None:
    if page.colormap is None:
        return None
    colours = np.asarray(page.colormap).T  # (entries, 3) uint16
    # Some writers put 8-bit colours there; libtiff takes them for that by the same rule.
    return (colours if colours.max(initial=0) < 256 else colours >> 8).astype(np.uint8)


def _pages_of_colours(series: Any, samples: Samples, ome: OmeImage | None) -> bool:
    """Whether three pages of one sample are the red, green and blue of one image, by their names."""
    return (
        series.axes == "CYX"
        and all(len(level.pages) == 3 for level in series.levels)
        and samples.count == 1
        and samples.photometric == "MINISBLACK"
        and ome is not None
        and len(ome.channels) == 3
        and all(name.strip().lower() in names for name, names in zip(ome.channels, _RGB_NAMES, strict=True))
    )


def _refused_files(file: Any, series: Any) -> str | None:
    described_in = describing_file(file.ome_metadata) if file.is_ome and file.ome_metadata else None
    if described_in is not None:
        return f"it only holds planes of an image that {described_in} describes: open that file"
    return reason_to_refuse_parts(file, series.levels)


def _refused_axes(series: Any, separate: bool) -> str | None:
    if separate or series.axes in ("YXS", "YX", "SYX"):
        return None
    held = [
        f"{side} {_STACK_AXES.get(axis, 'images')}"
        for axis, side in zip(series.axes, series.shape, strict=True)
        if axis not in "YXS"
    ]
    return (
        f"its axes are {series.axes}, not one RGB image: it holds {', '.join(held) or 'no plane'}. Stains, "
        "fluorescence and focal planes cannot be made one picture here: export a single plane as RGB first"
    )


def _refused_colours(page: Any) -> str | None:
    if page.photometric == 6 and page.planarconfig == 2:
        return "its luma and chroma lie in separate planes: export it as RGB first"
    if page.photometric == 5 and page.compression in _JPEG:
        return "its JPEG tiles hold CMYK, of which writers store the inverse as often: export it as RGB first"
    return None


def _undecodable(pages: list[Any]) -> str | None:
    """Why tifffile cannot decode a level, though others may."""
    for page in pages:
        if page.decode.__name__.startswith("decode_raise"):
            codec = getattr(page.compression, "name", page.compression)
            subsampled = ", its chroma subsampled without JPEG" if page.is_subsampled else ""
            return (
                f"tifffile has no decoder for its pixels ({codec}, {page.dtype}{subsampled}): convert it to a tiled "
                "RGB TIFF"
            )
        rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        if min(rows, page.imagelength) * columns > _MOST_PIXELS_OF_A_CHUNK:
            return f"its strips of {columns} x {rows} pixels can only be decoded whole: convert it to a tiled TIFF"
    return None
