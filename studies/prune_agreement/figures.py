# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Pictures of the agreement of prune scores with annotations: a slide beside its masks, and the curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from sparsepath_vit.runtime.figures import BACKGROUND, INK, color_overlay, heat_colors
from sparsepath_vit.slides import Slide
from sparsepath_vit.slides.forward import embed_slide
from sparsepath_vit.tasks.classification.rois import Roi, RoiDataset
from sparsepath_vit.tasks.panda.dataset import MASK_LABELS
from sparsepath_vit.tasks.panda.label_mask import LabelMask

from ..figures import drawn_axes, finish
from .agreement import KEEP_RATES, ORDERS, TARGETS

if TYPE_CHECKING:
    from sparsepath_vit.model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
    from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel

LABEL_COLORS = {
    "stroma": (153, 204, 153),
    "benign": (102, 153, 204),
    "G3": (245, 205, 80),
    "G4": (240, 140, 50),
    "G5": (200, 30, 40),
    "cancer": (200, 30, 40),
}
ORDER_COLORS = {"score": "#d64541", "inverse": "#b0763f", "random": "#8a8f98", "haematoxylin": "#4b5fb0"}


def slide_figure(
    dataset: RoiDataset,
    roi: Roi,
    model: "SparsePathViTModel",
    processor: "SparsePathViTImageProcessor",
    max_side: int = 700,
) -> Image.Image:
    """A whole slide, its annotation, its prune scores by rank, and the tokens that are kept, side by side.

    Args:
        dataset: PANDA regions.
        roi: any region of the slide; the slide is run at its resolution.
        model: bare encoder that prunes.
        processor: its image processor.
        max_side: pixels of a panel's longer side.
    """
    with Slide(dataset.root / roi.file) as slide:
        embedding = embed_slide(model, processor, slide, roi.mpp, dense=False)
        overview = Image.fromarray(slide.thumbnail(max_side))
        step = [model.config.patch_size * scale for scale in slide.scale(roi.mpp)]  # level-0 pixels of a token
        rows, columns = embedding.grid_size
        # The token grid reaches over the slide's edge where the last tokens are padded.
        covered = (columns * step[0] / slide.dimensions[0], rows * step[1] / slide.dimensions[1])
    path = dataset.root / "train_label_masks" / f"{roi.slide_id}_mask.tiff"
    names = MASK_LABELS[roi.attributes["provider"]]
    with LabelMask(path, names) as mask:
        labels = mask.coarse()
    palette = np.array([BACKGROUND, *(LABEL_COLORS[name] for name in names[1:])], dtype=np.uint8)
    annotation = Image.fromarray(palette[labels]).resize(overview.size, Image.Resampling.NEAREST)
    token_rows, token_columns = embedding.token_positions.T
    ranks = np.full((rows, columns), -1.0)
    order = embedding.prune_scores.argsort().argsort()
    ranks[token_rows, token_columns] = order / max(1, len(order) - 1)
    kept = np.zeros((rows, columns), dtype=bool)
    kept[tuple(embedding.patch_positions.T)] = True
    size = [max(1, round(share * side)) for share, side in zip(covered, overview.size, strict=True)]
    blank = Image.new("RGB", overview.size, BACKGROUND)
    white = np.full((rows, columns, 3), 255, dtype=np.uint8)
    panels = {
        roi.slide_id[:24]: overview,
        ", ".join(name for number, name in enumerate(names) if number and (labels == number).any()): annotation,
        "prune score (rank)": color_overlay(blank, heat_colors(ranks.clip(0)), ranks >= 0, (0, 0, *size)),
        f"kept: {kept.sum():,} of {len(order):,} tissue tokens": color_overlay(
            overview, white, 0.85 * ~kept, (0, 0, *size)
        ),
    }
    return _side_by_side(panels, {name: LABEL_COLORS[name] for name in names[1:]})


def _side_by_side(panels: Mapping[str, Image.Image], legend: Mapping[str, tuple[int, int, int]]) -> Image.Image:
    """Panels under their titles, and what the colours of the annotation mean."""
    gap, title = 12, 24
    width, height = next(iter(panels.values())).size
    width = max(width, 210)
    figure = Image.new("RGB", (len(panels) * (width + gap) - gap, height + 2 * title), BACKGROUND)
    draw = ImageDraw.Draw(figure)
    for number, (name, panel) in enumerate(panels.items()):
        left = number * (width + gap)
        figure.paste(panel, (left, title))
        draw.text((left, 3), name, fill=INK, font_size=13)
    left = width + gap
    for name, color in legend.items():
        draw.rectangle((left, title + height + 6, left + 12, title + height + 18), fill=color)
        draw.text((left + 16, title + height + 4), name, fill=INK, font_size=12)
        left += 30 + 7 * len(name)
    return figure


def plot_agreement(summary: Sequence[Mapping[str, Any]], path: Path) -> None:
    """AUROC by centre, and for each target the recall against the share of tissue tokens that is kept.

    Args:
        summary: of `prune_agreement.summarise_agreement`.
        path: PNG to write.
    """
    targets = [target for target in TARGETS if any(line["target"] == target for line in summary)]
    with drawn_axes(path, 1 + len(targets)) as (first, *recall_axes):
        groups = list(dict.fromkeys((line["provider"], line["target"]) for line in summary))
        for number, order in enumerate(ORDERS):
            lines = {(line["provider"], line["target"]): line for line in summary if line["order"] == order}
            positions = np.arange(len(groups)) + (number - 1.5) * 0.2
            values = [lines[group]["auroc"] for group in groups]
            first.bar(positions, values, 0.19, color=ORDER_COLORS[order], label=order)
            for position, group in zip(positions, groups, strict=True):
                if lines[group].get("auroc_low") is not None:
                    first.vlines(position, lines[group]["auroc_low"], lines[group]["auroc_high"], color="black", lw=1)
        first.axhline(0.5, color="black", linestyle=":", lw=1)
        first.set_xticks(range(len(groups)), ["\n".join(group) for group in groups], fontsize=7)
        first.set_ylim(0, 1)
        finish(first, "prune score against annotation, tissue tokens", "", "AUROC (lines: 95 % interval)")
        for axis, target in zip(recall_axes, targets, strict=True):
            for order in ORDERS:
                for line in summary:
                    if (line["provider"], line["target"], line["order"]) == ("all", target, order):
                        values = [line[f"recall_at_{rate:g}"] for rate in KEEP_RATES]
                        axis.plot(KEEP_RATES, values, marker="o", color=ORDER_COLORS[order], label=order)
            finish(axis, f"{target} tokens that are left", "share of tissue tokens kept", "recall")
