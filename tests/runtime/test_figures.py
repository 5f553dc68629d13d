# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import torch
from PIL import Image

from sparsepath_vit.runtime.figures import (
    NEIGHBOURHOOD,
    OWN_BLOCK,
    QUERY,
    block_pattern_figure,
    heat_colors,
    prune_map_figure,
    save_image,
)


def count(figure, color):
    return int((np.asarray(figure) == color).all(axis=-1).sum())


def test_the_pattern_shows_one_query_its_block_and_its_neighbours():
    figure = block_pattern_figure(grid_size=(20, 20), window_size=4, neighbor_radius=1, kept_share=1.0)
    query, cells = count(figure, QUERY) // 3, lambda color: count(figure, color)
    # Three panels: the dense one is a single block of 400, the other two have 16 + 8 * 16 tokens in sight.
    assert cells(OWN_BLOCK) == (399 + 15 + 15) * query
    assert cells(NEIGHBOURHOOD) == 2 * 8 * 16 * query


def test_the_prune_map_leaves_kept_tokens_visible_and_washes_out_the_others():
    image = Image.new("RGB", (100, 100), (120, 40, 80))
    positions = torch.tensor([[row, column] for row in range(5) for column in range(10)])  # the upper half
    figure = np.asarray(prune_map_figure(image, torch.arange(100.0), positions, (10, 10), max_side=100))
    kept_panel = figure[24:, -100:]
    assert (kept_panel[10, 50] == (120, 40, 80)).all()
    assert (kept_panel[90, 50] > 200).all()


def test_heat_grows_brighter_with_the_value():
    brightness = heat_colors(np.linspace(0, 1, 50)).sum(axis=-1).astype(int)
    assert (np.diff(brightness) >= 0).all()
    assert brightness[-1] > 2 * brightness[0]


def test_a_picture_replaces_the_old_one_as_a_whole(tmp_path):
    path = tmp_path / "figure.png"
    for color in ("red", "blue"):
        save_image(Image.new("RGB", (4, 4), color), path)
    assert Image.open(path).getpixel((0, 0)) == (0, 0, 255)
    assert [entry.name for entry in tmp_path.iterdir()] == ["figure.png"]
