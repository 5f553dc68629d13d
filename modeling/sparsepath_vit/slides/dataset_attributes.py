# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a slide's file says of its coordinates and features, under the names that TRIDENT, CLAM and others read."""

from typing import TYPE_CHECKING, Any

from .reader import Slide
from .regions import SlideInput

if TYPE_CHECKING:
    from .embedder import EmbedSettings
    from .store import SlideWriter

_THIS_FOLDER = "."  # others write a path; a file of ours is the same wherever it lies


def describe_datasets(
    writer: "SlideWriter",
    slide: Slide,
    name: str,
    item: SlideInput,
    settings: "EmbedSettings",
    mpp: float,
    patch_size: int,
    encoder: str,
) -> None:
    """Sets the attributes of a slide's datasets, sizes in level-0 pixels beside those at `mpp`.

    Args:
        writer: with features and coordinates in it.
        slide: the slide.
        name: of the result.
        item: what was embedded, without the boxes that were left out.
        settings: what was taken of the slide.
        mpp: the resolution that it was taken at.
        patch_size: the model's, in pixels.
        encoder: name of the model.
    """
    scale, scale_y = slide.scale(mpp)
    attributes = coordinate_attributes(slide, name, _tile_size(slide, item, settings, mpp, patch_size), mpp)
    attributes |= {"overlap": settings.overlap, "savetodir": _THIS_FOLDER}
    if settings.tile_size is not None:
        attributes["minimum_tissue"] = settings.minimum_tissue
    writer.describe("coords", attributes)
    label = {"label": item.label} if item.label else {}
    writer.describe("features", {"name": name, "savetodir": _THIS_FOLDER, "encoder": encoder, **label})
    token_attributes = {"token_size": patch_size, "token_size_level0": (patch_size * scale, patch_size * scale_y)}
    for dataset in ("patch_coords", "token_coords"):
        if settings.dense:
            writer.describe(dataset, token_attributes)


def coordinate_attributes(slide: Slide, name: str, size: int, mpp: float) -> dict[str, Any]:
    """The attributes of coordinates of squares of `size` pixels at `mpp`."""
    scale, own_mpp = slide.scale(mpp)[0], slide.mpp
    mpp = slide.mpp_xy[0] * scale  # the same along y, also where the slide's own pixels are oblong
    attributes = {
        "name": name,
        "patch_size": size,
        "patch_size_level0": round(size * scale),
        "patch_level": 0,
        "custom_downsample": scale,
        "mpp": mpp,
        "level0_mpp": own_mpp,
        "level0_magnification": round(10 / own_mpp),
        "target_magnification": round(10 / mpp),
        "level0_width": slide.dimensions[0],
        "level0_height": slide.dimensions[1],
    }
    if slide.frame[:2] != (0, 0):  # the level-0 pixel that all coordinates in the file count from
        attributes["origin_level0"] = slide.frame[:2]
    return attributes


def _tile_size(slide: Slide, item: SlideInput, settings: "EmbedSettings", mpp: float, patch_size: int) -> int:
    """Side in pixels of what one row of features stands for: a tile, or the largest region in whole patches."""
    if settings.tile_size is not None:
        return settings.tile_size
    scale, scale_y = slide.scale(mpp)
    sizes = slide.size_at(mpp) if settings.whole_slide else [settings.region_size]
    if item.boxes:
        sizes = [side for box in item.boxes for side in (box.width / scale, box.height / scale_y)]
    return -(-int(max(sizes)) // patch_size) * patch_size
