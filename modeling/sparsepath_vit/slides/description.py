# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a slide file holds, found out before anything decodes it: which image, how it is stored, what its samples mean.

`describe` decides who may read a file, so that no decoder is asked for what it would turn into something else: libtiff
(inside OpenSlide) halves 12-bit samples to black, ignores orientation and takes the first channel of many for gray.
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

from ..runtime.extras import require
from . import resolution
from .errors import DAMAGED, DeclaredSizeError, SlideError, decoding
from .resolution import MppXY
from .samples import Samples
from .unsupported_formats import reason_against_format

logger = logging.getLogger(__name__)

GENERIC = "generic-tiff"  # OpenSlide's name for a TIFF of no scanner it knows
_PLAIN_IMAGES = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"RIFF")
_TIFF = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
# Whose first file is a picture for the file manager, or one tile of many: alone it is not the slide.
_MANY_FILES = (".mrxs", ".vms", ".vmu")


@dataclass(frozen=True)
class Statement:
    """A resolution, and what in the file states it."""

    mpp: MppXY
    source: str


@dataclass(frozen=True)
class SlideDescription:
    """What is known of a file without decoding it.

    Attributes:
        path: the file.
        format: `TIFF`, `OME-TIFF`, `PNG`, ...; for files that are none of these OpenSlide's name of the vendor.
        vendor: as OpenSlide calls it, `generic-tiff` where no scanner is known; None where OpenSlide does not know it.
        readers: who reads the file rightly, the preferred one first: `OpenSlide`, `tifffile`, `Pillow`.
        refusal: why nobody does, with the way out; None where somebody does.
        levels: (width, height) of the chosen image as it is displayed, finest first; empty where not known.
        series: which image of the file was chosen, counted from 0, and `series_names` what all are called.
        series_names: see `series`.
        axes: of the chosen image as tifffile calls them, such as `YXS`; empty where not known.
        samples: what the samples mean; None where not known.
        planar: whether the file keeps a plane for each sample.
        orientation: the tag of TIFF and EXIF, 1 to 8; 1 is upright.
        codec: the compression.
        tiled: whether the file is kept in tiles rather than strips; None where not known.
        resolution: what the file states of its resolution; None where nothing believable.
        objective_power: as stated, for messages.
        bounds: (x, y, width, height) of the scanned area in level-0 pixels, where the file states it.
        parts: names of the other files that planes of the chosen image lie in.
    """

    path: Path
    format: str
    vendor: str | None = None
    readers: tuple[str, ...] = ()
    refusal: str | None = None
    levels: tuple[tuple[int, int], ...] = ()
    series: int = 0
    series_names: tuple[str, ...] = ()
    axes: str = ""
    samples: Samples | None = None
    planar: bool = False
    orientation: int = 1
    codec: str | None = None
    tiled: bool | None = None
    resolution: Statement | None = None
    objective_power: str | None = None
    bounds: tuple[int, int, int, int] | None = None
    parts: tuple[str, ...] = ()


def describe(path: Path) -> SlideDescription:
    """Describes the file at `path`; one that is sound and cannot be used has its `refusal`.

    Raises:
        SlideError: the file is missing, a folder, unreadable or empty, or declares sizes that cannot be true.
        ImportError: a library of the `slides` extra is missing.
    """
    magic = first_bytes(path)
    if magic.startswith(_TIFF):
        return _describe_tiff_file(path)
    if path.suffix.lower() not in _MANY_FILES and magic.startswith(_PLAIN_IMAGES):
        return _describe_plain_image(path)
    return _describe_other(path)


def first_bytes(path: Path) -> bytes:
    """The first 16 bytes of a file. Raises as `describe` does."""
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


