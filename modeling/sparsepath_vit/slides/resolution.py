# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Where a slide file states its resolution, in micrometres per pixel (mpp), and which statements are believable."""

import math
import re
from xml.etree import ElementTree

# A scanner's level 0 lies between an oil objective (0.05) and 1x (10). 72, 96 or 300 dpi are what an image program
# writes when it knows nothing, and would be 353, 265 and 85 mpp.
CREDIBLE_MPP = (0.05, 10.0)
MICROMETRES_PER_UNIT = {"inch": 25400.0, "cm": 10000.0}
_OME_UNITS = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "micron": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}

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


def from_ome(xml: str, dimensions: tuple[int, int]) -> MppXY | None:
    """mpp from OME-XML: PhysicalSizeX/Y of the image whose size is `dimensions` (width, height)."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return None
    for pixels in root.iter():
        if not pixels.tag.endswith("Pixels"):
            continue
        if (pixels.get("SizeX"), pixels.get("SizeY")) != (str(dimensions[0]), str(dimensions[1])):
            continue
        sizes = []
        for axis in ("X", "Y"):
            unit = _OME_UNITS.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
            size = pixels.get(f"PhysicalSize{axis}")
            try:
                sizes.append(float(size) * unit)
            except (TypeError, ValueError):  # absent, no number, or a unit such as "pixel"
                return None
        return credible_pair(*sizes)
    return None
