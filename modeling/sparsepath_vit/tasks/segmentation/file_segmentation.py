# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""An image or a slide through a trained segmentation model: mask, overlay, polygons and a report on disk."""

import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor

from ...model.configuration_segmentation_sparsepath_vit import SparsePathViTUniversalSegmentationConfig
from ...runtime.atomic_files import make_folder, write_atomically
from ...runtime.checkpoint_paths import checkpoint_config, existing_source
from ...runtime.compute import torch_device, weight_dtype
from ...runtime.figures import save_image
from ...slides.annotated_area import fill_annotated
from ...slides.annotations import Annotations, read_annotations
from ...slides.reader import Slide
from .regions import RegionSegmenter, compare_attention, label_map, load_segmenter, mask_image, overlay, to_geojson
from .sliding_window import SEAM_BAND, WindowGrid, seam_report

logger = logging.getLogger(__name__)

MAX_WHOLE_PIXELS = 2**24  # 4096 px square
MAX_PIXELS = 2**27  # image, probabilities and their sums are held in memory


@dataclass(frozen=True)
class SegmentSettings:
    """What is segmented, and how.

    Attributes:
        window_size: pixels of a window's side; the whole region at once where None.
        stride: pixels from window to window; two thirds of a window where None.
        seam_band: pixels on either side of a window's edge that the report looks at.
        compares_with_whole: with windows, whether the region is also segmented as a whole and the difference reported.
        mpp: micrometres per pixel to segment at; the full resolution as it is where None.
        slide_mpp: micrometres per pixel of the full resolution, where the file does not state it.
        region: (x, y, width, height) in pixels of the full resolution, from the corner of `Slide.frame`; all of that
            frame where None.
        min_area: pixels below which a piece gets no polygon.
        attention_window: patch tokens of an attention block's side; 0 is dense; as saved where None.
        compared_attention: attention windows that are reported against dense attention.
        origin: where coordinates of the region and the polygons start; see `Slide`.
        annotations: GeoJSON; what lies outside of its polygons is background, and the box around them is the region
            where none is given.
        annotation_classes: with `annotations`, the polygons of these classes alone.
    """

    window_size: int | None = None
    stride: int | None = None
    seam_band: int = SEAM_BAND
    compares_with_whole: bool = True
    mpp: float | None = None
    slide_mpp: float | None = None
    region: tuple[int, int, int, int] | None = None
    min_area: int = 0
    attention_window: int | None = None
    compared_attention: tuple[int, ...] = ()
    origin: str = "bounds"
    annotations: str | os.PathLike[str] | None = None
    annotation_classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.annotation_classes and self.annotations is None:
            raise ValueError(
                f"annotation_classes={self.annotation_classes!r} choose among polygons: give annotations, too."
            )
        if self.stride is not None and self.window_size is None:
            raise ValueError(f"stride={self.stride} says how far windows are apart: give window_size, too.")


@dataclass(frozen=True)
class _RegionPixels:
    """(height, width, 3) uint8 pixels, the file's name, and where they lie in pixels of the full resolution.

    `origin` is their corner as polygons count, from that of `Slide.frame`; `level0_origin` as the file does.
    `annotated` is (height, width) bool, True for what is to be segmented; None for all.
    """

    image: np.ndarray
    name: str
    origin: tuple[float, float]
    level0_origin: tuple[float, float]
    scale: tuple[float, float]
    annotated: np.ndarray | None = None


def segment_file(
    image: str | os.PathLike[str],
    model_source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: SegmentSettings | None = None,
    *,
    device: str | None = None,
    dtype: str | None = "float32",
) -> tuple[dict[str, Any], list[Path]]:
    """Segments an image or a slide of any size.

    Writes into `out`: NAME_mask.png (0 background, 1 and up the labels), NAME_overlay.png, NAME.geojson (polygons in
    pixels of the full resolution, as QuPath imports them) and NAME_report.json. With windows the report says how their
    masks differ from the whole region's, in a band around the windows' edges and elsewhere.

    Args:
        image: PNG, JPEG, TIFF, or a slide.
        model_source: folder or Hub id of a segmentation model, such as scripts/train_segpath.py trains.
        out: folder for the results, made if missing.
        settings: what is segmented, and how.
        device: "cpu", "cuda", ...; CUDA where there is one, by default.
        dtype: of the weights: "float32", "bfloat16" or "float16"; by default the one that the device is faster in.

    Returns:
        The report, and the files in the order to look at them.

    Raises:
        SlideError: the file or the region cannot be read.
        ValueError: the region is smaller than a window or too large for memory, or the model segments nothing.
        OSError: no model at `model_source`, or a full disk.
    """
    settings = settings or SegmentSettings()
    region = _read_region(image, settings)
    model_source, config = existing_source(model_source), checkpoint_config(model_source)
    if not isinstance(config, SparsePathViTUniversalSegmentationConfig):
        raise ValueError(
            f"model={model_source!r} is a {config.model_type}, no segmentation model: train one with "
            "scripts/train_segpath.py."
        )
    processor = AutoImageProcessor.from_pretrained(model_source)
    chosen = torch_device(device)
    place = {"device": chosen, "dtype": weight_dtype(dtype, chosen)}
    segmenter = load_segmenter(model_source, processor, settings.attention_window, **place)
    probabilities, seams = _segment(segmenter, region.image, settings)
    masks = segmenter.masks(probabilities)
    if region.annotated is not None:
        masks &= region.annotated
    report = {
        "image": Path(image).name,
        "model": Path(model_source).name,
        **_describe(region, masks, segmenter.label_names),
        **seams,
    }
    if settings.compared_attention:
        windows = settings.compared_attention
        report["attention"] = compare_attention(model_source, processor, region.image, windows, **place)
    labels = label_map(masks, probabilities.numpy(), segmenter.label_names)
    polygons = to_geojson(masks, segmenter.label_names, region.origin, region.scale, settings.min_area)
    return report, _write(Path(out), region, labels, polygons, report)