def _describe_tiff_file(path: Path) -> SlideDescription:
    from .tiff_description import describe_tiff

    vendor = require("openslide").OpenSlide.detect_format(path)
    try:
        with decoding():
            found, undecodable = describe_tiff(path)
    except DeclaredSizeError as error:
        raise SlideError(f"{path} cannot be read as a slide: {error}. {DAMAGED}") from error
    except SlideError as error:
        logger.debug("tifffile cannot describe %s: %r", path, error)
        # Then only a scanner's own format can be vouched for: OpenSlide knows it tag by tag. tifffile says why not.
        readers = ("OpenSlide", "tifffile") if vendor not in (None, GENERIC) else ("tifffile",)
        return SlideDescription(path, "TIFF", vendor, readers)
    readers = []
    if vendor is not None and (vendor != GENERIC or found.refusal is None) and openslide_reads_rightly(found):
        readers.append("OpenSlide")
    if found.refusal is None and undecodable is None and vendor != "ventana":
        readers.append("tifffile")  # the tiles of a BIF overlap: only OpenSlide puts them in their places
    refusal = None if readers else found.refusal or undecodable or "OpenSlide does not read this kind of BIF rightly"
    found = replace(found, vendor=vendor, readers=tuple(readers), refusal=refusal)
    return _with_properties(found) if "OpenSlide" in readers else found


def openslide_reads_rightly(found: SlideDescription) -> bool:
    """Whether libtiff's conversion to RGB, which OpenSlide uses, is right for a TIFF."""
    samples = found.samples
    return (
        samples is not None
        and samples.kind == "uint"
        and samples.bits == 8
        and samples.alpha is None
        and found.orientation == 1
        and not found.parts
        and "C" not in found.axes
        and (samples.photometric, samples.count) in (("RGB", 3), ("YCBCR", 3), ("MINISBLACK", 1))
    )


def _with_properties(found: SlideDescription) -> SlideDescription:
    """`found` with what OpenSlide's properties tell; a damaged file keeps what it has until it is opened."""
    openslide = require("openslide")
    try:
        with decoding(), openslide.OpenSlide(found.path) as slide:
            properties, levels = dict(slide.properties), slide.level_dimensions
            keys = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
            bounds = tuple(int(properties[key]) for key in keys) if all(key in properties for key in keys) else None
    except (openslide.OpenSlideError, SlideError):
        return found
    if found.vendor == GENERIC:  # whose first image OpenSlide takes, be it the macro
        levels = found.levels
        stated = found.resolution
    else:
        stated = resolution_of_properties(properties, levels[0]) or found.resolution
    return replace(
        found,
        levels=levels,
        resolution=stated,
        objective_power=properties.get("openslide.objective-power"),
        bounds=bounds,
    )


def resolution_of_properties(properties: dict[str, str], dimensions: tuple[int, int]) -> Statement | None:
    """What OpenSlide's properties state of the resolution of level 0, (width, height) `dimensions`."""
    xml = properties.get("tiff.ImageDescription", "")
    statements = [
        ("OME-XML", resolution.from_ome(xml, dimensions) if "<OME" in xml else None),
        ("openslide.mpp", [properties.get(f"openslide.mpp-{axis}") for axis in "xy"]),
        ("aperio.MPP", [properties.get("aperio.MPP")] * 2),
    ]
    for source, pair in statements:
        found = resolution.credible_pair(*pair) if pair else None
        if found:
            return Statement(found, source)
    return None


def _describe_plain_image(path: Path) -> SlideDescription:
    from .plain_images import describe_image

    return describe_image(path)


def _describe_other(path: Path) -> SlideDescription:
    """OpenSlide's formats that are no TIFF, and what Pillow may know."""
    openslide = require("openslide")
    vendor = openslide.OpenSlide.detect_format(path)
    many_files = path.suffix.lower() in _MANY_FILES
    if vendor is None and many_files and first_bytes(path).startswith(_PLAIN_IMAGES):
        beside = path.with_suffix("") if path.suffix.lower() == ".mrxs" else path.parent
        reason = (
            f"a {path.suffix} is the first of many files, and the others are not where it needs them ({beside}): copy "
            "the whole slide"
        )
        return SlideDescription(path, path.suffix[1:], refusal=reason)
    if vendor is None and (reason := reason_against_format(path)):
        return SlideDescription(path, path.suffix[1:], refusal=reason)
    if vendor is None and not many_files:
        plain = _describe_plain_image(path)
        return plain if plain.levels or plain.refusal else replace(plain, readers=("OpenSlide", "Pillow"))
    return _with_properties(SlideDescription(path, vendor or path.suffix[1:], vendor, ("OpenSlide",)))
