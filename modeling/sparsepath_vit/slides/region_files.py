# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Regions that other tools chose: coordinates of TRIDENT, CLAM and slide2vec, annotations of QuPath."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.extras import require
from .annotations import ANNOTATION_SUFFIXES, Polygon, read_annotations
from .errors import SlideError
from .outlines import fill
from .reader import Slide
from .regions import Box, Region, SlideInput

COORDINATE_SUFFIXES = (".h5", "_patches.h5", ".hdf5", ".coordinates.npz")
_CELLS = 4  # of a token's side, to decide how much of it lies in an annotation


def with_regions(
    item: SlideInput,
    name: str,
    regions: Path,
    slide_mpp: float | None,
    origin: str,
    classes: Sequence[str] = (),
) -> SlideInput:
    """A slide with the regions that a file, or the file of its name in a folder, gives it.

    Args:
        item: the slide, without regions of its own.
        name: of its result.
        regions: the file or folder.
        slide_mpp: resolution of all slides, where it is given.
        origin: where the run's coordinates start.
        classes: of annotations, which to take; see `read_region_file`.

    Raises:
        SlideError: there is no such file, or it cannot be understood.
    """
    path = _file_of(regions, name)
    boxes = read_region_file(path, classes)
    if origin == "bounds" and path.suffix.lower() not in ANNOTATION_SUFFIXES and not _counts_as_we_do(path):
        _refuse_other_frame(item, path, slide_mpp)
    return replace(item, boxes=tuple(boxes), gives_labels=any(box.label is not None for box in boxes))


def read_region_file(path: Path, classes: Sequence[str] = ()) -> list[Box]:
    """The regions in a file of coordinates (.h5 of TRIDENT and CLAM, .npz of slide2vec) or annotations (GeoJSON).

    Of annotations each polygon is a region, with its class as label; classes that QuPath ignores are left out. With
    `classes` polygons of these alone.

    Raises:
        SlideError: the file cannot be read, holds nothing, none of a class, or does not say how large its regions are.
    """
    readers: dict[str, Callable[[Path], list[Box]]] = {
        **dict.fromkeys((".h5", ".hdf5"), _boxes_of_h5),
        ".npz": _boxes_of_npz,
        **dict.fromkeys(ANNOTATION_SUFFIXES, partial(_boxes_of_annotations, classes=classes)),
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise SlideError(f"{path} is no file of regions: the endings are {', '.join(readers)}.")
    try:
        boxes = reader(path)
    except SlideError:
        raise
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise SlideError(f"{path} cannot be read as regions ({error!r}).") from error
    if not boxes:
        raise SlideError(f"{path} holds no regions.")
    return boxes


def tokens_in_outline(region: Region, slide: Slide, patch_size: int, mpp: float) -> np.ndarray:
    """Which patch tokens of a region lie in its outline by half or more; of a smaller outline the one that holds most.

    Returns:
        (rows, columns) bool.
    """
    rows, columns = -(-region.height // patch_size), -(-region.width // patch_size)
    cells = np.zeros((rows * _CELLS, columns * _CELLS), dtype=bool)
    corner = np.array([region.x, region.y]) - slide.frame[:2]
    cell = np.array(slide.scale(mpp)) * patch_size / _CELLS  # (width, height) in level-0 pixels
    fill(cells, [(ring - corner) / cell for ring in region.outline.rings])
    share = cells.reshape(rows, _CELLS, columns, _CELLS).mean(axis=(1, 3))
    inside = share >= 0.5
    return inside if inside.any() else (share == share.max()) & (share > 0)


def _file_of(regions: Path, name: str) -> Path:
    if not regions.is_dir():
        return regions
    candidates = [regions / f"{name}{suffix}" for suffix in (*COORDINATE_SUFFIXES, *ANNOTATION_SUFFIXES)]
    for path in candidates:
        if path.exists():
            return path
    raise SlideError(f"{regions} holds no regions of {name}: expected {', '.join(path.name for path in candidates)}.")


def _counts_as_we_do(path: Path) -> bool:
    """Whether a file of coordinates is one of ours, that counts from the scanned area and says so."""
    if path.suffix.lower() == ".npz":
        return False
    with require("h5py").File(path, "r") as file:
        return "origin_level0" in file["coords"].attrs


def _refuse_other_frame(item: SlideInput, path: Path, slide_mpp: float | None) -> None:
    """Coordinates of other toolkits count from the corner of level 0, ours may not."""
    with Slide(item.path, mpp=item.mpp or slide_mpp, apart=True) as slide:
        if slide.frame[:2] == (0, 0):
            return
        raise SlideError(
            f"{path} counts from the corner of level 0 of {item.path}, whose scanned area starts at "
            f"x={slide.frame[0]}, y={slide.frame[1]}: pass --origin slide, so that all coordinates count from there."
        )


def _boxes_of_h5(path: Path) -> list[Box]:
    with require("h5py").File(path, "r") as file:
        coords, attributes = file["coords"][:], dict(file["coords"].attrs)
    width, height = _size_at_level0(path, attributes)
    return [Box(int(x), int(y), width, height) for x, y in coords]


def _size_at_level0(path: Path, attributes: dict[str, Any]) -> tuple[int, int]:
    """(width, height) of a tile: stated by TRIDENT, HEST and newer CLAM; in older CLAM a size at a level."""
    if "patch_size_level0" in attributes:
        size = int(attributes["patch_size_level0"])
        return size, size
    if "patch_size" not in attributes:
        raise SlideError(f"{path}: coords has neither the attribute patch_size_level0 nor patch_size: add one of them.")
    if "downsample" in attributes:
        downsample = np.broadcast_to(np.asarray(attributes["downsample"], dtype=float), 2)
    elif int(attributes.get("patch_level", 0)) == 0:
        downsample = np.full(2, float(attributes.get("custom_downsample", 1)))
    else:
        raise SlideError(
            f"{path}: patch_size={attributes['patch_size']} is at patch_level={attributes['patch_level']}, and nothing "
            "says how far that level is downsampled: add the attribute patch_size_level0 to coords."
        )
    return tuple(round(int(attributes["patch_size"]) * factor) for factor in downsample)


def _boxes_of_npz(path: Path) -> list[Box]:
    beside = path.with_name(f"{path.name.removesuffix('.npz')}.meta.json")
    if not beside.exists():
        raise SlideError(f"{path}: {beside.name} is not beside it, which says how large the tiles are.")
    size = int(json.loads(beside.read_text(encoding="utf-8"))["tiling"]["tile_size_lv0"])
    with np.load(path, allow_pickle=False) as arrays:
        return [Box(int(x), int(y), size, size) for x, y in zip(arrays["x"], arrays["y"], strict=True)]


def _boxes_of_annotations(path: Path, classes: Sequence[str]) -> list[Box]:
    annotations = read_annotations(path)
    try:
        return [_box_of(polygon) for polygon in annotations.taken(classes)]
    except ValueError as error:
        raise SlideError(f"{path}: {error}.") from error


def _box_of(polygon: Polygon) -> Box:
    left, top = (int(side) for side in np.floor(polygon.rings[0].min(axis=0)))
    right, bottom = (int(side) for side in np.ceil(polygon.rings[0].max(axis=0)))
    return Box(left, top, max(1, right - left), max(1, bottom - top), polygon.class_name, outline=polygon)
