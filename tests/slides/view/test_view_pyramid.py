# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import io

import numpy as np
import pytest
import tifffile
from PIL import Image
from slide_files import write_leica, write_pyramid

from sparsepath_vit.slides import Slide
from sparsepath_vit.slides.view.pyramid import TILE_SIZE, TilePyramid


def decoded(tile):
    return np.asarray(Image.open(io.BytesIO(tile))).astype(int)


def smooth_image(width, height):
    """Colours that say where they are, so that a shifted tile is far off."""
    x, y = np.meshgrid(np.linspace(0, 8, width), np.linspace(0, 6, height))
    waves = [np.sin(x * np.pi) * 90, np.cos(y * np.pi) * 90, np.sin((x + y) * 2) * 90]
    return (np.stack(waves, -1) + 128).astype(np.uint8)


@pytest.fixture
def large_slide(tmp_path):
    return Slide(write_pyramid(tmp_path / "large.tiff", smooth_image(3000, 2200), factors=(4,), tile=256))


@pytest.mark.parametrize("zoom", range(4))
def test_tiles_hold_the_slide_at_their_place(large_slide, zoom):
    pyramid = TilePyramid(large_slide)
    assert pyramid.native_zoom == 3 and pyramid.side == 4096
    scale = 2 ** (3 - zoom)
    pixels = large_slide.read_region(0, 0, 4096 // scale, 4096 // scale, mpp=0.5 * scale, pad=True).astype(int)
    for row in range(1 << zoom):
        for column in range(1 << zoom):
            tile = decoded(pyramid.tile(zoom, column, row))
            expected = pixels[row * TILE_SIZE : (row + 1) * TILE_SIZE, column * TILE_SIZE : (column + 1) * TILE_SIZE]
            # Away from the slide's edge, where averaged pixels mix with the white beyond it.
            inside = (expected < 250).any(-1)
            assert tile.shape == expected.shape
            assert np.abs(tile - expected)[inside].mean() < 2.5 if inside.any() else tile.min() > 250


def test_beyond_level_0_pixels_are_enlarged(large_slide):
    tile = decoded(TilePyramid(large_slide).tile(5, 6, 5))
    expected = large_slide.read_region(6 * 128, 5 * 128, 128, 128).astype(int)
    assert np.abs(tile[2::4, 2::4] - expected).mean() < 3


def test_there_are_no_other_tiles(large_slide):
    pyramid = TilePyramid(large_slide)
    for place in ((8, 0, 0), (-1, 0, 0), (2, 4, 0), (2, 0, 4), (2, -1, 0)):
        with pytest.raises(IndexError):
            pyramid.tile(*place)


def test_tiles_are_kept_and_forgotten(large_slide, monkeypatch):
    monkeypatch.setattr("sparsepath_vit.slides.view.pyramid._CACHED_TILES", 2)
    pyramid = TilePyramid(large_slide)
    first = pyramid.tile(3, 0, 0)
    monkeypatch.setattr(pyramid, "_pixels", lambda *place: pytest.fail("read again"))
    assert pyramid.tile(3, 0, 0) is first
    monkeypatch.undo()
    monkeypatch.setattr("sparsepath_vit.slides.view.pyramid._CACHED_TILES", 2)
    pyramid.tile(3, 1, 0)
    pyramid.tile(3, 0, 1)
    assert pyramid.tile(3, 0, 0) is not first


def test_tiles_begin_at_the_scanned_area(tmp_path):
    slide = Slide(write_leica(tmp_path / "scan.scn", smooth_image(640, 512), (300, 200)))
    pyramid = TilePyramid(slide)
    assert pyramid.native_zoom == 1
    tile = decoded(pyramid.tile(1, 0, 0))
    assert np.abs(tile - slide.read_region(300, 200, 512, 512).astype(int)).mean() < 3


def test_oblong_pixels_are_shown_square(tmp_path):
    path, image = tmp_path / "oblong.tiff", smooth_image(640, 512)
    options = {"tile": (64, 64), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, image, resolution=(1e4 / 0.25, 1e4 / 0.5), **options)
    pyramid = TilePyramid(Slide(path), y_per_x=0.5)
    assert pyramid.native_zoom == 1  # 512 rows are as high as 1,024 columns are wide
    tile = decoded(pyramid.tile(1, 0, 1))
    expected = Slide(path).read_scaled((0, 256), (512, 512), (1.0, 0.5)).astype(int)
    assert np.abs(tile - expected).mean() < 2.5
