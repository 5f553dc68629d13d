# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""GeoJSON as QuPath, TRIDENT and others write it."""

import json
import tracemalloc

import numpy as np
import pytest
from slide_files import write_pyramid

from sparsepath_vit.slides import Slide, SlideError, find_tissue
from sparsepath_vit.slides.annotations import read_annotations

SIDE = 448


@pytest.fixture
def slide(tmp_path):
    image = np.full((SIDE, SIDE, 3), 180, np.uint8)
    with Slide(write_pyramid(tmp_path / "slide.tiff", image, factors=(), compression=None)) as opened:
        yield opened


def rectangle(left, right, top=0, bottom=SIDE):
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def feature(*rings, classification=None, kind="Polygon", **properties):
    coordinates = list(rings) if kind == "Polygon" else [[ring] for ring in rings]
    if classification is not None:
        properties["classification"] = classification
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}


def share_of(slide, content, tmp_path, encoding="utf-8"):
    path = tmp_path / "mask.geojson"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding=encoding)
    return round(find_tissue(slide, path).share, 3)


LEFT, RIGHT = rectangle(0, SIDE / 2), rectangle(SIDE / 2, SIDE)
POINT = {"type": "Point", "coordinates": [400, 9]}
NOTHING = {"type": "Feature", "geometry": None, "properties": None}


@pytest.mark.parametrize(
    "content",
    [
        {"type": "FeatureCollection", "features": [NOTHING, feature(LEFT)]},
        [feature(LEFT), NOTHING],
        {**feature(LEFT), "properties": None},
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [LEFT]}},
        {"type": "FeatureCollection", "features": [feature(LEFT), feature()]},  # one without coordinates
        {"type": "GeometryCollection", "geometries": [POINT, feature(LEFT)["geometry"]]},
        feature(rectangle(0, SIDE / 2, 0, SIDE / 2), rectangle(0, SIDE / 2, SIDE / 2, SIDE), kind="MultiPolygon"),
        feature([[x, y, 7.5] for x, y in LEFT]),  # with a height
        feature(LEFT[:-1]),  # not closed
        feature(LEFT[::-1]),  # the other way round
        feature(LEFT, note='a "coordinates": [1, 2] in a text, and \\" beside "'),
        feature(LEFT, coordinates=["A1", "B2"]),  # a property of that name
        [feature(LEFT), {"type": "Feature", "geometry": {"type": "LineString", "coordinates": [[300, 0], [400, 400]]}}],
        feature(LEFT, tissue_id=0),  # TRIDENT
    ],
    ids=lambda content: json.dumps(content)[:40],
)  # fmt: skip
def test_every_form_marks_the_left_half(slide, content, tmp_path):
    assert share_of(slide, content, tmp_path) == 0.5
    assert share_of(slide, json.dumps(content, indent=4), tmp_path) == 0.5


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_byte_order_marks_and_wide_text(slide, tmp_path, encoding):
    assert share_of(slide, feature(LEFT, classification={"name": "Größe"}), tmp_path, encoding) == 0.5


@pytest.mark.parametrize(
    ("classification", "columns"),
    [
        ({"name": "Tumor", "color": [200, 0, 0]}, 16),
        ({"name": "Tumor: Positive", "colorRGB": -377282}, 16),
        ({"names": ["Tumor", "Positive"]}, 16),
        ("Stroma", 16),
        ({"name": None}, 16),
        ({"name": "Region*"}, 8),  # neither tissue nor taken away
        ({"names": ["Region*"]}, 8),
        ("Region*", 8),
        ({"name": "Ignore*"}, 4),  # taken away from what lies below
        ({"name": "Background"}, 4),
    ],
)
def test_classes(slide, tmp_path, classification, columns):
    """8 of 28 columns of unclassified tissue; the other polygon covers the last 4 of them and the next 8."""
    below = feature(rectangle(0, 8 * 16))
    above = feature(rectangle(4 * 16, 16 * 16), classification=classification)
    for content in ([below, above], [above, below]):
        assert share_of(slide, content, tmp_path) == round(columns / 28, 3)


def test_a_line_says_what_became_of_which_class(slide, tmp_path, warnings_said):
    features = [
        feature(LEFT, classification={"name": name}) for name in ("Tumor", "Stroma", "Ignore*", "Region*", "Tumor")
    ]
    (line,) = warnings_said(lambda: share_of(slide, [*features, NOTHING, feature(RIGHT)], tmp_path))
    assert "taken as tissue: Tumor (2), Stroma (1), without a class (1)" in line
    assert "cut out of it: Ignore* (1)" in line and "ignored, as in QuPath: Region* (1)" in line
    assert "1 geometries that are no polygons" in line
    assert not warnings_said(lambda: share_of(slide, [feature(LEFT), feature(RIGHT)], tmp_path))


