# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json

import h5py
import numpy as np
import pytest
import torch
from slide_files import stained_image, write_pyramid

from sparsepath_vit.slides import EmbedSettings, StoreError, Tiles, embed_slides, pool_tiles
from sparsepath_vit.slides.store import EmbeddingStore

PATCH = 16


def by_definition(features, positions, weights, present, side, minimum_tissue):
    """(row, column) -> (mean, share), tile by tile and token by token."""
    tiles = {}
    for row in range(0, present.shape[0], side):
        for column in range(0, present.shape[1], side):
            inside = [
                index for index, (r, c) in enumerate(positions)
                if row <= r < row + side and column <= c < column + side
            ]  # fmt: skip
            share = present[row : row + side, column : column + side].sum() / side**2
            if inside and share >= minimum_tissue:
                mean = sum(weights[index] * features[index] for index in inside) / sum(weights[inside])
                tiles[row, column] = mean, share
    return tiles


@pytest.mark.parametrize("minimum_tissue", [0.0, 0.5])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "columns", "side"), [(12, 12, 4), (7, 11, 3), (2, 9, 5), (5, 5, 1)])
def test_tiles_are_weighted_means_of_their_tokens(rows, columns, side, weighted, minimum_tissue, monkeypatch):
    monkeypatch.setattr("sparsepath_vit.slides.tiles._TOKENS_AT_ONCE", 7)
    generator = np.random.default_rng(rows * columns)
    present = generator.random((rows, columns)) < 0.6
    kept = present & (generator.random((rows, columns)) < 0.7)
    kept[:side, :side] = False  # a tile that was pruned away
    positions = np.argwhere(kept)
    features = generator.standard_normal((len(positions), 6)) * 10
    weights = generator.integers(1, 9, len(positions)) if weighted else np.ones(len(positions), dtype=int)
    expected = by_definition(features, positions, weights, present, side, minimum_tissue)
    tiles = pool_tiles(
        torch.from_numpy(features).float(),
        torch.from_numpy(positions),
        torch.from_numpy(weights) if weighted else None,
        torch.from_numpy(present),
        Tiles(side, minimum_tissue),
    )
    assert list(map(tuple, tiles.positions.tolist())) == list(expected)
    for feature, share, (mean, expected_share) in zip(tiles.features, tiles.tissue, expected.values(), strict=True):
        assert np.allclose(feature, mean, atol=1e-5) and share == pytest.approx(expected_share)
    with_tissue = sum(
        present[row : row + side, column : column + side].any()
        for row in range(0, rows, side)
        for column in range(0, columns, side)
    )
    assert tiles.left_out == with_tissue - len(expected) >= 0 and tiles.features.dtype == np.float32


def embed(slide, model_folder, out, **settings):
    return embed_slides([slide], model_folder, out, EmbedSettings(tile_size=64, **settings), device="cpu", workers=2)


@pytest.mark.parametrize("whole_slide", [False, True])
def test_a_row_of_the_file_is_a_tile_in_its_context(small_slide, model_folder, tmp_path, whole_slide):
    settings = {"region_size": 250, "dense": True, "whole_slide": whole_slide, "minimum_tissue": 0.25}
    report = embed(small_slide, model_folder, tmp_path / "out", **settings)
    assert report.failed == [] and f"{report.tiles} tiles ({report.tiles_left_out} left out)" in str(report)
    with h5py.File(tmp_path / "out/small.h5") as file:
        features, coords, counts = file["features"][:], file["coords"][:], file["tile_counts"][:]
        assert len(features) == len(coords) == len(file["tile_tissue"]) == counts.sum() == report.tiles > 10
        assert len(file["region_features"]) == len(file["region_sizes"]) == len(counts)
        assert file["coords"].attrs["patch_size"] == file["coords"].attrs["patch_size_level0"] == 64
        assert file["coords"].attrs["minimum_tissue"] == 0.25 <= file["tile_tissue"][:].min()
        # Every tile is the mean of the tokens that lie in it. Regions of 250 pixels became 256: whole tiles.
        assert (coords % 64 == 0).all()
        tokens, token_coords = file["patch_features"][:].astype(float), file["patch_coords"][:]
        for feature, corner in zip(features, coords, strict=True):
            inside = ((token_coords >= corner) & (token_coords < corner + 64)).all(axis=1)
            assert np.allclose(feature, tokens[inside].mean(axis=0), atol=5e-3)


