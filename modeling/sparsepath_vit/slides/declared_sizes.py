# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Whether what a header declares can be true, asked before a decoder allocates it or follows it for ever."""

import math
import struct
from itertools import islice
from typing import Any

from .errors import DeclaredSizeError

_HARMLESS_BYTES = 2**26  # of one tile, strip or plain image: allocated and filled in no time
# Decoded bytes per stored byte at most. Deflate writes 258 bytes in 2 bits; a JPEG needs a bit for each block of 8 x 8
# samples. Codecs that are not listed write a blank image in next to nothing.
_LARGEST_RATIO_OF_TIFF = {1: 1, 5: 2048, 7: 2048, 8: 1032, 32773: 64, 32946: 1032}
_PAGES_AT_MOST = 64  # OpenSlide's formats have fewer; thousands are a stack of planes
_MOST_BYTES_OF_A_TILE = 2**34  # whatever the codec; OpenSlide ends the process where it cannot have them
_WHOLE_NUMBERS = ("imagewidth", "imagelength", "tilewidth", "tilelength", "rowsperstrip", "samplesperpixel")
_WHOLE_NUMBERS += ("planarconfig", "compression", "photometric")
_WHOLE_NUMBERS_OF_SAMPLES = ("bitspersample", "sampleformat", "extrasamples")
_LARGEST_RATIO_OF_FORMAT = {"PNG": 1032, "JPEG": 2048, "BMP": 255}


def check_plain_image(image_format: str | None, size: tuple[int, int], channels: int, file_bytes: int) -> None:
    """Checks a plain image, which is decoded whole.

    Args:
        image_format: Pillow's name of the format.
        size: (width, height) in pixels.
        channels: bytes per pixel.
        file_bytes: of the file.

    Raises:
        DeclaredSizeError: so few bytes cannot hold it.
    """
    declared, ratio = math.prod(size) * channels, _LARGEST_RATIO_OF_FORMAT.get(image_format or "")
    if ratio is not None and declared > max(_HARMLESS_BYTES, file_bytes * ratio):
        raise DeclaredSizeError(
            f"its header declares {size[0]} x {size[1]} pixels, which {file_bytes:,} bytes of {image_format} cannot "
            "hold"
        )


def check_chain(file: Any) -> None:
    """Checks that the pages of a `tifffile.TiffFile`, each of which says where the next one lies, come to an end.

    Raises:
        DeclaredSizeError: the chain leads back to a page that was passed, so that a reader would follow it for ever.
    """
    tiff, handle, passed = file.tiff, file.filehandle, set()
    offset = file.pages.first.offset
    while offset not in passed:
        passed.add(offset)
        handle.seek(offset)
        number_of_tags = handle.read(tiff.tagnosize)
        if len(number_of_tags) < tiff.tagnosize:
            return  # cut short, which whoever counts the pages says
        handle.seek(offset + tiff.tagnosize + struct.unpack(tiff.tagnoformat, number_of_tags)[0] * tiff.tagsize)
        link = handle.read(tiff.offsetsize)
        offset = struct.unpack(tiff.offsetformat, link)[0] if len(link) == tiff.offsetsize else 0
        if offset == 0:
            return
    raise DeclaredSizeError(f"its list of pages leads from page {len(passed)} back to an earlier one")


def check_pages(file: Any) -> None:
    """Checks the first pages of a `tifffile.TiffFile`, macro and label among them. Raises as `check_page` does."""
    check_chain(file)
    for number, page in enumerate(islice(file.pages, _PAGES_AT_MOST)):
        check_page(page, number)


def check_page(page: Any, number: int) -> None:
    """Checks a page of tifffile: as many tiles or strips as its size needs, none larger than its bytes can hold.

    Raises:
        ValueError: a tag holds no number where one is due.
        DeclaredSizeError: the tags contradict each other.
    """
    _check_types(page)
    if page.subifds and len(page.subifds) > _PAGES_AT_MOST:
        raise DeclaredSizeError(f"page {number} lists {len(page.subifds):,} pages inside it")
    rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    if min(page.imagewidth, page.imagelength, rows, columns) < 1:
        raise DeclaredSizeError(
            f"page {number} has {page.imagewidth} x {page.imagelength} pixels in tiles or strips of {columns} x {rows}"
        )
    rows = rows if page.is_tiled else min(rows, page.imagelength)
    planes = page.samplesperpixel if page.planarconfig == 2 else 1
    needed = -(-page.imagewidth // columns) * -(-page.imagelength // rows) * planes
    chunks = places_of_chunks(page)
    if len(chunks) < needed:
        raise DeclaredSizeError(
            f"page {number} of {page.imagewidth} x {page.imagelength} pixels needs {needed:,} tiles or strips of "
            f"{columns} x {rows}, and the file lists {len(chunks):,}"
        )
    samples = page.samplesperpixel // planes
    declared, stored = rows * columns * samples * _bits(page) // 8, max(size for _, size in chunks)
    most = stored * _LARGEST_RATIO_OF_TIFF.get(int(page.compression), math.inf) if stored else math.inf
    if declared > max(_HARMLESS_BYTES, min(most, _MOST_BYTES_OF_A_TILE if page.is_tiled else math.inf)):
        raise DeclaredSizeError(
            f"page {number} declares tiles or strips of {columns} x {rows} pixels, which {stored:,} bytes cannot hold"
        )


def places_of_chunks(page: Any) -> list[tuple[int, int]]:
    """(offset, number of bytes) of every tile or strip of a page of tifffile.

    Raises:
        ValueError: the lists hold other things than whole numbers, or are not of one length.
    """
    for name in ("dataoffsets", "databytecounts"):
        numbers = getattr(page, name)
        if not isinstance(numbers, tuple | list) or not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"its list of {name} is no list of whole numbers")
    return list(zip(page.dataoffsets, page.databytecounts, strict=True))


def _check_types(page: Any) -> None:
    """tifffile keeps what the file has, be it text or a list of numbers."""
    for name in _WHOLE_NUMBERS:
        if not isinstance(getattr(page, name), int):
            raise ValueError(f"its tag {name} holds {str(getattr(page, name))[:40]!r} where a whole number is due")
    for name in _WHOLE_NUMBERS_OF_SAMPLES:
        value = getattr(page, name)
        if not all(isinstance(number, int) for number in (value if isinstance(value, tuple) else (value,))):
            raise ValueError(f"its tag {name} holds {str(value)[:40]!r} where whole numbers are due")


def _bits(page: Any) -> int:
    return max(page.bitspersample) if isinstance(page.bitspersample, tuple) else page.bitspersample
