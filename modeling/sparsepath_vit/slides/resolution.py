# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Where a slide file states its resolution, in micrometres per pixel (mpp), and which statements are believable."""

import math
import re
from dataclasses import dataclass
from xml.etree import ElementTree

# A scanner's level 0 lies between an oil objective (0.05) and 1x (10). 72, 96 or 300 dpi are what an image program
# writes when it knows nothing, and would be 353, 265 and 85 mpp.
CREDIBLE_MPP = (0.05, 10.0)
MICROMETRES_PER_UNIT = {"inch": 25400.0, "cm": 10000.0}
_OME_UNITS = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}
_OME_UNITS |= {"pm": 1e-6, "Å": 1e-4, "dm": 1e5, "in": 25400.0}

MppXY = tuple[float, float]


def is_credible(mpp: float) -> bool:
    """Whether `mpp` can be the full resolution of a microscope image."""
    return math.isfinite(mpp) and CREDIBLE_MPP[0] <= mpp <= CREDIBLE_MPP[1]


def credible_pair(mpp_x: float | str | None, mpp_y: float | str | None) -> MppXY | None:
    """The two numbers as floats, or None where either is missing, unreadable or unbelievable."""
    try:
        # Some scanners write their locale's decimal comma.
        pair = tuple(float(str(value).replace(",", ".")) for value in (mpp_x, mpp_y))
    except ValueError:
        return None
    return pair if all(is_credible(value) for value in pair) else None


def from_resolution_tags(pixels_x: float | None, pixels_y: float | None, unit: str) -> MppXY | None:
    """mpp from resolution tags in pixels per `unit` ("inch" or "cm"; anything else states nothing)."""
    if unit not in MICROMETRES_PER_UNIT or not pixels_x or not pixels_y:
        return None
    return credible_pair(MICROMETRES_PER_UNIT[unit] / pixels_x, MICROMETRES_PER_UNIT[unit] / pixels_y)


def from_aperio(description: str) -> MppXY | None:
    """mpp from an Aperio image description (`... |MPP = 0.4990| ...`)."""
    found = re.search(r"\|\s*MPP\s*=\s*([0-9.,]+)", description)
    return credible_pair(found.group(1), found.group(1)) if found else None


@dataclass(frozen=True)
class OmeImage:
    """One image of an OME-XML: its name, (width, height), mpp, names of its channels and significant bits a sample."""

    name: str
    dimensions: tuple[int, int]
    mpp: MppXY | None
    channels: tuple[str, ...]
    significant_bits: int | None


def ome_images(xml: str) -> list[OmeImage]:
    """The images of an OME-XML in order; none where it cannot be parsed."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return []
    images = []
    for image in root.iter():
        if tag_of(image) != "Image":
            continue
        for pixels in (child for child in image if tag_of(child) == "Pixels"):
            dimensions = (_whole(pixels.get("SizeX")) or 0, _whole(pixels.get("SizeY")) or 0)
            channels = tuple(child.get("Name") or "" for child in pixels if tag_of(child) == "Channel")
            bits = _whole(pixels.get("SignificantBits"))
            images.append(OmeImage(image.get("Name") or "", dimensions, _ome_mpp(pixels), channels, bits))
    return images


def from_ome(xml: str, dimensions: tuple[int, int]) -> MppXY | None:
    """mpp from OME-XML: PhysicalSizeX/Y of the image whose size is `dimensions` (width, height)."""
    return next((image.mpp for image in ome_images(xml) if image.dimensions == dimensions), None)


def from_imagej(unit: str | None, pixels_x: float | None, pixels_y: float | None) -> MppXY | None:
    """mpp of a file that ImageJ wrote: its own `unit`, and resolution tags in pixels per such a unit."""
    micrometres = _OME_UNITS.get((unit or "").replace("\\u00B5", "µ"))
    if micrometres is None or not pixels_x or not pixels_y:
        return None
    return credible_pair(micrometres / pixels_x, micrometres / pixels_y)


def tag_of(element: ElementTree.Element) -> str:
    """The name of an element without its namespace; empty for comments and the like."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.strip().isdigit() else None


def _ome_mpp(pixels: ElementTree.Element) -> MppXY | None:
    sizes = []
    for axis in ("X", "Y"):
        unit = _OME_UNITS.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        size = pixels.get(f"PhysicalSize{axis}")
        try:
            sizes.append(float(size) * unit)
        except (TypeError, ValueError):  # absent, no number, or a unit such as "pixel"
            return None
    return credible_pair(*sizes)
