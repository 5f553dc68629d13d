# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Curves of the studies: fidelity, resolution, pruning and long range; needs matplotlib (extras `train` and `dev`)."""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .fidelity import Fidelity

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield list(axes.ravel())
        figure.tight_layout()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png", dpi=120)
        os.replace(temporary, path)
    finally:
        pyplot.close(figure)
        temporary.unlink(missing_ok=True)


def finish(axis: "Axes", title: str, x_label: str, y_label: str) -> None:
    """Titles, labels, grid and, where curves have names, the legend."""
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)


def plot_fidelity(fidelities: Sequence[Fidelity], path: Path) -> None:
    """CLS and patch cosines against the image's side, and the attention inside the pattern layer by layer.

    Args:
        fidelities: any variants and sizes; those of one variant and size are averaged.
        path: PNG to write.
    """
    by_variant: dict[str, dict[int, list[Fidelity]]] = defaultdict(lambda: defaultdict(list))
    for fidelity in fidelities:
        window = "dense" if fidelity.window_size is None else f"w = {fidelity.window_size}"
        pruned = f", p = {fidelity.prune_ratio:g} after layer {fidelity.prune_after_layer}"
        by_variant[window + (pruned if fidelity.prune_ratio else "")][max(fidelity.size)].append(fidelity)
    with drawn_axes(path, 3) as (cls_axis, patch_axis, mass_axis):
        for name, by_size in by_variant.items():
            sizes = sorted(by_size)

            def mean(field: str, by_size: dict[int, list[Fidelity]] = by_size) -> list[float]:
                return [float(np.mean([getattr(one, field) for one in by_size[size]])) for size in sorted(by_size)]

            cls_axis.plot(sizes, mean("cls_cosine"), marker="o", label=name)
            (line,) = patch_axis.plot(sizes, mean("patch_cosine"), marker="o", label=name)
            patch_axis.plot(sizes, mean("patch_cosine_p5"), marker="v", linestyle=":", color=line.get_color())
            masses = np.mean([one.attention_mass for one in by_size[sizes[-1]]], axis=0)
            mass_axis.plot(np.arange(1, len(masses) + 1), masses, marker="o", label=f"{name}, {sizes[-1]} px")
        finish(cls_axis, "CLS token", "longer side, px", "cosine to dense")
        finish(patch_axis, "kept patch tokens: mean, dotted 5th percentile", "longer side, px", "cosine to dense")
        finish(mass_axis, "dense attention inside the sparse pattern", "layer", "share of the probability")
