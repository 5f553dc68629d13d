# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""OME-TIFF in several files: which files one image is spread over."""

import re
from pathlib import Path
from xml.etree import ElementTree

from ..runtime.extras import require
from .errors import SlideError, decoding
from .resolution import tag_of

_OME_SUFFIX = re.compile(r".+\.ome\.(?:tiff?|tf2|tf8|btf)", re.IGNORECASE)


def may_have_parts(path: Path) -> bool:
    """Whether the name is that of an OME-TIFF, which alone may consist of several files."""
    return _OME_SUFFIX.fullmatch(path.name) is not None


def files_of_ome(path: Path) -> list[Path]:
    """The files that the OME-XML of `path` names and that exist, in its order: the first stands for all of them.

    Every file of such a set holds the whole description, or says in which file it is (`BinaryOnly`). Empty for a file
    that stands for itself alone, and for one that cannot be read, of which the reader will say why.
    """
    text = _ome_xml(path)
    try:
        root = ElementTree.fromstring(text) if text else None
    except ElementTree.ParseError:
        root = None
    if root is None:
        return []
    names: dict[str, None] = {}
    for element in root.iter():
        name = element.get({"UUID": "FileName", "BinaryOnly": "MetadataFile"}.get(tag_of(element), ""))
        if name and Path(name).name == name:  # nothing outside the folder
            names[name] = None
    files = [file for name in names if (file := path.parent / name).is_file()]
    return files if set(files) - {path} else []


def _ome_xml(path: Path) -> str | None:
    try:
        with decoding(), require("tifffile").TiffFile(path) as file:
            return file.ome_metadata if file.is_ome else None
    except SlideError:
        return None
