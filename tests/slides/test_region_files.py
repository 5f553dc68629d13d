# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Regions that other toolkits wrote, in the layout of their files."""

import json

import h5py
import numpy as np
import pytest
from slide_files import stained_image, write_leica, write_pyramid

from sparsepath_vit.slides import EmbedSettings, Slide, SlideError, StoreError, embed_regions, embed_slides
from sparsepath_vit.slides.region_files import read_region_file, tokens_in_outline
from sparsepath_vit.slides.regions import Box, Region

PATCH = 16
CORNERS = [[64, 96], [128, 96], [192, 160]]


def write_coordinates(path, **attributes):
    with h5py.File(path, "w") as file:
        file["coords"] = np.array(CORNERS)
        file["coords"].attrs.update(attributes)
    return path


def write_annotations(path, *polygons):
    """Each polygon is (rings, class)."""
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": rings},
            "properties": {"objectType": "annotation", "classification": {"name": name}},
        }
        for rings, name in polygons
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


TRIANGLE = [[[64, 96], [320, 96], [64, 352], [64, 96]]]
SQUARE = [[[128, 128], [192, 128], [192, 192], [128, 192], [128, 128]]]


@pytest.mark.parametrize(
    ("attributes", "size"),
    [
        ({"patch_size": 64, "patch_size_level0": 128, "level0_magnification": 40}, (128, 128)),
        ({"patch_size": 64, "patch_level": 1, "downsample": np.array([4.0, 4.0])}, (256, 256)),  # CLAM
        ({"patch_size": 64, "patch_level": 0, "custom_downsample": 2}, (128, 128)),  # older
        ({"patch_size": 64}, (64, 64)),
    ],
)  # fmt: skip
def test_coordinates_of_h5_files_have_their_size_at_level_0(tmp_path, attributes, size):
    boxes = read_region_file(write_coordinates(tmp_path / "slide.h5", **attributes))
    assert boxes == [Box(x, y, *size) for x, y in CORNERS]


@pytest.mark.parametrize(
    ("attributes", "words"),
    [({}, "neither the attribute patch_size_level0 nor patch_size"), ({"patch_size": 64, "patch_level": 2}, "level=2")],
)
def test_coordinates_without_a_size_are_refused(tmp_path, attributes, words):
    with pytest.raises(SlideError, match=words):
        read_region_file(write_coordinates(tmp_path / "slide.h5", **attributes))


def test_coordinates_of_slide2vec_need_the_description_beside_them(tmp_path):
    path = tmp_path / "slide.coordinates.npz"
    x, y = np.array(CORNERS).T
    np.savez_compressed(path, tile_index=np.arange(3), x=x, y=y, tissue_fractions=np.ones(3))
    with pytest.raises(SlideError, match=r"slide\.coordinates\.meta\.json is not beside it"):
        read_region_file(path)
    (tmp_path / "slide.coordinates.meta.json").write_text(json.dumps({"tiling": {"tile_size_lv0": 100}}))
    assert read_region_file(path) == [Box(x, y, 100, 100) for x, y in CORNERS]


def test_each_annotation_is_a_region_with_its_class(tmp_path):
    path = write_annotations(tmp_path / "a.geojson", (TRIANGLE, "Tumor"), (SQUARE, "Stroma"), (SQUARE, "Ignore*"))
    assert read_region_file(path) == [Box(64, 96, 256, 256, "Tumor"), Box(128, 128, 64, 64, "Stroma")]


