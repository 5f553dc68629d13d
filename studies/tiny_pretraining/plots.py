# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The loss curve of a training run; needs matplotlib (extras `train` and `dev`)."""

import json
from pathlib import Path

import numpy as np

from ..figures import drawn_axes, finish

SMOOTHING_STEPS = 25


def plot_losses(log: Path, path: Path) -> None:
    """Draws every loss of a run over its steps, as a running mean.

    Args:
        log: one JSON object a line, with "step" and numbers to draw.
        path: PNG to write.

    Raises:
        ValueError: the log holds no step.
    """
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    if not entries:
        raise ValueError(f"{log} holds no step: there is nothing to draw.")
    steps = np.array([entry["step"] for entry in entries])
    width = min(SMOOTHING_STEPS, len(steps))
    names = [name for name in entries[0] if name != "step"]
    with drawn_axes(path, len(names), height=3.0) as axes:
        for axis, name in zip(axes, names, strict=True):
            values = np.convolve([entry[name] for entry in entries], np.full(width, 1 / width), mode="valid")
            axis.plot(steps[width - 1 :], values, color="#2c6fb0", linewidth=1.2)
            finish(axis, name, "step", f"mean of {width} steps")
