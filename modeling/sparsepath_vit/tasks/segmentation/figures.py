# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Pictures of examples: image, true mask and predicted mask side by side."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ...runtime.figures import INK
from .data import SegmentationImages
from .metrics import dice_of, overlap_counts
from .regions import RegionSegmenter, overlay

_PANEL, _MARGIN, _TITLE = 320, 8, 22


def evenly_spaced(dataset: SegmentationImages, count: int) -> list[int]:
    """Numbers of up to `count` examples that are spread over the data set."""
    return sorted({int(number) for number in np.linspace(0, len(dataset) - 1, min(count, len(dataset)))})


def example_figure(segmenter: RegionSegmenter, dataset: SegmentationImages, numbers: Sequence[int]) -> Image.Image:
    """One row per example; only the label that the image is annotated for is shown.

    Args:
        segmenter: the trained model.
        dataset: where the examples are from.
        numbers: which examples.
    """
    width, height = 3 * (_PANEL + _MARGIN) + _MARGIN, _PANEL + _TITLE + _MARGIN
    figure = Image.new("RGB", (width, len(numbers) * height), "white")
    draw = ImageDraw.Draw(figure)
    for row, number in enumerate(numbers):
        example = dataset[number]
        image, truth = example["image"].permute(1, 2, 0).numpy(), example["mask"].numpy().astype(bool)
        found = segmenter.masks(segmenter.whole(image))[example["label"]]
        dice = float(dice_of(overlap_counts(found, truth)))
        label = segmenter.label_names[example["label"]]
        panels = (
            (dataset.pair_of(number).name, np.zeros_like(truth)),
            (f"{label}, annotated", truth),
            (f"{label}, predicted: Dice {dice:.2f}", found),
        )
        for column, (title, mask) in enumerate(panels):
            left, top = _MARGIN + column * (_PANEL + _MARGIN), row * height
            draw.text((left, top + 3), title, fill=INK, font_size=14)
            panel = overlay(image, mask * np.uint8(example["label"] + 1))
            scale = _PANEL / max(panel.size)
            size = tuple(max(1, round(side * scale)) for side in panel.size)
            figure.paste(panel.resize(size, Image.Resampling.BICUBIC), (left, top + _TITLE))
    return figure
