# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import torch
from PIL import Image

from sparsepath_vit.runtime.figures import (
    NEIGHBOURHOOD,
    OWN_BLOCK,
    QUERY,
    block_pattern_figure,
    color_overlay,
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


class TestColorOverlay:
    def test_opacity_of_each_cell_mixes_colour_and_image(self):
        image = Image.new("RGB", (4, 2), (100, 100, 100))
        colors = np.full((1, 2, 3), (200, 0, 0), dtype=np.uint8)
        drawn = np.asarray(color_overlay(image, colors, np.array([[0.0, 0.5]])))
        assert (drawn[:, :2] == 100).all()
        assert np.abs(drawn[:, 2:].astype(int) - [150, 50, 50]).max() <= 1

    def test_a_box_places_the_colours_and_the_image_cuts_them_off(self):
        image = Image.new("RGB", (4, 4), (255, 255, 255))
        drawn = np.asarray(color_overlay(image, np.zeros((1, 1, 3), np.uint8), 1.0, (2, 1, 9, 2)))
        covered = np.zeros((4, 4), dtype=bool)
        covered[1:3, 2:] = True
        assert ((drawn == 0).all(axis=-1) == covered).all() and ((drawn == 255).all(axis=-1) == ~covered).all()
