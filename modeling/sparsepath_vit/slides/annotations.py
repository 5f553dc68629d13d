# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Annotations as QuPath, TRIDENT and others write them: the polygons of a GeoJSON file, with their classes.

Arrays of coordinates are taken out of the text and read by NumPy, 16 bytes a vertex: as Python lists they would take
ten times as much, and files of millions of vertices are common.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ANNOTATION_SUFFIXES = (".geojson", ".json")
Ring = np.ndarray  # (vertices, 2) float x and y; the last may be the first again

_COORDINATES = re.compile(r'(?<!\\)("coordinates"\s*:\s*)(\[[\[\]\s\d.,eE+-]*\])')
_END_OF_RING = re.compile(r"\](?:\s*\])+")
_NO_BRACKETS = str.maketrans("", "", "[]")
_KEPT_OUT = "background"  # a class of this name is no tissue, whoever wrote it
_NO_CLASS = "without a class"


@dataclass(frozen=True)
class Polygon:
    """One polygon of an annotation: its rings, the outline first, then its holes, and its class (None without)."""

    rings: tuple[Ring, ...]
    class_name: str | None = None

    @property
    def shown_class(self) -> str:
        """The class as messages name it and `Annotations.taken` finds it."""
        return (self.class_name or _NO_CLASS).strip()

    @property
    def is_ignored(self) -> bool:
        """Whether the class says that this is no tissue: QuPath ignores those that end in a star, such as `Region*`."""
        name = (self.class_name or "").strip()
        return name.endswith("*") or name.lower() == _KEPT_OUT

    @property
    def is_cut_out(self) -> bool:
        """Whether the polygon takes away from others: one of QuPath's class `Ignore*`, or of the background."""
        return (self.class_name or "").strip().lower() in ("ignore*", _KEPT_OUT)


@dataclass(frozen=True)
class Annotations:
    """What a GeoJSON file holds: its polygons, and how many geometries are none (points, lines, empty ones)."""

    polygons: tuple[Polygon, ...]
    others: int

    def counts(self) -> dict[str, int]:
        """How many polygons each class has, in the order of the file; "without a class" for those without."""
        counts: dict[str, int] = {}
        for polygon in self.polygons:
            counts[polygon.shown_class] = counts.get(polygon.shown_class, 0) + 1
        return counts

    def taken(self, classes: Sequence[str] = ()) -> list[Polygon]:
        """The polygons of these classes, also of those that QuPath ignores; without names of all that it does not.

        Raises:
            ValueError: a class that none of the polygons has; the message names those that they have.
        """
        if not classes:
            return [polygon for polygon in self.polygons if not polygon.is_ignored]
        counts, wanted = self.counts(), {name.strip() for name in classes}
        if missing := sorted(wanted - set(counts)):
            there = ", ".join(f"{name} ({count:,})" for name, count in counts.items()) or "no polygons at all"
            raise ValueError(f"no polygon is of the class {', '.join(map(repr, missing))}; there are: {there}")
        return [polygon for polygon in self.polygons if polygon.shown_class in wanted]

    def cut_out(self, classes: Sequence[str] = ()) -> list[Polygon]:
        """The polygons that take away from others; one of a class that was asked for by name takes nothing away."""
        wanted = {name.strip() for name in classes}
        return [polygon for polygon in self.polygons if polygon.is_cut_out and polygon.shown_class not in wanted]


def read_annotations(path: Path) -> Annotations:
    """The polygons of a GeoJSON file: a FeatureCollection, a list of features, one feature, or geometries.

    Text may be UTF-8, -16 or -32, with a byte order mark or without. Features without a geometry, points and lines
    are counted and left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no GeoJSON; the message says where.
    """
    content = path.read_bytes()
    text = content.decode(json.detect_encoding(content))
    del content
    arrays: list[str] = []

    def take_out(found: re.Match[str]) -> str:
        arrays.append(found[2])
        return f"{found[1]}{len(arrays) - 1}"

    text = _COORDINATES.sub(take_out, text)
    try:
        geometries = list(_geometries(json.loads(text), None))
    except RecursionError as error:
        raise ValueError("its parts are nested too deeply") from error
    polygons, others = [], 0
    for geometry, class_name in geometries:
        if geometry is None or geometry["type"] not in ("Polygon", "MultiPolygon"):
            others += 1
            continue
        index = geometry.get("coordinates")
        if type(index) is not int or not 0 <= index < len(arrays):
            raise ValueError(f"the coordinates of a {geometry['type']} are {index!r:.60}, and no list of numbers alone")
        found = [Polygon(rings, class_name) for rings in _polygons(arrays[index], geometry["type"])]
        others += not found
        polygons += found
    return Annotations(tuple(polygons), others)


def _geometries(content: Any, class_name: str | None) -> Iterator[tuple[dict[str, Any] | None, str | None]]:
    """Every geometry in a collection, list, feature or geometry, with the class of its feature; None for none."""
    if isinstance(content, list):
        for part in content:
            yield from _geometries(part, class_name)
        return
    if content is None:
        yield None, class_name
        return
    if not isinstance(content, dict) or not isinstance(content.get("type"), str):
        raise ValueError(f"a part of it has no type: {content!r:.60}")
    kind = content["type"]
    if kind == "FeatureCollection":
        yield from _geometries(_listed(content, "features"), None)
    elif kind == "Feature":
        yield from _geometries(content.get("geometry"), _class_of(content.get("properties")))
    elif kind == "GeometryCollection":
        yield from _geometries(_listed(content, "geometries"), class_name)
    else:
        yield content, class_name


def _listed(content: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(content.get(key), list):
        raise ValueError(f"a {content['type']} has no list of {key}")
    return content[key]


def _class_of(properties: Any) -> str | None:
    """The class of a feature: an object with a name or names in QuPath, a text elsewhere."""
    found = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(found, dict):
        names = found.get("names")
        found = ": ".join(map(str, names)) if isinstance(names, list) and names else found.get("name")
    return found if isinstance(found, str) and found.strip() else None


def _polygons(array: str, kind: str) -> Iterator[tuple[Ring, ...]]:
    """The polygons of the array of coordinates of a geometry of the type `kind`."""
    depth = 3 if kind == "Polygon" else 4
    opened = re.match(r"(?:\[\s*)+", array)[0].count("[")
    if array.count("[") != array.count("]") or (opened != depth and any(map(str.isdigit, array))):
        raise ValueError(f"the coordinates of a {kind} are nested {opened} deep, not {depth}: {array[:60]}")
    rings: list[Ring] = []
    start = 0
    for end in _END_OF_RING.finditer(array):  # two brackets close a ring, three a polygon, four all of them
        ring = _ring(array[start : end.start() + 1])
        start = end.end()
        if ring is not None:
            rings.append(ring)
        if end[0].count("]") >= 3 and rings:
            yield tuple(rings)
            rings = []


def _ring(text: str) -> Ring | None:
    """The vertices of one ring, `[[x, y], ..., [x, y]`; None for an empty one. A third number a vertex is not used."""
    numbers = text.translate(_NO_BRACKETS).strip(", \t\r\n")
    if not numbers:
        return None
    vertices = text.count("]")
    size = numbers.count(",") + 1
    try:
        values = np.fromstring(numbers, dtype=float, sep=",")
    except ValueError:  # older NumPy warns and ends there
        values = np.empty(0)
    if len(values) != size or size % vertices or size // vertices < 2 or not np.isfinite(values).all():
        raise ValueError(f"the ring that starts with {numbers[:60]} is no list of (x, y)")
    return values.reshape(vertices, -1)[:, :2]
