# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""OME-TIFF in several files: which files one image is spread over."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
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


def open_parts(file: Any, pages: Sequence[Any]) -> list[Any]:
    """The other files that pages of an image lie in, opened, in the order of the pages; closing `file` closes them.

    Args:
        file: an open `tifffile.TiffFile`.
        pages: of one of its series; None for those whose file tifffile did not find.

    Returns:
        A `tifffile.TiffFile` each; tifffile closed them as soon as it had read their tags.
    """
    parts = list({id(page.parent): page.parent for page in pages if page is not None}.values())
    parts = [part for part in parts if part is not file]
    for part in parts:
        if part.filehandle.closed:
            part.filehandle.open()
    return parts


def reason_to_refuse_parts(file: Any, levels: Sequence[Any]) -> str | None:
    """Why the planes of an image cannot be read from the files that they lie in; None where they can.

    Args:
        file: an open `tifffile.TiffFile`.
        levels: of one of its series.
    """
    pages = [page for level in levels for page in level.pages]
    if None in pages:
        return "planes that its OME-XML lists are in other files, which are not beside it: put them there"
    folder = os.path.dirname(os.path.abspath(file.filehandle.path))
    for part in open_parts(file, pages):
        if os.path.dirname(os.path.abspath(part.filehandle.path)) != folder:
            return f"its OME-XML names a file outside its folder ({part.filehandle.path}): put it beside this one"
    if any(page.hash != level.keyframe.hash for level in levels for page in level.pages):
        return "its planes are not stored alike in the files they are spread over: export it as one file"
    return None


def describing_file(ome_xml: str) -> str | None:
    """The name of the file that describes an image of which this one only holds planes; None where it does so itself.

    Raises:
        ElementTree.ParseError: damaged OME-XML.
    """
    parts = [part for part in ElementTree.fromstring(ome_xml) if tag_of(part) == "BinaryOnly"]
    return parts[0].get("MetadataFile", "another file") if parts else None


def _ome_xml(path: Path) -> str | None:
    try:
        with decoding(), require("tifffile").TiffFile(path) as file:
            return file.ome_metadata if file.is_ome else None
    except SlideError:
        return None
