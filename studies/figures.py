# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Curves of the studies: fidelity, resolution, pruning and long range; needs matplotlib (extras `train` and `dev`)."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparsepath_vit.runtime.atomic_files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ENDS = ("low", "high")
SWEEP_STYLES = {
    "dense": ("#5c6370", "dense"),
    "sparse": ("#2c6fb0", "sparse"),
    "pruned": ("#d64541", "sparse, pruned"),
    "tiles": ("#e9a33b", "tiles, averaged"),
    "background_dropped": ("#3f9b6c", "sparse, white patches dropped"),
    "random_pruning": ("#8e6bbf", "sparse, pruned at random"),
    "inverse_pruning": ("#b0763f", "sparse, pruned inversely"),
}
VIEW_TITLES = {
    "field_of_view": "whole region in that many pixels",
    "pixels": "middle of the region at its own resolution",
    "resolution": "same number of pixels, less detail",
}


@contextmanager
def drawn_axes(path: Path, columns: int, rows: int = 1, height: float = 4.0) -> "Iterator[list[Axes]]":
    """Axes to draw on; the figure is then written under a temporary name and renamed.

    Args:
        path: PNG to write.
        columns: panels beside each other.
        rows: panels above each other.
        height: of a row, in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(5 * columns, height * rows), squeeze=False)
    try:
        yield list(axes.ravel())
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
    finally:
        pyplot.close(figure)


def finish(axis: "Axes", title: str, x_label: str, y_label: str) -> None:
    """Titles, labels, grid and, where curves have names, the legend."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)


