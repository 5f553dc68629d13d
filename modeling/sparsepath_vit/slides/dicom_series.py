# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Which DICOM files of a folder belong together: a slide is a series, and each of its levels is a file or several."""

import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

DICOM_SUFFIXES = (".dcm", ".dicom")
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # SOP class "VL Whole Slide Microscopy Image Storage"
_IMPLICIT = "1.2.840.10008.1.2"  # the transfer syntax in which elements do not say what they hold
_PREAMBLE = 128
_SOP_CLASS, _TRANSFER_SYNTAX, _SERIES = 0x00020002, 0x00020010, 0x0020000E
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_UNDEFINED = 0xFFFFFFFF
_LONG_KINDS = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
_FARTHEST = 2**20  # the series stands in the first kilobytes of a file
_DEEPEST = 16  # sequences within sequences


@dataclass(frozen=True)
class DicomHeader:
    """What a DICOM file says of itself: its SOP class and its series; None where it does not."""

    sop_class: str | None
    series: str | None


def read_dicom_header(path: Path) -> DicomHeader | None:
    """The header of a DICOM file; None for a file that is none.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        if file.read(_PREAMBLE + 4)[_PREAMBLE:] != b"DICM":
            return None
        found: dict[int, str] = {}
        with suppress(struct.error, ValueError):  # cut short or not understood: what was found until there counts
            _read_elements(file, found)
    return DicomHeader(found.get(_SOP_CLASS), found.get(_SERIES))


def series_in(folder: Path) -> dict[str, list[Path]]:
    """The whole-slide series of a folder, each with its files: the largest, which holds level 0, first."""
    return _series_in(folder, os.stat(folder).st_mtime_ns)


@lru_cache(maxsize=64)
def _series_in(folder: Path, modified: int) -> dict[str, list[Path]]:
    series: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if may_be_dicom(path) and path.is_file():
            try:
                header = read_dicom_header(path)
            except OSError:
                continue  # named by whoever lists the folder
            if header is not None and header.series and header.sop_class in (None, WHOLE_SLIDE):
                series.setdefault(header.series, []).append(path)
    return {name: sorted(paths, key=lambda path: (-path.stat().st_size, path)) for name, paths in series.items()}


def may_be_dicom(path: Path) -> bool:
    """Whether a file is called as DICOM files are; many have no ending."""
    return not path.name.startswith(".") and path.suffix.lower() in (*DICOM_SUFFIXES, "")


def _read_elements(file: BinaryIO, found: dict[int, str]) -> None:
    """Reads top-level elements up to the series."""
    implicit = False
    while file.tell() < _FARTHEST:
        start = file.tell()
        group = int.from_bytes(file.read(2), "little")
        file.seek(start)
        tag, length = _next_element(file, implicit and group != 2)
        if tag > _SERIES:
            return
        if tag in (_SOP_CLASS, _TRANSFER_SYNTAX, _SERIES):
            found[tag] = file.read(length).decode("ascii").rstrip("\0 ")
            implicit |= tag == _TRANSFER_SYNTAX and found[tag] == _IMPLICIT
        elif length == _UNDEFINED:
            _skip_sequence(file, implicit, 0)
        else:
            file.seek(length, os.SEEK_CUR)


def _next_element(file: BinaryIO, implicit: bool) -> tuple[int, int]:
    """Tag and length of the element at the file's position, which moves to its value."""
    group, element = struct.unpack("<HH", file.read(4))
    tag = group << 16 | element
    if implicit or group == 0xFFFE:
        return tag, struct.unpack("<I", file.read(4))[0]
    kind = file.read(2)
    if kind in _LONG_KINDS:
        return tag, struct.unpack("<2xI", file.read(6))[0]
    return tag, struct.unpack("<H", file.read(2))[0]


def _skip_sequence(file: BinaryIO, implicit: bool, depth: int) -> None:
    """Moves behind a sequence of undefined length, or behind an item of such a length."""
    if depth > _DEEPEST:
        raise ValueError("sequences are nested too deeply")
    while file.tell() < _FARTHEST:
        tag, length = _next_element(file, implicit)
        if tag in (_SEQUENCE_END, _ITEM_END):
            return
        if length == _UNDEFINED:
            _skip_sequence(file, implicit, depth + 1)
        else:
            file.seek(length, os.SEEK_CUR)
    raise ValueError("a sequence does not end")
