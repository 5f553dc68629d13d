#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""Segments an image or a slide with a model of scripts/train_segpath.py.

The region is segmented as a whole, or with --window in windows that overlap, their probabilities averaged. Writes into
--out: NAME_mask.png (0 background, 1 and up the labels), NAME_overlay.png, NAME.geojson (polygons in level-0 pixels, as
QuPath imports them) and NAME_report.json. With --window the report says how the windows' masks differ from the whole
region's, in a band around the windows' edges and elsewhere.

Examples:
    python scripts/segment.py region.png --model outputs/epithelium --out outputs/masks
    python scripts/segment.py region.png --model outputs/epithelium --out outputs/masks --window 896 --stride 596
    python scripts/segment.py slide.svs --model outputs/epithelium --out outputs/masks --mpp 0.22 \
        --region 12000 8000 4096 4096
    python scripts/segment.py region.png --model outputs/epithelium --out outputs/masks --compare_attention 64 2
"""

import argparse
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoImageProcessor

from sparsepath_vit import SparsePathViTUniversalSegmentationConfig
from sparsepath_vit.runtime.atomic_files import write_atomically
from sparsepath_vit.runtime.extras import imports_of_extra
from sparsepath_vit.runtime.figures import save_image
from sparsepath_vit.slides import Slide, SlideError

with imports_of_extra("train"):
    from sparsepath_vit.tasks.segmentation.regions import (
        RegionSegmenter,
        compare_attention,
        label_map,
        load_segmenter,
        mask_image,
        overlay,
        to_geojson,
    )
    from sparsepath_vit.tasks.segmentation.sliding_window import SEAM_BAND, WindowGrid, seam_report

logger = logging.getLogger("segment")

MAX_WHOLE_PIXELS = 2**24  # 4096 px square
MAX_PIXELS = 2**27  # image, probabilities and their sums are held in memory


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", metavar="IMAGE|SLIDE", help="PNG, JPEG, TIFF, or a slide that OpenSlide reads")
    parser.add_argument("--model", required=True, help="folder or Hub id of a segmentation model")
    parser.add_argument("--out", required=True, type=Path, help="folder for the results, made if missing")
    parser.add_argument("--window", type=int, help="pixels per side of a window; the whole region at once by default")
    parser.add_argument("--stride", type=int, help="pixels from window to window; two thirds of a window by default")
    parser.add_argument("--seam_band", type=int, default=SEAM_BAND, help="pixels on either side of a window's edge")
    parser.add_argument("--no_whole", action="store_true", help="with --window: do not compare with the whole region")
    parser.add_argument("--mpp", type=float, help="micrometres per pixel to segment at; level 0 as it is by default")
    parser.add_argument(
        "--slide-mpp", "--image_mpp", dest="image_mpp", type=float,
        help="micrometres per pixel of level 0, where the file is silent",
    )  # fmt: skip
    parser.add_argument(
        "--region", type=int, nargs=4, metavar=("X", "Y", "WIDTH", "HEIGHT"), help="in level-0 pixels; all by default"
    )
    parser.add_argument("--min_area", type=int, default=0, help="pixels below which a piece gets no polygon")
    parser.add_argument("--attention_window", type=int, help="tokens per block side; 0 is dense; as saved by default")
    parser.add_argument(
        "--compare_attention", type=int, nargs="+", metavar="TOKENS", help="also report these against dense attention"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", help="such as cuda or cpu; the accelerator by default, where there is one")
    return parser.parse_args(argv)


def read_region(arguments: argparse.Namespace) -> tuple[np.ndarray, str, tuple[float, float], tuple[float, float]]:
    """The pixels, the file's name, where they lie and how large they are in level-0 pixels.

    Raises:
        SlideError: the file or the region cannot be read.
        ValueError: more pixels than are held in memory.
    """
    with Slide(arguments.image, mpp=arguments.image_mpp) as slide:
        scale = slide.scale(arguments.mpp)
        x, y, width, height = arguments.region or (0, 0, *slide.dimensions)
        size = tuple(max(1, math.floor(side / step + 1e-6)) for side, step in zip((width, height), scale, strict=True))
        if size[0] * size[1] > MAX_PIXELS:
            raise ValueError(
                f"the region is {size[0]} x {size[1]} px (width x height), more than {MAX_PIXELS:,} px in all: name a "
                "part with --region X Y WIDTH HEIGHT, or a coarser --mpp."
            )
        return slide.read_region(x, y, *size, mpp=arguments.mpp), slide.name, (x, y), scale


def segment(
    segmenter: RegionSegmenter, image: np.ndarray, arguments: argparse.Namespace
) -> tuple[torch.Tensor, dict[str, Any]]:
    """(labels, height, width) probabilities, and the report on seams where windows were asked for.

    Raises:
        ValueError: the region is smaller than a window, or too large to be segmented as a whole.
    """
    height, width = image.shape[:2]
    fits = height * width <= MAX_WHOLE_PIXELS
    if arguments.window is None:
        if not fits:
            raise ValueError(
                f"the region is {width} x {height} px (width x height), more than {MAX_WHOLE_PIXELS:,} px in one "
                "piece: pass --window, such as --window 896 --stride 596."
            )
        return segmenter.whole(image), {}
    stride = arguments.stride or max(1, arguments.window * 2 // 3)
    grid = WindowGrid((height, width), arguments.window, stride)
    sliding = segmenter.sliding(image, grid, show_progress=True)
    if arguments.no_whole:
        return sliding, {}
    if not fits:
        logger.warning("the region is too large to be segmented as a whole: no report on seams.")
        return sliding, {}
    whole = segmenter.whole(image)
    return sliding, {"seams": seam_report(whole.numpy(), sliding.numpy(), grid, arguments.seam_band)}


def say(report: dict[str, Any]) -> None:
    for name, share in report["area_share"].items():
        logger.info("%s: %.1f %% of the region", name, 100 * share)
    if "seams" in report:
        seams = report["seams"]
        logger.info("%d windows of %d px against the whole region:", seams["num_windows"], seams["window"])
        for place in ("seam_band", "elsewhere", "all"):
            shares = {name: value for name, value in seams[place].items() if name != "pixels"}
            cells = [f"{name} {'-' if value is None else format(value, '.4f')}" for name, value in shares.items()]
            cells.append(f"{seams[place]['pixels']:,} px")
            logger.info("  %-10s %s", place, "   ".join(cells))
    for row in report.get("attention", ()):
        name = f"w = {row['window_size']}" if row["window_size"] else "dense"
        logger.info(
            "  %-8s mask agreement %.4f   Dice %.4f   pieces %d   %.1f s   peak %.0f MB",
            name, row["mask_agreement"], row["dice"], row["pieces"], row["seconds"], row["peak_bytes"] / 1e6,
        )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Segments, writes and reports."""
    if arguments.stride is not None and arguments.window is None:
        raise ValueError(f"--stride {arguments.stride} says how far windows are apart: pass --window, too.")
    image, name, origin, scale = read_region(arguments)
    config = AutoConfig.from_pretrained(arguments.model)
    if not isinstance(config, SparsePathViTUniversalSegmentationConfig):
        raise ValueError(
            f"--model {arguments.model} is a {config.model_type}, no segmentation model: train one with "
            "scripts/train_segpath.py."
        )
    processor = AutoImageProcessor.from_pretrained(arguments.model)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    place = {"device": arguments.device or accelerator, "dtype": getattr(torch, arguments.dtype)}
    segmenter = load_segmenter(arguments.model, processor, arguments.attention_window, **place)
    probabilities, report = segment(segmenter, image, arguments)
    masks = segmenter.masks(probabilities)
    labels = label_map(masks, probabilities.numpy(), segmenter.label_names)
    report = {
        "image": Path(arguments.image).name,
        "model": Path(arguments.model).name,
        "size": [image.shape[1], image.shape[0]],
        "origin_level0": list(origin),
        "level0_pixels_per_pixel": list(scale),
        "labels": {str(index + 1): label for index, label in enumerate(segmenter.label_names)},
        "area_share": {label: float(mask.mean()) for label, mask in zip(segmenter.label_names, masks, strict=True)},
        **report,
    }
    if arguments.compare_attention:
        report["attention"] = compare_attention(arguments.model, processor, image, arguments.compare_attention, **place)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    save_image(mask_image(labels), out / f"{name}_mask.png")
    save_image(overlay(image, labels), out / f"{name}_overlay.png")
    polygons = to_geojson(masks, segmenter.label_names, origin, scale, arguments.min_area)
    write_atomically(out / f"{name}.geojson", json.dumps(polygons))
    write_atomically(out / f"{name}_report.json", json.dumps(report, indent=2) + "\n")
    say(report)
    logger.info("wrote %s_{mask,overlay}.png, %s.geojson and %s_report.json into %s", name, name, name, out)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = parse()
    try:
        run(arguments)
    except (SlideError, ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {arguments.image}: {error}") from error


if __name__ == "__main__":
    main()
