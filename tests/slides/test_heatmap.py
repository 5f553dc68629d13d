# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image
from slide_files import stained_image, write_pyramid

from sparsepath_vit.runtime.figures import heat_colors
from sparsepath_vit.slides import EmbedSettings, Slide, SlideError, embed_slides
from sparsepath_vit.slides.heatmap import overlay, to_geojson, write_heatmap
from sparsepath_vit.slides.tissue import find_tissue
from sparsepath_vit.slides.token_values import TokenValues, read_token_values

PATCH = 16


def tokens_of(values, corners, size=PATCH, name="value"):
    return TokenValues(name, np.asarray(corners), np.asarray(values, float), (size, size), (640, 512))


def test_scores_and_kept_tokens_lie_on_the_tissue(embedded):
    slide_path, file = embedded
    present = find_tissue(Slide(slide_path)).token_grid(Slide(slide_path), PATCH, 0.5)
    for value in ("prune_scores", "kept"):
        grid, (left, top) = read_token_values(file, value).grid()
        found = np.zeros_like(present)
        found[top // PATCH : top // PATCH + grid.shape[0], left // PATCH : left // PATCH + grid.shape[1]] = ~np.isnan(
            grid
        )
        assert (found == present).all(), value
    kept, _ = read_token_values(file, "kept").grid()
    assert 0.5 <= np.nanmean(kept) < 0.75 and set(np.unique(kept[~np.isnan(kept)])) == {0, 1}


def test_scores_of_regions_of_all_sizes_compare(embedded):
    """Attention sums to one in every region, so that a small region's tokens would all look important."""
    tokens = read_token_values(embedded[1])
    with h5py.File(embedded[1]) as file:
        counts, scores = file["token_counts"][:], file["prune_scores"][:]
    assert len(set(counts.tolist())) > 1 and counts.sum() == len(tokens.values)
    first = 0
    for count in counts:
        region = np.s_[first : first + count]
        assert np.allclose(tokens.values[region], scores[region] * count)
        first += count


def test_norm_is_that_of_the_stored_features(embedded):
    tokens = read_token_values(embedded[1], "norm")
    with h5py.File(embedded[1]) as file:
        assert np.allclose(tokens.values[7], np.linalg.norm(file["patch_features"][7].astype(float)), rtol=1e-3)
        assert (tokens.corners[7] == file["patch_coords"][7]).all()


def test_any_array_of_one_number_per_token_is_taken(embedded, tmp_path):
    with h5py.File(embedded[1]) as file:
        kept, tissue = len(file["patch_coords"]), len(file["token_coords"])
    for count in (kept, tissue):
        np.save(tmp_path / "probability.npy", np.arange(count))
        tokens = read_token_values(embedded[1], str(tmp_path / "probability.npy"))
        assert tokens.name == "probability" and (tokens.values == np.arange(count)).all()
        assert len(tokens.corners) == count
    np.save(tmp_path / "wrong.npy", np.arange(3))
    with pytest.raises(SlideError, match=r"shape \(3,\): it takes one number for each of"):
        read_token_values(embedded[1], str(tmp_path / "wrong.npy"))


def test_overlapping_tokens_are_averaged():
    grid, origin = tokens_of([1, 3, 5], [[32, 48], [32, 48], [64, 64]]).grid()
    assert origin.tolist() == [32, 48] and grid.shape == (2, 3)
    assert grid[0, 0] == 2 and grid[1, 2] == 5 and np.isnan(grid).sum() == 4


def test_picture_colours_exactly_the_tokens(small_slide):
    slide = Slide(small_slide)
    tokens = tokens_of([0, 1, 2], [[32, 48], [48, 48], [320, 256]])
    plain, figure = slide.thumbnail(640), np.asarray(overlay(slide, tokens, max_size=640, opacity=1.0))[24:]
    changed = (plain != figure).any(-1)
    expected = np.zeros_like(changed)
    for x, y in tokens.corners:
        expected[y : y + PATCH, x : x + PATCH] = True
    assert (changed == expected).all()
    brightness = [figure[y + 4, x + 4].astype(int).sum() for x, y in tokens.corners]
    assert brightness == sorted(brightness) and len(set(brightness)) == 3
    faint = np.asarray(overlay(slide, tokens, max_size=640, opacity=0.25))[24:].astype(int)
    assert np.abs(faint - (0.75 * plain + 0.25 * figure)).max() <= 1