def test_annotations_of_one_class(small_slide, model_folder, tmp_path):
    path = write_annotations(tmp_path / "a.geojson", (TRIANGLE, "Tumor"), (SQUARE, "Stroma"), (SQUARE, "Ignore*"))
    assert read_region_file(path, ("Stroma",)) == [Box(128, 128, 64, 64, "Stroma")]
    with pytest.raises(SlideError, match=r"class 'Necrosis'; there are: Tumor \(1\), Stroma \(1\), Ignore\* \(1\)"):
        read_region_file(path, ("Necrosis",))
    settings = EmbedSettings(mpp=0.5, annotation_classes=["Stroma"])
    options = {"device": "cpu", "tissue_mask": "all"}
    embed_slides(small_slide, model_folder, tmp_path / "out", settings, regions=path, **options)
    with h5py.File(tmp_path / "out/small.h5") as file:
        assert file["labels"].asstr()[:].tolist() == ["Stroma"] and file["coords"][:].tolist() == [[128, 128]]
    with pytest.raises(StoreError, match=r"annotation_classes: \['Stroma'\] there, \[\] now"):
        embed_slides(small_slide, model_folder, tmp_path / "out", EmbedSettings(mpp=0.5), regions=path, **options)
    with pytest.raises(ValueError, match=r"annotation_classes=\('Stroma',\) choose among the polygons of GeoJSON"):
        embed_slides(small_slide, model_folder, tmp_path / "other", settings, **options)
    mask = write_annotations(tmp_path / "mask.geojson", (TRIANGLE, "Tumor"), (SQUARE, "Stroma"))
    report = embed_slides(small_slide, model_folder, tmp_path / "mask", settings, tissue_mask=mask, device="cpu")
    assert report.tokens == 16