def plot_fidelity(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """CLS and centred patch cosines against size, the means of images.

    Args:
        rows: of `studies.fidelity`.
        path: PNG to write.
    """
    by_variant: dict[str, dict[int, list[Mapping[str, str]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        by_variant[row["variant"]][max(int(row["height"]), int(row["width"]))].append(row)
    with drawn_axes(path, 2) as (cls_axis, patch_axis):
        for name, by_size in by_variant.items():
            sizes = sorted(by_size)
            for axis, column in ((cls_axis, "cls_cosine"), (patch_axis, "centred_patch_cosine")):
                means = [np.mean([float(row[column]) for row in by_size[size]]) for size in sizes]
                axis.plot(sizes, means, marker="o", label=name)
        finish(cls_axis, "CLS token", "longer side, px", "cosine to dense")
        finish(patch_axis, "patch tokens less the dense mean token", "longer side, px", "cosine to dense")


def plot_sweep(rows: Sequence[Mapping[str, str]], folder: Path) -> list[Path]:
    """The three figures of a resolution sweep: accuracy, memory and time, and ablations.

    Args:
        rows: of `resolution_sweep.run_sweep`.
        folder: takes accuracy.png, memory.png and ablations.png, as far as there are rows for them.

    Returns:
        The files.
    """
    sweep = [row for row in rows if row["part"] == "resolution"]
    ablations = {
        part: [row for row in rows if row["part"] == part and row["status"] == "ok"]
        for part in ("window", "prune_ratio", "prune_layer")
    }
    written = []
    if sweep:
        written += [folder / "accuracy.png", folder / "memory.png"]
        _plot_accuracy(sweep, written[0])
        _plot_memory([row for row in sweep if row["view"] == "field_of_view"], written[1])
    if any(ablations.values()):
        written.append(folder / "ablations.png")
        _plot_ablations(ablations, written[-1])
    return written


def _curves(rows: Sequence[Mapping[str, str]], column: str) -> Iterator[tuple[str, list[int], list[float]]]:
    """Variant, sizes and values, of the rows that have one."""
    for name in SWEEP_STYLES:
        points = {int(row["size"]): float(row[column]) for row in rows if row["variant"] == name and row[column]}
        if points:
            sizes = sorted(points)
            yield name, sizes, [points[size] for size in sizes]


def _plot_accuracy(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    views = [view for view in VIEW_TITLES if any(row["view"] == view for row in rows)]
    with drawn_axes(path, len(views)) as axes:
        for axis, view in zip(axes, views, strict=True):
            of_view = [row for row in rows if row["view"] == view]
            for name, sizes, values in _curves(of_view, "accuracy"):
                color, label = SWEEP_STYLES[name]
                axis.plot(sizes, values, marker="o", color=color, label=label)
                ends = [list(_curves([r for r in of_view if r["variant"] == name], f"accuracy_{end}")) for end in _ENDS]
                if all(ends) and len(ends[0][0][1]) == len(sizes):
                    axis.fill_between(sizes, ends[0][0][2], ends[1][0][2], color=color, alpha=0.08)
            num_classes = [int(row["num_classes"]) for row in of_view if row["num_classes"]]
            if num_classes:
                axis.axhline(1 / num_classes[0], color="black", linestyle=":", label="chance of equal classes")
            finish(axis, VIEW_TITLES[view], "longer side, px", "accuracy (bands: 95 % interval)")


def _plot_memory(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    with drawn_axes(path, 2) as (memory_axis, time_axis):
        for name, sizes, values in _curves(rows, "peak_growth_gib"):
            color, label = SWEEP_STYLES[name]
            memory_axis.plot(sizes, values, marker="o", color=color, label=label)
        for name, sizes, values in _curves(rows, "seconds"):
            color, label = SWEEP_STYLES[name]
            time_axis.plot(sizes, values, marker="o", color=color, label=label)
        lacking = [row for row in rows if row["status"] == "out of memory"]
        for name, sizes, values in _curves(lacking, "predicted_gib"):
            color, label = SWEEP_STYLES[name]
            memory_axis.plot(
                sizes, values, "X", markersize=11, color=color, label=f"{label}: out of memory (predicted)"
            )
        for axis, title, unit in ((memory_axis, "peak memory beside the weights", "GiB"), (time_axis, "time", "s")):
            if axis.lines:
                axis.set_yscale("log")
            finish(axis, f"{title}, one region", "longer side, px", unit)


def _plot_ablations(ablations: Mapping[str, Sequence[Mapping[str, str]]], path: Path) -> None:
    columns = {
        "window": ("window_size", "window size, tokens"),
        "prune_ratio": ("prune_ratio", "share of tokens removed"),
        "prune_layer": ("prune_after_layer", "pruned after layer"),
    }
    present = [part for part in columns if ablations[part]]
    with drawn_axes(path, len(present)) as axes:
        for axis, part in zip(axes, present, strict=True):
            column, label = columns[part]
            rows = sorted(ablations[part], key=lambda row: float(row[column]))
            positions = range(len(rows))
            values = [float(row["accuracy"]) for row in rows]
            axis.plot(positions, values, marker="o", color="#2c6fb0")
            if all(row["accuracy_low"] for row in rows):
                low, high = ([float(row[f"accuracy_{end}"]) for row in rows] for end in _ENDS)
                axis.fill_between(positions, low, high, color="#2c6fb0", alpha=0.12)
            axis.set_xticks(list(positions), [row[column] for row in rows])
            finish(axis, f"{rows[0]['size']} px", label, "accuracy (band: 95 % interval)")


def plot_long_range(rows: Sequence[Mapping[str, str]], path: Path) -> None:
    """Accuracy against the distance of two structures, with and without global tokens.

    Args:
        rows: of python -m studies.long_range, one per model, pattern, distance and seed.
        path: PNG to write.
    """
    panels = {"True": "with global tokens", "False": "without global tokens"}
    present = [key for key in panels if any(row["has_globals"] == key for row in rows)]
    with drawn_axes(path, len(present)) as axes:
        for axis, key in zip(axes, present, strict=True):
            curves: dict[str, list[Mapping[str, str]]] = {}
            for row in rows:
                if row["has_globals"] == key:
                    curves.setdefault(_trained_and_tested(row), []).append(row)
            for name, curve in curves.items():
                distances = sorted({_distance(row) for row in curve})
                of = [[row for row in curve if _distance(row) == distance] for distance in distances]
                accuracy = np.array([np.mean([float(row["accuracy"]) for row in seeds]) for seeds in of])
                strips = np.array([sum(int(row["strips"]) for row in seeds) for seeds in of])
                spread = 1.96 * np.sqrt(np.clip(accuracy * (1 - accuracy), 0, None) / strips)
                axis.errorbar(distances, accuracy, spread, marker="o", capsize=2, label=name)
            axis.axhline(0.5, color="black", linestyle=":", label="chance")
            axis.set_xscale("log", base=2)
            axis.set_ylim(0.4, 1.03)
            finish(axis, panels[key], "tokens between the structures", "accuracy (bars: 95 %, over strips)")


def _trained_and_tested(row: Mapping[str, str]) -> str:
    """The pattern of a row, and that of its training where it was another."""
    name = f"w = {row['window_size']}" if row["window_size"] else "dense"
    name += f", {row['num_context_tokens']} context tokens" if row["num_context_tokens"] != "0" else ""
    return f"{name}, trained dense" if row["window_size"] and row["trained"].startswith("dense") else name


def _distance(row: Mapping[str, str]) -> int:
    return int(row["distance"])
