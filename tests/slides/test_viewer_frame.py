# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Slides that state their scanned area: QuPath counts from it, and so does everything that users give and get.

The same pixels as a plain TIFF, whose corner is the scanned area's, say what is right.
"""

import csv
import json
import pickle

import h5py
import numpy as np
import pytest
from PIL import Image
from slide_files import stained_image, write_leica, write_pyramid

from sparsepath_vit.slides import EmbedSettings, Slide, SlideError, embed_slides, find_tissue
from sparsepath_vit.slides.heatmap import overlay, write_heatmap
from sparsepath_vit.slides.token_values import read_token_values

CORNER, SIZE, LEVEL_0 = (320, 448), (640, 512), (1500, 1400)
TISSUE = (64, 96, 384, 256)


@pytest.fixture
def scan(tmp_path):
    """The slide, and its scanned area as a plain TIFF."""
    image = stained_image(*SIZE, [TISSUE])
    plain = write_pyramid(tmp_path / "plain.tiff", image, factors=(), compression=None)
    return write_leica(tmp_path / "scan.scn", image, CORNER, LEVEL_0), plain


def write_square(path, x, y, width, height):
    ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    return path


def box_of(tissue):
    """(left, top, right, bottom) of a tissue mask in level-0 pixels."""
    rows, columns = np.nonzero(tissue.mask)
    x, y = tissue.scale
    return np.array([columns.min() * x, rows.min() * y, (columns.max() + 1) * x, (rows.max() + 1) * y])


def test_the_file_is_what_these_tests_take_it_for(scan):
    with Slide(scan[0]) as slide, Slide(scan[1]) as plain:
        assert slide.dimensions == LEVEL_0 and slide.mpp == plain.mpp
        assert (slide.read_region(*CORNER, *SIZE) == plain.read_region(0, 0, *SIZE)).all()
        assert slide.description.bounds == (*CORNER, *SIZE)


def test_the_frame_is_the_scanned_area_or_level_0_and_a_line_says_so_once(scan, warnings_said):
    with Slide(scan[0]) as slide:
        (line,) = warnings_said(lambda: (slide.frame, slide.frame, pickle.loads(pickle.dumps(slide)).frame))
        assert "x=320, y=448" in line and "as in QuPath; --origin slide" in line
        assert slide.frame == (*CORNER, *SIZE)
    with Slide(scan[0], origin="slide") as slide:
        (line,) = warnings_said(lambda: pickle.loads(pickle.dumps(slide)).frame)
        assert "QuPath shows them shifted" in line and slide.frame == (0, 0, *LEVEL_0)
    with Slide(scan[1]) as plain:
        assert not warnings_said(lambda: plain.frame) and plain.frame == (0, 0, *SIZE)
    with pytest.raises(SlideError, match="origin='qupath' is unknown: 'bounds' counts"):
        Slide(scan[1], origin="qupath")


@pytest.mark.parametrize("bounds", [(-3, 0, 100, 100), (10, 10, 0, 5), (1500, 0, 10, 10)])
def test_a_scanned_area_that_cannot_be_is_not_used_and_named(scan, bounds, monkeypatch, warnings_said):
    from dataclasses import replace

    from sparsepath_vit.slides import viewer_frame

    described = replace(viewer_frame.describe(scan[0]), bounds=bounds)
    monkeypatch.setattr(viewer_frame, "describe", lambda path: described)
    with Slide(scan[0]) as slide:
        (line,) = warnings_said(lambda: slide.frame)
        assert "is no part of its 1500 x 1400 pixels" in line and slide.frame == (0, 0, *LEVEL_0)


def test_annotations_count_from_the_frame(scan, tmp_path, warnings_said):
    path = write_square(tmp_path / "tissue.geojson", *TISSUE)
    expected = np.array([TISSUE[0], TISSUE[1], TISSUE[0] + TISSUE[2], TISSUE[1] + TISSUE[3]])
    with Slide(scan[0]) as slide:
        tissue = find_tissue(slide, path)
        assert np.abs(box_of(tissue) - expected - 2 * CORNER).max() <= tissue.scale[0]
    with Slide(scan[0], origin="slide") as slide:
        assert np.abs(box_of(find_tissue(slide, path)) - expected).max() <= tissue.scale[0]
    beyond = write_square(tmp_path / "beyond.geojson", TISSUE[0] + CORNER[0], TISSUE[1] + CORNER[1], *TISSUE[2:])
    with Slide(scan[0]) as slide:
        assert any("pass --origin slide" in line for line in warnings_said(lambda: find_tissue(slide, beyond)))
        assert not any("What lies beyond" in line for line in warnings_said(lambda: find_tissue(slide, path)))


@pytest.mark.parametrize("pixel", [4, 16, 32])
def test_mask_images_cover_the_frame(scan, tmp_path, pixel):
    mask = np.zeros((SIZE[1] // pixel, SIZE[0] // pixel), np.uint8)
    mask[
        TISSUE[1] // pixel : (TISSUE[1] + TISSUE[3]) // pixel, TISSUE[0] // pixel : (TISSUE[0] + TISSUE[2]) // pixel
    ] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    with Slide(scan[0]) as slide, Slide(scan[1]) as plain:
        tissue, expected = (find_tissue(opened, tmp_path / "mask.png") for opened in (slide, plain))
        assert np.abs(box_of(tissue) - box_of(expected) - 2 * CORNER).max() <= 1
        assert (tissue.token_grid(slide, 16, 0.5, *CORNER, *SIZE) == expected.token_grid(plain, 16, 0.5)).all()


def test_a_mask_image_of_all_of_level_0_is_refused_by_name_and_taken_on_request(scan, tmp_path):
    Image.fromarray(np.ones((140, 150), np.uint8)).save(tmp_path / "mask.png")
    with (
        Slide(scan[0]) as slide,
        pytest.raises(SlideError, match=r"not of its scanned area \(640 x 512.*--origin slide"),
    ):
        find_tissue(slide, tmp_path / "mask.png")
    with Slide(scan[0], origin="slide") as slide:
        assert find_tissue(slide, tmp_path / "mask.png").share == 1


def embed(path, box, model_folder, out, origin="bounds"):
    manifest = out.parent / f"{out.name}.csv"
    with open(manifest, "w", newline="") as file:
        csv.writer(file).writerows([("slide", "x", "y", "width", "height"), (path, *box)])
    settings = EmbedSettings(dense=True, origin=origin)
    report = embed_slides([manifest], model_folder, out, settings, tissue_mask="all", device="cpu", workers=1)
    assert not report.failed
    return out / f"{path.stem}.h5"


def test_manifests_stored_coordinates_and_heatmaps_count_from_the_frame(scan, model_folder, tmp_path):
    """Two files of the same pixels: the same rows in, the same coordinates and polygons out."""
    box = (64, 96, 160, 128)
    slide, plain = (embed(path, box, model_folder, tmp_path / path.stem) for path in scan)
    moved_box = (box[0] + CORNER[0], box[1] + CORNER[1], *box[2:])
    moved = embed(scan[0], moved_box, model_folder, tmp_path / "moved", "slide")
    with h5py.File(slide) as own, h5py.File(plain) as expected, h5py.File(moved) as level_0:
        assert (own["features"][:] == expected["features"][:]).all()
        assert (own["features"][:] == level_0["features"][:]).all()
        for name in ("coords", "patch_coords", "token_coords"):
            assert (own[name][:] == expected[name][:]).all()
            assert (level_0[name][:] == own[name][:] + CORNER).all()
        assert own["coords"].attrs["origin_level0"].tolist() == list(CORNER)
        assert not any("origin_level0" in file["coords"].attrs for file in (expected, level_0))
    polygons = []
    for path, file in ((scan[0], slide), (scan[1], plain), (scan[0], moved)):
        written = write_heatmap(Slide(path), read_token_values(file), tmp_path / "maps" / file.parent.name)
        polygons.append(json.loads(written[1].read_text()))
    assert polygons[0] == polygons[1] == polygons[2]
    counted = write_heatmap(Slide(scan[0], origin="slide"), read_token_values(slide), tmp_path / "maps" / "level 0")
    first, shifted = (
        content["features"][0]["geometry"]["coordinates"][0][0]
        for content in (polygons[0], json.loads(counted[1].read_text()))
    )
    assert (np.array(shifted) == np.array(first) + CORNER).all()


def test_the_picture_of_a_heatmap_colours_the_scanned_area(scan, model_folder, tmp_path):
    file = embed(scan[0], (64, 96, 160, 128), model_folder, tmp_path / "out")
    slide = Slide(scan[0])
    plain, figure = slide.thumbnail(1500), np.asarray(overlay(slide, read_token_values(file), 1500, 1.0))[24:]
    rows, columns = np.nonzero((plain != figure).any(-1))
    assert (columns.min(), rows.min()) == (64 + CORNER[0], 96 + CORNER[1])
    assert (columns.max(), rows.max()) == (64 + 160 + CORNER[0] - 1, 96 + 128 + CORNER[1] - 1)
