# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A trained segmentation model on regions of any size, and its masks as pictures and polygons."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import binary_erosion
from scipy.ndimage import label as connected_pieces

from ...model.segmentation_sparsepath_vit import SparsePathViTForUniversalSegmentation
from ...runtime.figures import color_overlay
from ...runtime.load_model import load_model
from ...runtime.measure import measured
from ...runtime.pixels import prepare
from ...slides.outlines import annotation, feature_collection, outlines
from .probabilities import INDEPENDENT_LABELS, THRESHOLD, all_label_probabilities
from .sliding_window import WindowGrid, sliding_probabilities

if TYPE_CHECKING:
    from ...model.image_processing_sparsepath_vit import SparsePathViTImageProcessor

# Of the labels, in this order and again from the start; 0 in a mask is background.
COLORS = ((214, 69, 65), (44, 111, 176), (233, 163, 59), (63, 145, 83), (130, 86, 160), (23, 162, 162), (196, 78, 141))
BACKGROUND_NAMES = ("background", "other")
_TINT = 0.3


class RegionSegmenter:
    """Segments regions with one model.

    Args:
        model: the segmentation model, on its device.
        processor: its image processor. The pixels are taken as they are, not resampled.
    """

    def __init__(self, model: SparsePathViTForUniversalSegmentation, processor: "SparsePathViTImageProcessor") -> None:
        self.model, self.processor = model.eval(), processor
        config = model.config
        self.label_names = tuple(config.id2label[index] for index in range(config.num_labels))
        self.independent = config.problem_type == INDEPENDENT_LABELS or config.num_labels == 1
        self.patch_size = config.backbone_config.patch_size

    @torch.inference_mode()
    def whole(self, image: np.ndarray) -> torch.Tensor:
        """The region in one piece.

        Args:
            image: (height, width, 3) uint8 RGB.

        Returns:
            (labels, height, width) float32 probabilities on the CPU.

        Raises:
            ValueError: a region smaller than one patch.
        """
        height, width = image.shape[:2]
        if min(height, width) < self.patch_size:
            raise ValueError(
                f"the region is {width} x {height} px (width x height), smaller than one patch of "
                f"{self.patch_size} px: use a larger one."
            )
        inputs = prepare(self.processor, [image])
        # The model pads to whole patches itself, as in training.
        pixels = inputs["pixel_values"][..., :height, :width].to(self.model.device, self.model.dtype)
        return all_label_probabilities(self.model(pixels), (height, width), self.independent).cpu()

    def sliding(self, image: np.ndarray, grid: WindowGrid, show_progress: bool = False) -> torch.Tensor:
        """The region window by window, probabilities averaged where windows overlap; as `whole` otherwise."""

        def predict(row: int, column: int) -> torch.Tensor:
            return self.whole(image[row : row + grid.window, column : column + grid.window])

        return sliding_probabilities(predict, grid, len(self.label_names), show_progress)

    def masks(self, probabilities: torch.Tensor) -> np.ndarray:
        """(labels, height, width) probabilities -> bool masks.

        Independent labels are where their probability is at least 0.5 and may overlap. Of exclusive ones the most
        probable is.
        """
        if self.independent:
            return (probabilities >= THRESHOLD).numpy()
        winner = probabilities.argmax(dim=0)
        return torch.stack([winner == label for label in range(len(probabilities))]).numpy()


def label_map(masks: np.ndarray, probabilities: np.ndarray, label_names: Sequence[str]) -> np.ndarray:
    """One number per pixel: 0 for none or background, else 1 + the label, of overlapping ones the most probable.

    Args:
        masks: (labels, height, width) bool.
        probabilities: (labels, height, width).
        label_names: of the labels; one called "background" or "other" is 0.

    Returns:
        (height, width) uint8.
    """
    foreground = np.array([name.lower() not in BACKGROUND_NAMES for name in label_names])
    scores = np.where(masks & foreground[:, None, None], probabilities, -1.0)
    return np.where(scores.max(axis=0) >= 0, scores.argmax(axis=0) + 1, 0).astype(np.uint8)


def mask_image(labels: np.ndarray) -> Image.Image:
    """A palette image: its pixels are the numbers of `label_map`, and shown in the labels' colours."""
    image = Image.fromarray(labels)
    palette = [(0, 0, 0), *(color_of(index) for index in range(255))]
    image.putpalette([channel for color in palette for channel in color])
    return image