def test_other_files_are_refused_by_name(tmp_path):
    (tmp_path / "a.h5").write_text("text")
    (tmp_path / "a.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    for name, words in (("a.csv", "no file of regions"), ("a.h5", "cannot be read"), ("a.geojson", "no regions")):
        with pytest.raises(SlideError, match=words):
            read_region_file(tmp_path / name)


def test_tokens_of_an_outline_hold_half_of_it_and_small_ones_the_most(small_slide):
    ring = np.array([[64, 64], [128, 64], [128, 128], [64, 128]], dtype=float)
    hole = np.array([[80, 80], [112, 80], [112, 112], [80, 112]], dtype=float)
    from sparsepath_vit.slides.annotations import Polygon

    with Slide(small_slide) as slide:
        region = Region(48, 64, 96, 64, outline=Polygon((ring, hole)))
        tokens = tokens_in_outline(region, slide, PATCH, 0.5).astype(int)
        assert tokens.tolist() == [[0, 1, 1, 1, 1, 0], [0, 1, 0, 0, 1, 0], [0, 1, 0, 0, 1, 0], [0, 1, 1, 1, 1, 0]]
        small = Region(64, 64, 32, 16, outline=Polygon((np.array([[70, 66], [83, 66], [83, 74], [70, 74]], float),)))
        assert tokens_in_outline(small, slide, PATCH, 0.5).tolist() == [[True, False]]


def test_embedding_at_the_coordinates_of_others(small_slide, model_folder, model_and_processor, tmp_path):
    folder = tmp_path / "patches"
    folder.mkdir()
    write_coordinates(folder / "small_patches.h5", patch_size=64, patch_size_level0=64)
    options = {"regions": folder, "tissue_mask": "all", "device": "cpu", "batch_size": 2}
    report = embed_slides([small_slide], model_folder, tmp_path / "out", EmbedSettings(mpp=0.5), **options)
    assert (report.regions, report.failed) == (3, [])
    with h5py.File(tmp_path / "out/small.h5") as file, Slide(small_slide) as slide:
        assert file["coords"][:].tolist() == CORNERS and file["coords"].attrs["patch_size_level0"] == 64
        for feature, (x, y) in zip(file["features"], CORNERS, strict=True):
            image = slide.read_region(x, y, 64, 64, 0.5)
            (expected,) = embed_regions(*model_and_processor, [image], [np.ones((4, 4), bool)])
            assert np.allclose(feature, expected.pooled, atol=1e-5)
    assert embed_slides([small_slide], model_folder, tmp_path / "out", EmbedSettings(mpp=0.5), **options).skipped == 1


def test_an_annotation_is_pooled_over_what_lies_in_it(small_slide, model_folder, model_and_processor, tmp_path):
    path = write_annotations(tmp_path / "a.geojson", (TRIANGLE, "Tumor"), (SQUARE, "Stroma"))
    options = {"regions": path, "tissue_mask": "all", "device": "cpu"}
    report = embed_slides([small_slide], model_folder, tmp_path / "out", EmbedSettings(mpp=0.5, dense=True), **options)
    assert report.failed == []
    with h5py.File(tmp_path / "out/small.h5") as file, Slide(small_slide) as slide:
        assert file["labels"].asstr()[:].tolist() == ["Tumor", "Stroma"]
        assert file["token_counts"][:].tolist() == [16 * 15 // 2, 16]  # less than half of the diagonal's tokens
        image = slide.read_region(64, 96, 256, 256, 0.5)
        (expected,) = embed_regions(*model_and_processor, [image], [np.tri(16, k=-1, dtype=bool)[::-1].copy()])
        assert np.allclose(file["features"][0], expected.pooled, atol=1e-5)
    # Another class is a corrected label, another outline is another slide.
    write_annotations(path, (TRIANGLE, "Tumor"), (SQUARE, "Necrosis"))
    report = embed_slides([small_slide], model_folder, tmp_path / "out", EmbedSettings(mpp=0.5, dense=True), **options)
    assert (report.skipped, report.relabelled) == (1, 1)
    write_annotations(path, ([[[64, 96], [320, 96], [320, 352], [64, 96]]], "Tumor"), (SQUARE, "Necrosis"))
    report = embed_slides([small_slide], model_folder, tmp_path / "out", EmbedSettings(mpp=0.5, dense=True), **options)
    assert "was made from" in report.failed[0][1]


def test_coordinates_that_count_from_another_corner_are_refused(model_folder, tmp_path):
    image = stained_image(640, 512, [(0, 0, 640, 512)])
    path = write_leica(tmp_path / "slide.scn", image, corner=(300, 200))
    write_coordinates(tmp_path / "slide.h5", patch_size=64, patch_size_level0=64)
    options = {"regions": tmp_path / "slide.h5", "tissue_mask": "all", "device": "cpu"}
    report = embed_slides([path], model_folder, tmp_path / "out", EmbedSettings(mpp=0.5), **options)
    assert "scanned area starts at x=300, y=200: pass --origin slide" in report.failed[0][1]


def test_regions_that_no_slide_can_have_are_refused_at_once(small_slide, model_folder, tmp_path):
    other = write_pyramid(tmp_path / "other.tiff", stained_image(320, 320, [(0, 0, 320, 320)]))
    coordinates = write_coordinates(tmp_path / "small.h5", patch_size=64)
    manifest = tmp_path / "list.csv"
    manifest.write_text("slide,x,y,width,height\nsmall.tiff,0,0,64,64\n")
    for slides, regions, settings, words in (
        ([small_slide], tmp_path / "none.h5", EmbedSettings(), "does not exist"),
        ([small_slide, other], coordinates, EmbedSettings(), "one file for 2 slides"),
        ([small_slide], coordinates, EmbedSettings(whole_slide=True), "whole_slide embeds all tissue at once"),
        ([manifest], coordinates, EmbedSettings(), "the manifest gives regions, too"),
    ):
        with pytest.raises(ValueError, match=words):
            embed_slides(slides, model_folder, tmp_path / "out", settings, regions=regions, device="cpu")
    (tmp_path / "folder").mkdir()
    options = {"regions": tmp_path / "folder", "device": "cpu"}
    report = embed_slides([small_slide], model_folder, tmp_path / "out", EmbedSettings(mpp=0.5), **options)
    assert "holds no regions of small: expected small.h5, small_patches.h5" in report.failed[0][1]
