# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from slide_files import write_leica
from small_models import large_weights_, small_config
from typer.testing import CliRunner

from sparsepath.app import app
from sparsepath_vit import (
    SparsePathViTForUniversalSegmentation,
    SparsePathViTImageProcessor,
    SparsePathViTModel,
    SparsePathViTUniversalSegmentationConfig,
)
from sparsepath_vit.tasks.segmentation import file_segmentation
from sparsepath_vit.tasks.segmentation.probabilities import INDEPENDENT_LABELS
from sparsepath_vit.tasks.segmentation.regions import label_map, to_geojson

runner = CliRunner()
LABELS = ("first", "second")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A model with large random weights: its masks have structure, whatever they mean."""
    torch.manual_seed(0)
    config = SparsePathViTUniversalSegmentationConfig.from_vit_config(
        small_config(window_size=2, prune_ratio=0.0), head="queries", num_queries=4, num_query_layers=2,
        query_feature_dim=16, id2label=dict(enumerate(LABELS)), problem_type=INDEPENDENT_LABELS,
    )  # fmt: skip
    model = SparsePathViTForUniversalSegmentation(config)
    large_weights_(model)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    SparsePathViTImageProcessor(patch_size=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image_path(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("image") / "region.png"
    Image.fromarray(pixels).resize((70, 50), Image.Resampling.BICUBIC).save(path)
    return path


def segment(*arguments):
    """Runs `sparsepath segment`; raises what ends in one line of the terminal."""
    result = runner.invoke(app, ["segment", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


def report_of(folder):
    return json.loads((folder / "region_report.json").read_text())


def test_writes_mask_overlay_polygons_and_report(model_dir, image_path, tmp_path):
    segment(str(image_path), "--model", str(model_dir), "--out", str(tmp_path / "new"))
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == ["region.geojson", "region_mask.png", "region_overlay.png", "region_report.json"]
    report = report_of(tmp_path / "new")
    mask = np.asarray(Image.open(tmp_path / "new" / "region_mask.png"))
    assert mask.shape == (50, 70) and set(np.unique(mask)) <= {0, 1, 2} and report["size"] == [70, 50]
    assert report["labels"] == {"1": "first", "2": "second"} and "seams" not in report
    overlay = np.asarray(Image.open(tmp_path / "new" / "region_overlay.png"))
    changed = (overlay != np.asarray(Image.open(image_path))).any(axis=-1)
    assert np.array_equal(changed, mask > 0)
    polygons = json.loads((tmp_path / "new" / "region.geojson").read_text())["features"]
    area = sum(feature["properties"]["measurements"]["area_px"] for feature in polygons)
    assert area == pytest.approx(50 * 70 * sum(report["area_share"].values()))


def test_slides_with_bounds_are_segmented_where_their_viewer_shows_them(model_dir, image_path, tmp_path):
    """The same pixels as an image and as the scanned area of a slide: the same masks and polygons."""
    corner, pixels = (320, 448), np.asarray(Image.open(image_path))
    slide = write_leica(tmp_path / "scan.scn", pixels, corner)
    plain = ("--model", str(model_dir), "--out", str(tmp_path), "--region")
    segment(str(image_path), *plain, "8", "4", "40", "36")
    segment(str(slide), *plain, "8", "4", "40", "36")
    expected, found = (json.loads((tmp_path / f"{name}.geojson").read_text()) for name in ("region", "scan"))
    report = json.loads((tmp_path / "scan_report.json").read_text())
    assert found == expected and found["features"]
    assert report["origin"] == [8, 4] and report["origin_level0"] == [328, 452]
    segment(str(slide), *plain[:-1])
    assert json.loads((tmp_path / "scan_report.json").read_text())["size"] == [70, 50]  # the scanned area is all
    segment(str(slide), *plain, "328", "452", "40", "36", "--origin", "slide")
    assert (
        np.asarray(Image.open(tmp_path / "scan_mask.png")) == np.asarray(Image.open(tmp_path / "region_mask.png"))
    ).all()
    assert json.loads((tmp_path / "scan_report.json").read_text())["origin"] == [328, 452]


def test_exclusive_labels_share_the_pixels(model_dir, image_path, tmp_path):
    folder = shutil.copytree(model_dir, tmp_path / "exclusive")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "problem_type": None}))
    segment(str(image_path), "--model", str(folder), "--out", str(tmp_path))
    assert sum(report_of(tmp_path)["area_share"].values()) == pytest.approx(1)
    assert np.asarray(Image.open(tmp_path / "region_mask.png")).min() == 1


def test_windows_are_compared_with_the_whole(model_dir, image_path, tmp_path):
    arguments = [str(image_path), "--model", str(model_dir), "--out", str(tmp_path)]
    segment(*arguments, "--window-size", "24", "--stride", "16", "--seam-band", "3")
    seams = report_of(tmp_path)["seams"]
    assert (seams["num_windows"], seams["window"], seams["stride"]) == (3 * 4, 24, 16)
    assert seams["seam_band"]["pixels"] + seams["elsewhere"]["pixels"] == seams["all"]["pixels"] == 50 * 70
    assert 0 < seams["all"]["mean_absolute_difference"] < 1
    segment(*arguments, "--window-size", "50", "--stride", "20", "--no-whole")
    assert "seams" not in report_of(tmp_path)


def test_one_window_is_the_whole(model_dir, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "region.png")
    arguments = ["--model", str(model_dir), "--out", str(tmp_path), "--window-size", "24"]
    segment(str(tmp_path / "region.png"), *arguments)
    assert report_of(tmp_path)["seams"]["all"]["mean_absolute_difference"] == 0


def test_attention_windows_are_compared_with_dense(model_dir, image_path, tmp_path):
    arguments = [str(image_path), "--model", str(model_dir), "--out", str(tmp_path)]
    segment(*arguments, "--attention-window", "0", "--compare-attention", "2", "--compare-attention", "64")
    rows = report_of(tmp_path)["attention"]
    assert [row["window_size"] for row in rows] == [2, 64, 0]
    # 18 x 13 tokens: a window of 64 holds them all
    assert rows[1]["mask_agreement"] == rows[1]["dice"] == 1 > rows[0]["mask_agreement"]
    assert all(row["peak_bytes"] > 0 for row in rows)


def test_a_region_lies_where_it_was_cut_out(model_dir, image_path, tmp_path):
    arguments = [str(image_path), "--model", str(model_dir), "--out", str(tmp_path)]
    segment(*arguments, "--slide-mpp", "0.25", "--mpp", "0.5", "--region", "10", "8", "48", "40")
    report = report_of(tmp_path)
    assert report["size"] == [24, 20] and report["level0_pixels_per_pixel"] == [2, 2]
    features = json.loads((tmp_path / "region.geojson").read_text())["features"]
    corners = np.array([point for feature in features for ring in feature["geometry"]["coordinates"] for point in ring])
    assert (corners >= [10, 8]).all() and (corners <= [58, 48]).all()
    assert ((corners - [10, 8]) % 2 == 0).all()


def write_annotations(path, **rings):
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"classification": {"name": name.replace("_", "*")}},
        }
        for name, ring in rings.items()
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return str(path)


def test_what_lies_outside_of_annotations_is_background(model_dir, image_path, tmp_path):
    triangle = [(10, 5), (60, 5), (10, 45)]
    square = [(20, 12), (28, 12), (28, 20), (20, 20)]
    path = write_annotations(tmp_path / "a.geojson", Tumor=triangle, Stroma=[(0, 0), (70, 50), (0, 50)], Ignore_=square)
    flags = (str(image_path), "--model", str(model_dir), "--region", "0", "0", "70", "50")
    segment(*flags, "--out", str(tmp_path / "all"))
    segment(*flags, "--annotations", path, "--annotation-class", "Tumor", "--out", str(tmp_path / "tumor"))
    whole, found = (np.asarray(Image.open(tmp_path / name / "region_mask.png")) for name in ("all", "tumor"))
    y, x = np.mgrid[0:50, 0:70] + 0.5
    inside = (x > 10) & (y > 5) & ((x - 10) / 50 + (y - 5) / 40 < 1)
    inside &= ~((x > 20) & (x < 28) & (y > 12) & (y < 20))
    assert np.array_equal(found, np.where(inside, whole, 0)) and found.any()
    shares = report_of(tmp_path / "tumor")["area_share"]
    assert shares["first"] >= (found == 1).sum() / inside.sum()


def test_the_box_around_annotations_is_the_region(model_dir, image_path, tmp_path):
    square = [(12, 8), (52, 8), (52, 40), (12, 40)]
    path = write_annotations(tmp_path / "a.geojson", Tumor=square, Stroma=[(0, 0), (70, 0), (70, 50)])
    flags = (str(image_path), "--model", str(model_dir))
    segment(*flags, "--annotations", path, "--annotation-class", "Tumor", "--out", str(tmp_path / "box"))
    segment(*flags, "--region", "12", "8", "40", "32", "--out", str(tmp_path / "region"))
    box, region = (report_of(tmp_path / name) for name in ("box", "region"))
    assert box == region and box["size"] == [40, 32]
    for flags_of_error, message in (
        (
            ("--annotations", path, "--annotation-class", "Tumour"),
            r"no polygon is of the class 'Tumour'; there are: Tumor",
        ),
        (("--annotation-class", "Tumor"), r"annotation_classes=\('Tumor',\) choose among polygons"),
        (("--annotations", str(image_path)), r"annotations='region.png' is no GeoJSON"),
    ):
        with pytest.raises(ValueError, match=message):
            segment(*flags, *flags_of_error, "--out", str(tmp_path / "none"))
    beyond = write_annotations(tmp_path / "b.geojson", Tumor=[(500, 8), (520, 8), (520, 40)])
    with pytest.raises(ValueError, match="lie outside of the slide's 70 x 50 pixels"):
        segment(*flags, "--annotations", beyond, "--out", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("size", "flags", "message"),
    [
        ((40, 30), ["--window-size", "64"], r"thin.png: the region is 40 x 30 px .*smaller than a window of 64 px"),
        ((1, 60), [], r"thin.png: the region is 1 x 60 px .*smaller than one patch of 4 px"),
        ((40, 30), ["--stride", "8"], "give window_size, too"),
        ((40, 30), ["--window-size", "16", "--stride", "17"], "would leave gaps"),
        ((40, 30), ["--region", "20", "0", "30", "30"], "is not inside"),
        ((40, 30), ["--mpp", "0.5"], "does not state its resolution"),
    ],
)
def test_what_cannot_be_segmented_is_named(model_dir, tmp_path, size, flags, message):
    Image.new("RGB", size, "pink").save(tmp_path / "thin.png")
    with pytest.raises((ValueError, OSError), match=message):
        segment(str(tmp_path / "thin.png"), "--model", str(model_dir), "--out", str(tmp_path), *flags)


def test_too_large_regions_need_windows(model_dir, image_path, tmp_path, monkeypatch):
    arguments = [str(image_path), "--model", str(model_dir), "--out", str(tmp_path)]
    monkeypatch.setattr(file_segmentation, "MAX_WHOLE_PIXELS", 2000)
    with pytest.raises(
        (ValueError, OSError), match=r"70 x 50 px .*more than 2,000 px in one piece: pass --window-size"
    ):
        segment(*arguments)
    segment(*arguments, "--window-size", "40")
    assert "seams" not in report_of(tmp_path)
    monkeypatch.setattr(file_segmentation, "MAX_PIXELS", 3000)
    with pytest.raises((ValueError, OSError), match=r"more than 3,000 px in all: name a part with --region"):
        segment(*arguments, "--window-size", "40")


def test_another_kind_of_model_is_refused(image_path, tmp_path):
    SparsePathViTModel(small_config()).save_pretrained(tmp_path / "vit")
    with pytest.raises((ValueError, OSError), match="is a sparsepath_vit, no segmentation model"):
        segment(str(image_path), "--model", str(tmp_path / "vit"), "--out", str(tmp_path))


def test_missing_files_are_named(model_dir, tmp_path):
    with pytest.raises((ValueError, OSError), match=r"nowhere.png"):
        segment(str(tmp_path / "nowhere.png"), "--model", str(model_dir), "--out", str(tmp_path))


class TestLabelMap:
    def test_the_most_probable_of_overlapping_labels(self):
        probabilities = np.array([[[0.9, 0.6, 0.2]], [[0.7, 0.8, 0.1]]])
        assert label_map(probabilities >= 0.5, probabilities, LABELS).tolist() == [[1, 2, 0]]

    def test_background_is_zero(self):
        masks = np.array([[[True, False]], [[False, True]]])
        assert label_map(masks, masks.astype(float), ("Background", "nucleus")).tolist() == [[0, 2]]


class TestPolygons:
    def test_pieces_holes_and_small_ones(self):
        mask = np.zeros((1, 8, 10), bool)
        mask[0, 1:6, 1:6] = True
        mask[0, 3, 3] = False
        mask[0, 6, 8] = True
        features = to_geojson(mask, ["nucleus"], origin=(100, 50), scale=(2.0, 2.0))["features"]
        assert [len(feature["geometry"]["coordinates"]) for feature in features] == [2, 1]
        assert [feature["properties"]["measurements"]["area_px"] for feature in features] == [24 * 4, 4]
        assert sorted(map(tuple, features[1]["geometry"]["coordinates"][0][:-1])) == [
            (116, 62), (116, 64), (118, 62), (118, 64),
        ]  # fmt: skip
        assert len(to_geojson(mask, ["nucleus"], min_area=2)["features"]) == 1
        assert not to_geojson(mask, ["background"])["features"]
