# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Formats of slides that neither OpenSlide nor tifffile reads, by the ending of their files."""

from pathlib import Path

_OTHERS = {
    **dict.fromkeys((".vsi", ".ets"), "Olympus VSI"),
    **dict.fromkeys((".isyntax", ".i2syntax"), "Philips iSyntax"),
    **dict.fromkeys((".kfb", ".kfbf"), "KFBio"),
    **dict.fromkeys((".mds", ".mdsx"), "Motic MDS"),
    **dict.fromkeys((".jp2", ".j2k", ".jpf", ".jpx"), "JPEG 2000"),
    **{".sdpc": "SQRAY SDPC", ".tmap": "UNIC TMAP", ".lif": "Leica LIF", ".nd2": "Nikon ND2", ".zvi": "Zeiss ZVI"},
    **{".afi": "Aperio AFI (fluorescence)", ".ndpis": "Hamamatsu NDPIS (fluorescence)", ".oir": "Olympus OIR"},
    **{".dzi": "Deep Zoom (a folder of tiles)", ".dzc": "Deep Zoom (a folder of tiles)"},
}


def reason_against_format(path: Path) -> str | None:
    """Why a file of this ending cannot be read here, and the way out; None for all other endings."""
    name = _OTHERS.get(path.suffix.lower())
    return f"{name} is not supported: export it as OME-TIFF or SVS" if name else None