def _read_region(image: str | os.PathLike[str], settings: SegmentSettings) -> _RegionPixels:
    with Slide(image, mpp=settings.slide_mpp, origin=settings.origin) as slide:
        scale = slide.scale(settings.mpp)
        left, top, *frame_size = slide.frame
        annotations = None if settings.annotations is None else _read_annotations(Path(settings.annotations))
        x, y, width, height = settings.region or _box(annotations, settings.annotation_classes, frame_size)
        size = tuple(max(1, math.floor(side / step + 1e-6)) for side, step in zip((width, height), scale, strict=True))
        if size[0] * size[1] > MAX_PIXELS:
            raise ValueError(
                f"the region is {size[0]} x {size[1]} px (width x height), more than {MAX_PIXELS:,} px in all: name a "
                "part with --region X Y WIDTH HEIGHT, or a coarser --mpp."
            )
        corner = (left + x, top + y)
        pixels = slide.read_region(*corner, *size, mpp=settings.mpp)
        annotated = None
        if annotations is not None:
            annotated = np.zeros(pixels.shape[:2], dtype=bool)
            name = Path(settings.annotations).name
            fill_annotated(annotated, annotations, settings.annotation_classes, (x, y), scale, name)
        return _RegionPixels(pixels, slide.name, (x, y), corner, scale, annotated)


def _read_annotations(path: Path) -> Annotations:
    try:
        return read_annotations(path)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"annotations={path.name!r} is no GeoJSON of polygons ({error!r}).") from error


def _box(
    annotations: Annotations | None, classes: Sequence[str], frame_size: Sequence[int]
) -> tuple[int, int, int, int]:
    """(x, y, width, height) of what there is to segment: the polygons that are taken, or all of the frame."""
    if annotations is None:
        return (0, 0, *frame_size)
    outlines = [polygon.rings[0] for polygon in annotations.taken(classes)]
    corners = [[ring.min(axis=0), ring.max(axis=0)] for ring in outlines]
    if not corners:
        raise ValueError("the annotations hold no polygon to segment in.")
    low = np.floor(np.min([low for low, _ in corners], axis=0)).clip(0, frame_size).astype(int)
    high = np.ceil(np.max([high for _, high in corners], axis=0)).clip(0, frame_size).astype(int)
    if (high <= low).any():
        raise ValueError(f"the annotations lie outside of the slide's {frame_size[0]} x {frame_size[1]} pixels.")
    return (*low.tolist(), *(high - low).tolist())


def _segment(
    segmenter: RegionSegmenter, image: np.ndarray, settings: SegmentSettings
) -> tuple[torch.Tensor, dict[str, Any]]:
    """(labels, height, width) probabilities, and the report on seams where windows were asked for."""
    height, width = image.shape[:2]
    fits = height * width <= MAX_WHOLE_PIXELS
    if settings.window_size is None:
        if not fits:
            raise ValueError(
                f"the region is {width} x {height} px (width x height), more than {MAX_WHOLE_PIXELS:,} px in one "
                "piece: pass --window-size, such as --window-size 896 --stride 596."
            )
        return segmenter.whole(image), {}
    stride = settings.stride or max(1, settings.window_size * 2 // 3)
    grid = WindowGrid((height, width), settings.window_size, stride)
    sliding = segmenter.sliding(image, grid, show_progress=True)
    if not settings.compares_with_whole:
        return sliding, {}
    if not fits:
        logger.warning("the region is too large to be segmented as a whole: no report on seams.")
        return sliding, {}
    whole = segmenter.whole(image)
    return sliding, {"seams": seam_report(whole.numpy(), sliding.numpy(), grid, settings.seam_band)}


def _describe(region: _RegionPixels, masks: np.ndarray, label_names: tuple[str, ...]) -> dict[str, Any]:
    """Where the region lies, and which share of it, or of what is annotated in it, each label covers."""
    height, width = region.image.shape[:2]
    area = height * width if region.annotated is None else max(1, int(region.annotated.sum()))
    return {
        "size": [width, height],
        "origin": list(region.origin),
        "origin_level0": list(region.level0_origin),
        "level0_pixels_per_pixel": list(region.scale),
        "labels": {str(index + 1): label for index, label in enumerate(label_names)},
        "area_share": {label: float(mask.sum()) / area for label, mask in zip(label_names, masks, strict=True)},
    }


def _write(
    out: Path, region: _RegionPixels, labels: np.ndarray, polygons: dict[str, Any], report: dict[str, Any]
) -> list[Path]:
    """The four files, each renamed into place when complete."""
    make_folder(out)
    files = [out / f"{region.name}{ending}" for ending in ("_mask.png", "_overlay.png", ".geojson", "_report.json")]
    save_image(mask_image(labels), files[0])
    save_image(overlay(region.image, labels), files[1])
    write_atomically(files[2], json.dumps(polygons))
    write_atomically(files[3], json.dumps(report, indent=2) + "\n")
    return files