def test_tiles_of_one_region_that_holds_all_are_those_of_the_whole_slide(small_slide, model_folder, tmp_path):
    embed(small_slide, model_folder, tmp_path / "region", region_size=640)
    embed(small_slide, model_folder, tmp_path / "slide", whole_slide=True)
    with h5py.File(tmp_path / "region/small.h5") as one, h5py.File(tmp_path / "slide/small.h5") as other:
        assert (one["coords"][:] == other["coords"][:]).all()
        assert np.allclose(one["features"][:], other["features"][:], atol=1e-5)


def test_tiles_count_in_level_0_pixels_at_another_resolution(small_slide, model_folder, tmp_path):
    embed(small_slide, model_folder, tmp_path / "out", mpp=1.0, region_size=128)
    with h5py.File(tmp_path / "out/small.h5") as file:
        attributes = dict(file["coords"].attrs)
        assert (attributes["patch_size"], attributes["patch_size_level0"]) == (64, 128)
        assert (attributes["level0_magnification"], attributes["target_magnification"]) == (20, 10)
        assert (file["coords"][:] % 128 == 0).all()


def test_labels_of_regions_stay_with_regions(model_folder, tmp_path):
    write_pyramid(tmp_path / "slide.tiff", stained_image(640, 512, [(0, 0, 640, 512)]))
    manifest = tmp_path / "list.csv"
    manifest.write_text("slide,x,y,width,height,label\nslide.tiff,0,0,256,256,a\nslide.tiff,256,0,128,128,b\n")
    embed(manifest, model_folder, tmp_path / "out")
    with h5py.File(tmp_path / "out/slide.h5") as file:
        assert file["labels"].asstr()[:].tolist() == ["a", "b"] and file["tile_counts"][:].tolist() == [16, 4]
        assert file["region_coords"][:].tolist() == [[0, 0], [256, 0]]
    manifest.write_text(manifest.read_text().replace(",b", ",c"))
    assert embed(manifest, model_folder, tmp_path / "out").relabelled == 1


def test_impossible_tiles_are_refused_before_anything_is_written(small_slide, model_folder, tmp_path):
    with pytest.raises(ValueError, match=r"tile_size=50 is no multiple of the model's patch_size=16: take 48 or 64"):
        embed_slides([small_slide], model_folder, tmp_path / "out", EmbedSettings(tile_size=50), device="cpu")
    with pytest.raises(ValueError, match="overlap=0"):
        embed(small_slide, model_folder, tmp_path / "out", overlap=16)
    assert not (tmp_path / "out").exists()


def test_a_slide_without_tiles_fails_by_name(model_folder, tmp_path):
    write_pyramid(tmp_path / "slide.tiff", stained_image(640, 512, [(0, 0, 80, 512)]))
    report = embed(
        tmp_path / "slide.tiff", model_folder, tmp_path / "out", mpp=0.5, minimum_tissue=1.0, whole_slide=True
    )
    assert report.done == 1  # tiles of the first column
    other = EmbedSettings(tile_size=320, mpp=0.5, minimum_tissue=1.0, whole_slide=True)
    report = embed_slides([tmp_path / "slide.tiff"], model_folder, tmp_path / "other", other, device="cpu")
    assert "no tile of 320 pixels has tissue in at least 100%" in report.failed[0][1]
    assert not (tmp_path / "other/slide.h5").exists()


def test_a_setting_that_an_earlier_version_did_not_know_was_off(tmp_path):
    EmbeddingStore(tmp_path, {"mpp": 0.5})
    EmbeddingStore(tmp_path, {"mpp": 0.5, "tile_size": None, "attention": False})
    with pytest.raises(StoreError, match="tile_size: None there, 224 now"):
        EmbeddingStore(tmp_path, {"mpp": 0.5, "tile_size": 224})
    assert json.loads((tmp_path / "settings.json").read_text()) == {"mpp": 0.5}
