# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
from PIL import Image

from studies.benchmarks import plots


def drawn_colors(path):
    return {tuple(color) for color in np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)}


def as_rgb(color):
    return tuple(bytes.fromhex(color[1:]))


def test_every_model_of_the_results_has_its_curve(tmp_path):
    pytest.importorskip("matplotlib")
    shared = {"architecture": "vit-small", "dtype": "bfloat16", "machine": "a machine", "threads": "2"}
    rows = [
        {**shared, "model": model, "size": str(size), "seconds_median": str(size * factor)}
        for model, factor in (("timm", 2.0), ("sparse", 0.5))
        for size in (224, 448)
    ]
    plots.plot_models(rows, tmp_path / "models.png")
    colors = drawn_colors(tmp_path / "models.png")
    assert as_rgb(plots.COLORS["timm"]) in colors
    assert as_rgb(plots.COLORS["sparse"]) in colors
    assert as_rgb(plots.COLORS["pruned"]) not in colors


def test_only_forward_rows_are_attention_curves(tmp_path):
    pytest.importorskip("matplotlib")
    shared = {"window_size": "8", "kept_share": "1.0", "dtype": "float32", "machine": "a machine", "threads": "2"}
    rows = [
        {**shared, "attention": name, "direction": direction, "tokens": str(tokens), "seconds_median": "0.1"}
        for name, direction in (("block_sparse", "forward"), ("flex_attention", "forward+backward"))
        for tokens in (100, 1000)
    ]
    plots.plot_attention(rows, tmp_path / "attention.png")
    colors = drawn_colors(tmp_path / "attention.png")
    assert as_rgb(plots.COLORS["block_sparse"]) in colors
    assert as_rgb(plots.COLORS["flex_attention"]) not in colors
