# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Files with damaged bytes, made from sound ones: the same seed makes the same damage."""

import struct
import zlib

EXTREMES = (0, 1, 2, 3, 7, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def flipped(data, random):
    """One to eight bytes changed, half of the time where headers are."""
    end = len(data) if random.random() < 0.5 else min(len(data), 2048)
    for _ in range(random.randint(1, 8)):
        data[random.randrange(end)] = random.randrange(256)
    return data


def truncated(data, random):
    """Cut anywhere."""
    return data[: random.randrange(1, len(data))]


def blanked(data, random):
    """A run of zeros, as a lost sector leaves it."""
    start = random.randrange(len(data))
    length = min(random.choice((4, 64, 512, 4096)), len(data) - start)
    data[start : start + length] = bytes(length)
    return data


def moved(data, random):
    """A part copied over another."""
    source, target = (random.randrange(len(data)) for _ in range(2))
    part = data[source : source + random.choice((2, 8, 64, 512))]
    data[target : target + len(part)] = part
    return data[: len(data)]


def tiff_directories(data):
    """(byte order, offset of the directory, its number of entries) of a classic TIFF."""
    order = "<" if data[:2] == b"II" else ">"
    offset, found = struct.unpack_from(order + "I", data, 4)[0], []
    while offset and offset not in [place for _, place, _ in found] and offset + 2 <= len(data):
        count = struct.unpack_from(order + "H", data, offset)[0]
        found.append((order, offset, count))
        if offset + 6 + 12 * count > len(data):
            break
        offset = struct.unpack_from(order + "I", data, offset + 2 + 12 * count)[0]
    return found


def with_damaged_tag(data, random):
    """One to three entries with another tag, type, count or value; or two entries that change places."""
    for _ in range(random.randint(1, 3)):
        order, offset, count = random.choice(tiff_directories(data))
        entry, other = (offset + 2 + 12 * random.randrange(count) for _ in range(2))
        what = random.choice(("tag", "type", "count", "value", "value", "value", "swap"))
        number = random.choice((*EXTREMES, random.randrange(2**32)))
        if what == "tag":
            struct.pack_into(order + "H", data, entry, random.choice((256, 257, 258, 259, 277, 322, 324, 330, 0)))
        elif what == "type":
            struct.pack_into(order + "H", data, entry + 2, random.choice((0, 1, 2, 3, 4, 5, 7, 12, 13, 16, 255)))
        elif what == "swap":
            data[entry + 2 : entry + 12], data[other + 2 : other + 12] = (
                data[other + 2 : other + 12],
                data[entry + 2 : entry + 12],
            )
        else:
            is_short = what == "value" and struct.unpack_from(order + "H", data, entry + 2)[0] == 3
            place = entry + (4 if what == "count" else 8)
            struct.pack_into(order + ("H" if is_short else "I"), data, place, number % (2**16 if is_short else 2**32))
    return data


def with_damaged_chain(data, random):
    """The chain of directories leads to itself, to the first one, or out of the file."""
    directories = tiff_directories(data)
    order, offset, count = random.choice(directories)
    target = random.choice((offset, directories[0][1], len(data) - 1, 2**32 - 2, random.randrange(len(data))))
    struct.pack_into(order + "I", data, offset + 2 + 12 * count, target)
    return data


def with_damaged_png_header(data, random):
    """Another size, depth, colour type or interlacing, under a checksum that is right."""
    for place in random.sample((16, 20), random.randint(0, 2)):
        struct.pack_into(">I", data, place, random.choice((*EXTREMES, 20_000)))
    if random.random() < 0.5:
        data[random.choice((24, 25, 26, 27, 28))] = random.choice((0, 1, 2, 3, 4, 6, 8, 16, 255))
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    return data


def with_damaged_jpeg_frame(data, random):
    """Another height, width, number of components or sampling in the start of the frame."""
    place = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    if random.random() < 0.7:
        struct.pack_into(">H", data, place + random.choice((5, 7)), random.choice((0, 1, 8, 9, 4096, 65535)))
    else:
        data[place + random.randrange(2, 19)] = random.randrange(256)
    return data


def with_damaged_text(data, random):
    """A number, a word or a bracket replaced by what a program or a person might leave there."""
    places = [index for index, byte in enumerate(data) if byte in b'0123456789,:[]{}"\n']
    place = random.choice(places)
    junk = (b"null", b"NaN", b"1e999", b"-1", b"[]", b"{}", b'"', b",", b"\x00", b"\xff", b"[" * 5000, b"9" * 5000, b"")
    return data[:place] + random.choice(junk) + data[place + 1 :]


ANYWHERE = (flipped, truncated, blanked, moved)
TIFF = (*ANYWHERE, with_damaged_tag, with_damaged_tag, with_damaged_tag, with_damaged_chain)
PNG = (*ANYWHERE, with_damaged_png_header, with_damaged_png_header)
JPEG = (*ANYWHERE, with_damaged_jpeg_frame)
TEXT = (*ANYWHERE, with_damaged_text, with_damaged_text, with_damaged_text)


def damaged(sound, ways, random):
    """`sound` bytes damaged in one of `ways`, and how."""
    way = random.choice(ways)
    return bytes(way(bytearray(sound), random)), way.__name__