def test_small_picture_of_many_tokens_averages_them(small_slide):
    generator = np.random.default_rng(0)
    corners = np.stack(np.meshgrid(np.arange(0, 640, 4), np.arange(0, 512, 4)), -1).reshape(-1, 2)
    values = (corners[:, 0] >= 320) + 0.01 * generator.random(len(corners))
    figure = np.asarray(overlay(Slide(small_slide), tokens_of(values, corners, 4), max_size=64, opacity=1.0))[24:]
    assert figure[:, :31].astype(int).sum(-1).max() < figure[:, 33:].astype(int).sum(-1).min()


def polygon_areas(feature):
    def area(ring):
        x, y = np.asarray(ring).T
        return abs((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) / 2

    polygons = feature["geometry"]["coordinates"]
    return sum(area(rings[0]) - sum(area(hole) for hole in rings[1:]) for rings in polygons)


def test_geojson_classes_hold_equally_many_tokens_in_level_0_pixels():
    corners = np.stack(np.meshgrid(np.arange(10, 10 + 20 * 28, 28), np.arange(7, 7 + 10 * 28, 28)), -1).reshape(-1, 2)
    values = np.random.default_rng(0).permutation(200)
    collection = to_geojson(tokens_of(values, corners, 28), classes=4)
    assert collection["type"] == "FeatureCollection"
    names = [feature["properties"]["classification"]["name"] for feature in collection["features"]]
    assert names == ["value 0-25 %", "value 25-50 %", "value 50-75 %", "value 75-100 %"]
    for feature in collection["features"]:
        assert feature["properties"]["objectType"] == "annotation"
        assert feature["properties"]["measurements"]["tokens"] == 50
        assert polygon_areas(feature) == pytest.approx(50 * 28 * 28)
        points = np.concatenate([np.asarray(ring) for rings in feature["geometry"]["coordinates"] for ring in rings])
        assert ((points - [10, 7]) % 28 == 0).all()


def test_geojson_of_kept_tokens_has_two_classes():
    collection = to_geojson(tokens_of([1, 0, 1], [[0, 0], [16, 0], [32, 0]], name="kept"))
    areas = {feature["properties"]["name"]: polygon_areas(feature) for feature in collection["features"]}
    assert areas == {"kept": 512, "removed": 256}


def test_equal_values_are_one_class():
    collection = to_geojson(tokens_of([3, 3, 3], [[0, 0], [16, 0], [32, 0]]))
    assert [polygon_areas(feature) for feature in collection["features"]] == [768]


def test_files_are_written_and_open(embedded, tmp_path):
    slide = Slide(embedded[0])
    written = write_heatmap(slide, read_token_values(embedded[1]), tmp_path / "maps")
    assert [path.name for path in written] == ["slide_prune_scores.png", "slide_prune_scores.geojson"]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == sorted(path.name for path in written)
    assert Image.open(written[0]).size == (640, 512 + 24)
    assert len(json.loads(written[1].read_text())["features"]) == 5


def test_tokens_of_another_slide_are_refused(embedded, tmp_path):
    other = Slide(write_pyramid(tmp_path / "other.tiff", stained_image(320, 320, [])))
    with pytest.raises(SlideError, match=r"640 x 512 pixels; .*other.tiff has 320 x 320"):
        write_heatmap(other, read_token_values(embedded[1]), tmp_path)


def test_what_is_missing_is_named_with_the_way_to_get_it(embedded, model_folder, tmp_path):
    embed_slides([embedded[0]], model_folder, tmp_path / "out", device="cpu")
    with pytest.raises(SlideError, match="again with --dense"):
        read_token_values(tmp_path / "out/slide.h5")
    with pytest.raises(SlideError, match="value='attentions' is unknown"):
        read_token_values(embedded[1], "attentions")
    without = tmp_path / "none.h5"
    without.write_bytes(embedded[1].read_bytes())
    with h5py.File(without, "a") as file:
        del file["attention"]
    with pytest.raises(SlideError, match="again with --dense --attention mean"):
        read_token_values(without, "attention")
    with pytest.raises(SlideError, match="cannot be read as an HDF5 file"):
        read_token_values(embedded[0])
    with pytest.raises(SlideError, match=r"none\.npy does not exist: pass a \.npy file of numbers"):
        read_token_values(embedded[1], str(tmp_path / "none.npy"))
    for content in (b"", b"text"):  # NumPy's words were to load it unsafely; an empty file was a traceback
        (tmp_path / "text.npy").write_bytes(content)
        with pytest.raises(SlideError, match=r"text\.npy is no \.npy file of numbers: numpy\.save writes them\.$"):
            read_token_values(embedded[1], str(tmp_path / "text.npy"))
    for path, found in ((tmp_path / "missing.h5", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(SlideError, match=f"{path} {found}: pass the HDF5 file of the slide"):
            read_token_values(path)
    without = tmp_path / "without.h5"
    without.write_bytes(embedded[1].read_bytes())
    with h5py.File(without, "a") as file:
        del file["prune_scores"]
    with pytest.raises(SlideError, match="does not prune"):
        read_token_values(without)


def test_tokens_of_a_slide_with_oblong_pixels_keep_their_rows(model_folder, tmp_path):
    """The height of a token was taken for its width, and the resolution for the mean of both axes."""
    path = tmp_path / "oblong.tiff"
    options = {"tile": (64, 64), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, stained_image(640, 512, [(0, 0, 640, 512)]), resolution=(1e4 / 0.25, 1e4 / 0.5), **options)
    settings = EmbedSettings(mpp=0.5, region_size=512, dense=True)
    embed_slides([path], model_folder, tmp_path / "out", settings, device="cpu", tissue_mask="all")
    tokens = read_token_values(tmp_path / "out/oblong.h5")
    assert tokens.token_size == pytest.approx((32, 16))
    grid, _ = tokens.grid()
    assert grid.shape == (32, 20) and not np.isnan(grid).any()
    with h5py.File(tmp_path / "out/oblong.h5") as file:
        assert file["coords"].attrs["mpp"] == pytest.approx(0.5)
        assert file["coords"].attrs["target_magnification"] == 20


def test_feature_colours_give_a_picture_and_no_polygons(embedded, tmp_path):
    slide, tokens = Slide(embedded[0]), read_token_values(embedded[1], "pca")
    assert [path.name for path in write_heatmap(slide, tokens, tmp_path)] == ["slide_pca.png"]
    picture = np.asarray(overlay(slide, tokens, max_size=640, opacity=1.0))[24:]
    x, y = tokens.corners[5]
    twice = (tokens.corners == [x, y]).all(axis=1)
    assert np.abs(picture[y + 3, x + 3] - 255 * tokens.values[twice].mean(axis=0)).max() <= 1


def test_a_column_of_a_table_is_taken(embedded, tmp_path):
    kept = len(read_token_values(embedded[1], "norm").values)
    table = np.random.default_rng(0).random((kept, 3))
    np.save(tmp_path / "classes.npy", table)
    assert (read_token_values(embedded[1], f"{tmp_path}/classes.npy:2").values == table[:, 2]).all()
    for value in (f"{tmp_path}/classes.npy", f"{tmp_path}/classes.npy:3"):
        with pytest.raises(SlideError, match="is column C of a table"):
            read_token_values(embedded[1], value)


def test_numbers_between_limits_have_the_colours_of_their_size(small_slide):
    corners, values = np.array([[0, 0], [16, 0], [32, 0]]), np.array([0.0, 0.1, 1.0])
    tokens = TokenValues("p", corners, values, (16, 16), (640, 512), limits=(0, 1))
    picture = np.asarray(overlay(Slide(small_slide), tokens, max_size=640, opacity=1.0))[24:]
    assert (picture[2, [2, 18, 34]] == heat_colors(values)).all()


def test_grid_of_merged_tokens_holds_their_means():
    corners = np.stack(np.meshgrid(np.arange(5), np.arange(3)), -1).reshape(-1, 2) * PATCH + [32, 48]
    values = np.arange(15.0)
    grid, origin = tokens_of(values, corners).grid(merged=2)
    assert origin.tolist() == [32, 48] and grid.shape == (2, 3)
    assert grid[0, 0] == np.mean([0, 1, 5, 6]) and grid[1, 2] == 14


def test_geojson_is_valid_to_shapely_and_to_qupath(embedded):
    """QuPath asks for polygons, an objectType, and a classification with a name and three 8-bit numbers."""
    shapely = pytest.importorskip("shapely.geometry")
    tokens = read_token_values(embedded[1])
    collection = json.loads(json.dumps(to_geojson(tokens)))
    assert collection["type"] == "FeatureCollection" and collection["features"]
    area = 0.0
    for feature in collection["features"]:
        assert feature["type"] == "Feature" and feature["geometry"]["type"] in ("Polygon", "MultiPolygon")
        shape = shapely.shape(feature["geometry"])
        pieces = getattr(shape, "geoms", [shape])
        assert all(piece.is_valid and piece.exterior.is_ccw is not None for piece in pieces)
        area += sum(piece.area for piece in pieces)
        properties = feature["properties"]
        assert properties["objectType"] == "annotation" and isinstance(properties["classification"]["name"], str)
        assert all(isinstance(level, int) and 0 <= level < 256 for level in properties["classification"]["color"])
        assert all(isinstance(number, int | float) for number in properties["measurements"].values())
    grid, _ = tokens.grid()
    assert area == pytest.approx((~np.isnan(grid)).sum() * PATCH**2)
