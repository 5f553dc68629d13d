# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Pictures of the evidence: prune maps at several ratios, and the curves of fidelity and linear probe."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from sparsepath_vit.runtime.figures import BACKGROUND, INK, color_overlay, heat_colors

from ..figures import drawn_axes, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CURVE_COLORS = {
    "dense": "#5c6370",
    "sparse": "#2c6fb0",
    "sparse + pruned": "#d64541",
    "colour histogram": "#e9a33b",
}


def prune_maps_figure(
    image: Image.Image, scores: np.ndarray, kept: Mapping[float, np.ndarray], *, panel_width: int = 360
) -> Image.Image:
    """A region, its prune scores, and what is left of it at several prune ratios, side by side.

    Args:
        image: RGB, as the processor saw it.
        scores: (rows, columns) prune scores; the colour follows the rank.
        kept: prune ratio -> (rows, columns) bool, True where a token was kept.
        panel_width: pixels of each panel.
    """
    size = (panel_width, max(1, round(image.height * panel_width / image.width)))
    tissue = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    white = np.full((*scores.shape, 3), 255, dtype=np.uint8)
    ranks = scores.ravel().argsort().argsort().reshape(scores.shape) / max(1, scores.size - 1)
    panels = {"region": tissue, "prune score (rank)": color_overlay(tissue, heat_colors(ranks), 0.6)}
    for ratio, is_kept in kept.items():
        panels[f"p = {ratio:g}: {is_kept.sum():,} of {is_kept.size:,} kept"] = color_overlay(
            tissue, white, 0.85 * ~is_kept
        )
    gap, title_height = 10, 24
    figure = Image.new("RGB", ((size[0] + gap) * len(panels) - gap, size[1] + title_height), BACKGROUND)
    draw = ImageDraw.Draw(figure)
    for number, (title, panel) in enumerate(panels.items()):
        left = number * (size[0] + gap)
        figure.paste(panel, (left, title_height))
        draw.text((left, 3), title, fill=INK, font_size=15)
    return figure


def plot_fidelity_by_window(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Cosine of sparse to dense features against the window size, one curve per image size, mean over the images.

    Args:
        rows: of tiny_fidelity.csv.
        path: PNG to write.
    """
    with drawn_axes(path, 2) as axes:
        for axis, column in zip(axes, ("cls_cosine", "patch_cosine"), strict=True):
            curves: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
            for row in rows:
                curves[int(row["size"])][int(row["window_size"])].append(float(row[column]))
            for size, points in sorted(curves.items()):
                windows = sorted(points)
                axis.plot(windows, [np.mean(points[window]) for window in windows], marker="o", label=f"{size} px")
            _log_ticks(axis, {int(row["window_size"]) for row in rows})
            finish(axis, column.replace("_", " "), "window size, tokens", "cosine to dense")


def plot_probe(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Balanced accuracy of the linear probe against the image size, with intervals; random weights are dashed.

    Args:
        rows: of tiny_probe.csv.
        path: PNG to write.
    """
    curves: dict[tuple[str, str], list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        curves[row["features"], row["variant"]].append(row)
    with drawn_axes(path, 1, height=4.5) as (axis,):
        for number, ((features, variant), points) in enumerate(curves.items()):
            points = sorted(points, key=lambda row: int(row["size"]))
            ends = [[float(row[f"balanced_accuracy{end}"]) for end in ("", "_low", "_high")] for row in points]
            value, low, high = np.array(ends).T
            axis.errorbar(
                [int(row["size"]) * 1.02 ** (number - len(curves) / 2) for row in points],  # beside each other
                value,
                yerr=np.clip([value - low, high - value], 0, None),
                marker="o",
                linestyle="--" if features == "random" else "-",
                color=CURVE_COLORS[variant or features],
                alpha=0.5 if features == "random" else 1.0,
                label=" ".join(filter(None, (features, variant))),
                capsize=2,
            )
        axis.axhline(1 / 3, color="black", linewidth=0.8, linestyle=":", label="chance")
        axis.set_ylim(0, 1)
        _log_ticks(axis, {int(row["size"]) for row in rows})
        finish(axis, "osteosarcoma regions, unseen source blocks", "side of the region, px", "balanced accuracy")


def _log_ticks(axis: "Axes", values: set[int]) -> None:
    axis.set_xscale("log")
    axis.set_xticks(sorted(values), [str(value) for value in sorted(values)])
    axis.minorticks_off()
