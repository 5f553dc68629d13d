# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Curves from the recorded benchmarks; needs matplotlib (extras `train` and `dev`)."""

import csv
import math
from collections import defaultdict
from pathlib import Path

from ..figures import drawn_axes

PANELS_PER_ROW = 3
COLORS = {
    "tiles_timm": "#4f9d69",
    "tiles_transformers": "#9cc9ad",
    "timm": "#8a8f98",
    "transformers": "#b9bec7",
    "dense": "#5c6370",
    "sparse": "#2c6fb0",
    "pruned": "#d64541",
    "block_sparse": "#2c6fb0",
    "sdpa_dense": "#8a8f98",
    "flex_attention": "#e9a33b",
    "natten": "#4f9d69",
    "reference": "#b9bec7",
}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a results CSV.

    Args:
        path: what `scripts/benchmark.py` wrote.
    """
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def plot_models(rows: list[dict[str, str]], path: Path) -> None:
    """Seconds of a forward pass against the image's side, one panel per architecture and machine.

    Args:
        rows: of benchmark_model.csv.
        path: PNG to write.
    """
    panels = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        panel = f"{row['architecture']}, {row['dtype']}\n{row['machine']}, {row['threads']} threads"
        # A later row of the same size replaces an earlier one.
        panels[panel][row["model"]][int(row["size"])] = float(row["seconds_median"])
    _plot_panels(panels, path, x_label="side of the image, px", y_label="seconds per forward")


def plot_attention(rows: list[dict[str, str]], path: Path) -> None:
    """Milliseconds of an attention forward against the number of tokens, one panel per pattern and machine.

    Args:
        rows: of benchmark_attention.csv.
        path: PNG to write.
    """
    panels = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["direction"] != "forward":
            continue
        kept = f"{float(row['kept_share']):.0%} kept"
        panel = f"w = {row['window_size']}, {kept}, {row['dtype']}\n{row['machine']}, {row['threads']} threads"
        panels[panel][row["attention"]][int(row["tokens"])] = 1000 * float(row["seconds_median"])
    _plot_panels(panels, path, x_label="tokens", y_label="milliseconds per forward")


def _plot_panels(panels: dict[str, dict[str, dict[int, float]]], path: Path, x_label: str, y_label: str) -> None:
    """Log-log curves: panel title -> name of the curve -> {x: y}."""
    columns = min(len(panels), PANELS_PER_ROW)
    with drawn_axes(path, columns, math.ceil(len(panels) / columns)) as axes:
        for axis in axes[len(panels) :]:
            axis.set_visible(False)
        for axis, (title, curves) in zip(axes, panels.items(), strict=False):
            for name, points in curves.items():
                x_values = sorted(points)
                axis.plot(x_values, [points[x] for x in x_values], marker="o", label=name, color=COLORS.get(name))
            axis.set(title=title, xlabel=x_label, ylabel=y_label, xscale="log", yscale="log")
            measured = sorted({x for points in curves.values() for x in points})
            axis.set_xticks(measured, [f"{x:,}" for x in measured], minor=False)
            axis.set_xticks([], minor=True)
            axis.title.set_fontsize(9)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
