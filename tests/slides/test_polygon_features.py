# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import csv

import h5py
import numpy as np
import pytest

from sparsepath_vit.slides import EmbeddedSlide, SlideError
from sparsepath_vit.slides.polygon_features import features_table, pool_polygon

PATCH = 16


def test_a_rectangle_is_pooled_and_measured(embedded):
    slide = EmbeddedSlide(embedded[1])
    left, top, right, bottom = 130, 140, 330, 230
    polygon = pool_polygon(slide, [(left, top), (right, top), (right, bottom), (left, bottom)])
    with h5py.File(embedded[1]) as file:
        features, corners, tissue = (file[name][:] for name in ("patch_features", "patch_coords", "token_coords"))

    def is_inside(points):
        return ((points + PATCH / 2 > (left, top)) & (points + PATCH / 2 < (right, bottom))).all(axis=1)

    inside = is_inside(corners)
    assert 10 < inside.sum() == polygon.num_kept
    assert np.allclose(polygon.pooled, features[inside].astype(float).mean(axis=0), atol=1e-5)
    places = len(np.unique(tissue[is_inside(tissue)], axis=0))
    assert len(tissue[is_inside(tissue)]) > places  # regions overlap there
    assert polygon.tissue_area == pytest.approx(places * (PATCH * 0.5) ** 2 * 1e-6)
    assert polygon.area == pytest.approx(200 * 90 * 0.25e-6)


def test_tokens_count_for_as_many_as_they_stand_for(embedded, tmp_path):
    path = tmp_path / "weights.h5"
    path.write_bytes(embedded[1].read_bytes())
    with h5py.File(path, "a") as file:
        features = file["patch_features"][:].astype(float)
        weights = np.random.default_rng(0).integers(1, 9, len(features)).astype(np.int32)
        file["patch_weights"] = weights
    polygon = pool_polygon(EmbeddedSlide(path), [(0, 0), (640, 0), (640, 512), (0, 512)])
    assert polygon.num_kept == len(features)
    assert np.allclose(polygon.pooled, weights @ features / weights.sum(), atol=1e-4)


def test_the_annotation_counts_from_the_frame_and_is_closed(embedded):
    polygon = pool_polygon(EmbeddedSlide(embedded[1]), [(130, 140), (260, 140), (260, 230)])
    feature = polygon.annotation("gland", zero=(100, 40))
    assert feature["geometry"] == {
        "type": "Polygon",
        "coordinates": [[[30.0, 100.0], [160.0, 100.0], [160.0, 190.0], [30.0, 100.0]]],
    }
    assert feature["properties"]["classification"]["name"] == "gland"
    assert feature["properties"]["measurements"]["kept tokens"] == polygon.num_kept


def test_the_table_holds_a_row_for_each_polygon(embedded):
    slide = EmbeddedSlide(embedded[1])
    rings = ([(130, 140), (260, 140), (260, 230)], [(100, 120), (300, 120), (300, 260)])
    polygons = [pool_polygon(slide, ring) for ring in rings]
    header, *rows = csv.reader(features_table(polygons).splitlines())
    assert header[:4] == ["polygon", "tissue_area_mm2", "area_mm2", "kept_tokens"]
    assert len(header) == 4 + slide.features.shape[1] and [row[0] for row in rows] == ["1", "2"]
    for row, polygon in zip(rows, polygons, strict=True):
        assert np.allclose(np.array(row[4:], dtype=float), polygon.pooled, rtol=1e-5)
    assert features_table([]).count("\n") == 1


def test_what_is_no_polygon_of_tissue_is_refused(embedded):
    slide = EmbeddedSlide(embedded[1])
    for ring, message in (
        ([(0, 0), (10, 10)], "at least three points"),
        ([(0, 0), (10, np.nan), (3, 4)], "at least three points"),
        ([(600, 480), (630, 480), (630, 500)], "no kept token"),
        ([(-900, -900), (-800, -900), (-800, -800)], "no kept token"),
    ):
        with pytest.raises(SlideError, match=message):
            pool_polygon(slide, ring)
