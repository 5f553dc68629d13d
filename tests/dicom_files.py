# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Headers of DICOM files, written by hand: enough to tell series apart, no pixels."""

import struct

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
EXPLICIT, IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"


def element(group, number, kind, value, implicit=False):
    value = value.encode() if isinstance(value, str) else value
    value += b"\0" * (len(value) % 2)
    tag = struct.pack("<HH", group, number)
    if implicit:
        return tag + struct.pack("<I", len(value)) + value
    if kind == "SQ":  # of undefined length, with one item of undefined length
        item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + value + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
        return tag + b"SQ\0\0" + struct.pack("<I", 0xFFFFFFFF) + item + struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    return tag + kind.encode() + struct.pack("<H", len(value)) + value


def write_dicom(path, series, sop_class=WHOLE_SLIDE, syntax=EXPLICIT, size=0):
    """A header that refers to another series before it names its own, and `size` bytes behind."""
    implicit = syntax == IMPLICIT
    meta = element(2, 2, "UI", sop_class) + element(2, 0x10, "UI", syntax)
    body = element(8, 0x60, "CS", "SM", implicit)
    if not implicit:
        body += element(8, 0x1115, "SQ", element(0x20, 0xE, "UI", "9.9.9"))
    body += element(0x20, 0xE, "UI", series, implicit) + element(0x48, 6, "UL", b"\0\1\0\0", implicit)
    path.write_bytes(bytes(128) + b"DICM" + meta + body + bytes(size))
    return path