def color_of(label: int) -> tuple[int, int, int]:
    """The colour of a label in pictures and polygons."""
    return COLORS[label % len(COLORS)]


def overlay(image: np.ndarray, labels: np.ndarray) -> Image.Image:
    """The region with each label tinted and outlined.

    Args:
        image: (height, width, 3) uint8 RGB.
        labels: (height, width), see `label_map`.
    """
    colors, opacity = np.zeros_like(image), np.zeros(labels.shape)
    for value in np.unique(labels[labels > 0]):
        inside = labels == value
        colors[inside] = color_of(int(value) - 1)
        opacity[inside] = np.where(binary_erosion(inside, iterations=2), _TINT, 1.0)[inside]
    return color_overlay(Image.fromarray(image), colors, opacity)


def to_geojson(
    masks: np.ndarray,
    label_names: Sequence[str],
    origin: tuple[float, float] = (0.0, 0.0),
    scale: tuple[float, float] = (1.0, 1.0),
    min_area: int = 0,
) -> dict[str, Any]:
    """Every connected piece of every label as a polygon with holes, as QuPath imports annotations.

    Args:
        masks: (labels, height, width) bool.
        label_names: of the labels; one called "background" or "other" is left out.
        origin: (x, y) of the region's top left corner in level-0 pixels.
        scale: level-0 pixels per pixel of the region along x and y.
        min_area: pixels of the region below which a piece is left out.
    """
    features = []
    for label, (name, mask) in enumerate(zip(label_names, masks, strict=True)):
        if name.lower() in BACKGROUND_NAMES:
            continue
        pieces, _ = connected_pieces(mask)  # numbered as outlines() goes through them
        for rings, area in zip(outlines(mask), np.bincount(pieces.ravel())[1:].tolist(), strict=True):
            if area < min_area:
                continue
            measurements = {"area_px": round(area * scale[0] * scale[1], 2)}
            features.append(annotation([rings], name, color_of(label), measurements, origin, scale, "Polygon"))
    return feature_collection(features)


def compare_attention(
    model_path: str, processor: "SparsePathViTImageProcessor", image: np.ndarray, windows: Sequence[int], **kwargs: Any
) -> list[dict[str, Any]]:
    """The same weights with other attention windows, each against dense attention on one region.

    Args:
        model_path: folder or Hub id of the segmentation model.
        processor: its image processor.
        image: (height, width, 3) uint8 RGB.
        windows: tokens per block side; dense is always among them.
        **kwargs: for `load_segmenter`.

    Returns:
        For each window, ascending, dense (0) last: share of pixels whose mask is that of dense attention, Dice against
        it, connected pieces of the masks, seconds, and the peak memory in bytes (on the CPU of the whole process).
    """
    maps, rows = {}, []
    for window in [*sorted({int(window) for window in windows} - {0}), 0]:
        segmenter = load_segmenter(model_path, processor, window_size=window, **kwargs)
        with measured(segmenter.model.device) as measurement:
            probabilities = segmenter.whole(image)
        maps[window] = segmenter.masks(probabilities)
        rows.append(
            {
                "window_size": window,
                "seconds": round(measurement.seconds, 2),
                "peak_bytes": measurement.peak_bytes,
                "pieces": int(sum(connected_pieces(mask)[1] for mask in maps[window])),
            }
        )
    for row in rows:
        mask, dense = maps[row["window_size"]], maps[0]
        total = mask.sum() + dense.sum()
        row["mask_agreement"] = float((mask == dense).mean())
        row["dice"] = float(2 * (mask & dense).sum() / total) if total else 1.0
    return rows


def load_segmenter(
    path: str,
    processor: "SparsePathViTImageProcessor",
    window_size: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> RegionSegmenter:
    """A segmentation model from a folder or the Hub.

    Args:
        path: folder or Hub id.
        processor: its image processor.
        window_size: tokens per block side of the attention; 0 is dense; as saved by default.
        device: where to compute.
        dtype: of the weights.

    Raises:
        ValueError: a checkpoint of another kind of model.
    """
    config = SparsePathViTForUniversalSegmentation.config_class.from_pretrained(path)
    if window_size is not None:
        config.backbone_config.window_size = window_size or None
    model, _ = load_model(path, device, dtype, model_class=SparsePathViTForUniversalSegmentation, config=config)
    return RegionSegmenter(model, processor)