@pytest.mark.parametrize(
    ("classes", "share"),
    [
        (("Tumor",), 0.25),
        (("Tumor", "Stroma"), 0.75),
        (("Region*",), 1.0),
        (("without a class",), 0.5),
        ((" Tumor ",), 0.25),
    ],
)
def test_chosen_classes_alone_are_tissue_and_what_is_cut_out_stays_so(slide, tmp_path, classes, share, warnings_said):
    quarter = rectangle(0, SIDE // 4)
    polygons = {"Tumor": LEFT, "Stroma": RIGHT, "Region*": rectangle(0, SIDE), "Ignore*": quarter, None: RIGHT}
    features = [feature(ring, classification={"name": name}) for name, ring in polygons.items()]
    path = tmp_path / "mask.geojson"
    path.write_text(json.dumps(features))
    (line,) = warnings_said(lambda: find_tissue(slide, path, classes=classes))
    assert f"taken as tissue: {classes[0].strip()} (1)" in line and "not asked for: " in line
    cut = 0.25 if classes == ("Region*",) else 0
    assert find_tissue(slide, path, classes=classes).share == share - cut
    assert find_tissue(slide, path, classes=("Ignore*",)).share == 0.25  # asked for by name, it is tissue


def test_a_class_that_no_polygon_has_is_named_with_those_there_are(slide, tmp_path):
    path = tmp_path / "mask.geojson"
    path.write_text(json.dumps([feature(LEFT, classification={"name": "Tumor"}), feature(RIGHT)]))
    message = r"mask.geojson: no polygon is of the class 'Tumour'; there are: Tumor \(1\), without a class \(1\)\."
    with pytest.raises(SlideError, match=message):
        find_tissue(slide, path, classes=("Tumor", "Tumour"))
    for mask in (None, "all", tmp_path / "mask.png"):
        with pytest.raises(SlideError, match="annotation class 'Tumor' is one of GeoJSON, and the tissue mask is"):
            find_tissue(slide, mask, classes=("Tumor",))


def test_only_ignored_classes_are_an_error_that_names_them(slide, tmp_path):
    with pytest.raises(SlideError, match=r"marks nothing: all of its polygons are of classes .*\(Region\*"):
        share_of(slide, [feature(LEFT, classification={"name": "Region*"})], tmp_path)


def test_polygons_of_another_slide_are_named(slide, tmp_path, warnings_said):
    (line,) = warnings_said(lambda: share_of(slide, feature(rectangle(100, 30_000)), tmp_path))
    assert "to x=30000, y=448" in line and "448 x 448 pixels" in line and "--origin" not in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[" * 100_000, "nested too deeply|Expecting value"),
        ("3", "has no type"),
        ('{"type": ["Polygon"], "coordinates": []}', "has no type"),
        ('{"type": "FeatureCollection", "features": {}}', "no list of features"),
        ('{"type": "Polygon"}', "are None, and no list of numbers"),
        ('{"type": "Polygon", "coordinates": [[["a", 1]]]}', "no list of numbers"),
        ('{"type": "Polygon", "coordinates": [[[NaN, 1], [1, 1], [1, 2]]]}', "no list of numbers"),
        ('{"type": "Polygon", "coordinates": [[1, 2], [3, 4], [5, 6]]}', "nested 2 deep, not 3"),
        ('{"type": "MultiPolygon", "coordinates": [[[1, 2], [3, 4], [5, 6]]]}', "nested 3 deep, not 4"),
        ('{"type": "Polygon", "coordinates": [[[1, 2], [3], [5, 6]]]}', "no list of .x, y."),
        ('{"type": "Polygon", "coordinates": [[[1], [3], [5]]]}', "no list of .x, y."),
        ('{"type": "Polygon", "coordinates": [[[1e999, 2], [3, 4], [5, 6]]]}', "no list of .x, y."),
        ('{"type": "Polygon", "coordinates": [[[1-2, 2], [3, 4], [5, 6]]]}', "no list of .x, y."),
    ],
)  # fmt: skip
def test_what_is_no_geojson_is_refused_with_the_reason(slide, tmp_path, text, words):
    with pytest.raises(SlideError, match=rf"mask.geojson is no GeoJSON of polygons \(.*(?:{words})"):
        share_of(slide, text, tmp_path)


def test_many_vertices_take_a_small_multiple_of_the_file(tmp_path):
    """As lists of Python each vertex took about 130 bytes, ten times the text."""
    count = 200_000
    vertices = np.random.default_rng(0).integers(0, 99_999, (count, 2))
    text = json.dumps(feature(vertices.tolist()))
    path = tmp_path / "large.geojson"
    path.write_text(text)
    tracemalloc.start()
    try:
        (polygon,) = read_annotations(path).polygons
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (polygon.rings[0] == vertices).all()
    assert peak < 6 * len(text)
