# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json

import numpy as np
import pytest
from PIL import Image
from slide_files import stained_image, write_pyramid

from sparsepath_vit.slides import Slide, SlideError
from sparsepath_vit.slides.tissue import TissueMask, find_tissue

SIDE = 2048  # level-0 pixels, 1.024 mm at 0.5 mpp
PIXEL = 16  # level-0 pixels per overview pixel at 8 mpp
TISSUE = (512, 640, 768, 512)  # x, y, width, height


@pytest.fixture
def slide_of(tmp_path):
    def write(image, mpp=0.5):
        return Slide(write_pyramid(tmp_path / "slide.tiff", image, mpp=mpp, factors=(), compression=None))

    return write


def box_mask(x, y, width, height, side=SIDE // PIXEL):
    mask = np.zeros((side, side), bool)
    mask[y // PIXEL : (y + height) // PIXEL, x // PIXEL : (x + width) // PIXEL] = True
    return mask


def test_tissue_is_found_with_its_margin(slide_of):
    tissue = find_tissue(slide_of(stained_image(SIDE, SIDE, [TISSUE])), margin=0)
    assert tissue.mask.shape == (SIDE // PIXEL, SIDE // PIXEL) and tissue.scale == (PIXEL, PIXEL)
    assert (tissue.mask == box_mask(*TISSUE)).mean() > 0.995
    x, y, width, height = TISSUE
    wider = find_tissue(slide_of(stained_image(SIDE, SIDE, [TISSUE])), margin=32.0).mask
    grown = box_mask(x - 64, y, width + 128, height) | box_mask(x, y - 64, width, height + 128)
    assert (wider & ~tissue.mask).sum() > 4 * 2 * (48 + 32) * 0.9
    assert (grown & ~wider).mean() < 0.005 and (wider & ~box_mask(x - 80, y - 80, width + 160, height + 160)).sum() == 0


def test_small_holes_are_filled_large_and_open_ones_are_not(slide_of):
    image = stained_image(SIDE, SIDE, [(512, 512, 1024, 1536)])
    image[700:800, 700:800] = 243  # 50 x 50 micrometres
    image[1000:1600, 800:1400] = 243  # 300 x 300 micrometres
    image[1900:2048, 600:750] = 243  # small, but open to the slide's edge
    mask = find_tissue(slide_of(image), margin=0).mask
    assert mask[700 // PIXEL : 800 // PIXEL, 700 // PIXEL : 800 // PIXEL].all()
    assert not mask[1020 // PIXEL : 1580 // PIXEL, 820 // PIXEL : 1380 // PIXEL].any()
    assert not mask[1920 // PIXEL :, 620 // PIXEL : 730 // PIXEL].any()


def test_specks_are_dropped(slide_of):
    mask = find_tissue(slide_of(stained_image(SIDE, SIDE, [TISSUE, (100, 100, 100, 100)])), margin=0).mask
    assert (mask == box_mask(*TISSUE)).mean() > 0.995 and not mask[:20, :20].any()


@pytest.mark.parametrize(
    ("name", "colour"),
    [("black", (20, 20, 25)), ("green", (60, 150, 80)), ("blue", (40, 80, 200)), ("stitching border", (255, 255, 255))],
)
def test_what_is_not_tissue_is_left_out(slide_of, name, colour):
    image = stained_image(SIDE, SIDE, [TISSUE])
    image[1500:1700, 200:1800] = colour
    mask = find_tissue(slide_of(image), margin=0).mask
    assert (mask == box_mask(*TISSUE)).mean() > 0.995, name


def test_green_stain_is_kept_on_request(slide_of):
    image = stained_image(SIDE, SIDE, [TISSUE])
    image[1500:1700, 200:1800] = (60, 150, 80)
    assert find_tissue(slide_of(image), remove_pen=False).mask[1520 // PIXEL : 1680 // PIXEL, 20:100].all()


def test_image_full_of_tissue_is_all_tissue(slide_of):
    """Otsu alone would call the paler half of such an image background."""
    assert find_tissue(slide_of(stained_image(480, 480, [(0, 0, 480, 480)]))).mask.all()


@pytest.mark.parametrize(
    "colour", [(255, 255, 255), (240, 236, 246), (0, 0, 0)], ids=["white", "tinted glass", "black"]
)
def test_no_tissue_at_all_is_an_error_with_the_way_out(slide_of, colour):
    noise = np.random.default_rng(0).integers(-2, 3, (512, 512, 3))
    image = np.clip(np.asarray(colour) + noise, 0, 255).astype(np.uint8)
    with pytest.raises(SlideError, match=r"slide.tiff: no tissue was found.*--tissue-mask"):
        find_tissue(slide_of(image))


@pytest.mark.parametrize(("value", "words"), [(200, "gray, without any colour"), (9, "gray"), (None, "almost black")])
def test_what_is_no_stained_slide_is_not_sent_to_all(slide_of, value, words):
    image = np.full((512, 512, 3), value or 0, np.uint8)
    if value is None:
        image[...] = (0, 9, 4)
    with pytest.raises(SlideError, match=f"no tissue was found: it is .*{words}.*--tissue-mask FILE") as raised:
        find_tissue(slide_of(image))
    assert "--tissue-mask all" not in str(raised.value)


def test_tissue_needs_the_mpp(slide_of):
    with pytest.raises(SlideError, match="does not state its resolution"):
        find_tissue(slide_of(stained_image(SIDE, SIDE, [TISSUE]), mpp=None))


@pytest.mark.parametrize(("mpp", "patch_size"), [(None, 16), (0.5, 32), (1.0, 16), (0.5, 14), (0.7, 14)])
def test_token_grid_is_the_share_of_tissue_in_each_token(slide_of, mpp, patch_size):
    slide = slide_of(stained_image(SIDE, SIDE, [TISSUE]))
    rng = np.random.default_rng(1)
    tissue = TissueMask.of_mask(rng.random((SIDE // PIXEL, SIDE // PIXEL)) < 0.4, slide)
    token = patch_size * slide.scale(mpp)[0]
    fine = np.kron(tissue.mask, np.ones((PIXEL * 5, PIXEL * 5), bool))  # 5 samples per level-0 pixel side
    grid = tissue.token_grid(slide, patch_size, mpp, x=37, y=90, width=patch_size * 6, height=patch_size * 4 - 5)
    assert grid.shape == (4, 6)
    edges = [(np.arange(count + 1) * token + start) * 5 for count, start in ((4, 90), (6, 37))]
    for row, column in np.ndindex(4, 6):
        top, bottom = edges[0][row : row + 2].round().astype(int)
        left, right = edges[1][column : column + 2].round().astype(int)
        share = fine[top:bottom, left:right].mean()
        assert grid[row, column] == (share >= 0.5) or abs(share - 0.5) < 0.02


def test_token_grid_of_a_whole_slide_reaches_its_edges(slide_of):
    slide = slide_of(stained_image(1000, 700, [(0, 0, 1000, 700)]))
    everywhere = TissueMask.everywhere(slide)
    assert everywhere.token_grid(slide, 14, minimum_share=0).shape == (50, 72)
    assert everywhere.token_grid(slide, 14, minimum_share=0).all()
    counted = everywhere.token_grid(slide, 14)
    assert counted[:, :71].all() and not counted[:, 71].any()  # the last column is 6 of 14 pixels wide
    assert not everywhere.token_grid(slide, 14, x=1000, y=700, width=28, height=28, minimum_share=0).any()


@pytest.mark.parametrize("mpp", [0.5, 0.77, 1.3])
def test_regions_agree_with_the_slide_on_tokens_that_are_exactly_half_tissue(slide_of, mpp):
    """Edges are rounded differently in a region: a token could be tissue on the slide and not in its region."""
    slide = slide_of(np.zeros((60, 900, 3), np.uint8))
    half = 14 * slide.scale(mpp)[0] / 2
    tissue = TissueMask(np.random.default_rng(0).random((4, 400)) < 0.3, (half, half))
    whole = tissue.token_grid(slide, 14, mpp)
    for column in range(whole.shape[1] - 2):
        x = column * 14 * slide.scale(mpp)[0]
        region = tissue.token_grid(slide, 14, mpp, x, 0, 28, 14 * len(whole))
        assert (region == whole[:, column : column + 2]).all()


def test_mask_image_of_any_size_and_kind(slide_of, tmp_path):
    slide = slide_of(stained_image(SIDE, SIDE, []))
    mask = box_mask(*TISSUE)
    images = {
        "label.png": Image.fromarray(mask.astype(np.uint8) * 3),
        "grey.png": Image.fromarray(mask.astype(np.uint8) * 255).resize((SIDE // 4, SIDE // 4)),
        "binary.png": Image.fromarray(mask.astype(np.uint8) * 255).convert("1"),
        "colour.png": Image.fromarray(np.stack([mask * 200, mask * 0, mask * 0], -1).astype(np.uint8)),
        "lossy.jpg": Image.fromarray(mask.astype(np.uint8) * 255).resize((SIDE, SIDE), Image.Resampling.NEAREST),
    }
    for name, image in images.items():
        image.save(tmp_path / name)
        tissue = find_tissue(slide, tmp_path / name)
        assert (tissue.token_grid(slide, PIXEL) == mask).mean() > 0.99, name


def test_geojson_polygons_with_holes_in_every_wrapping(slide_of, tmp_path):
    slide = slide_of(stained_image(SIDE, SIDE, []))

    def ring(x, y, width, height):
        return [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]

    polygon = {"type": "Polygon", "coordinates": [ring(*TISSUE), ring(704, 800, 192, 160)]}
    second = {"type": "Polygon", "coordinates": [ring(704, 800, 64, 64)]}
    both = {"type": "MultiPolygon", "coordinates": [polygon["coordinates"], second["coordinates"]]}
    features = [{"type": "Feature", "geometry": part, "properties": {}} for part in (polygon, second)]
    point = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [10, 10]}}
    expected = box_mask(*TISSUE) & ~box_mask(704, 800, 192, 160) | box_mask(704, 800, 64, 64)
    for content in (
        {"type": "FeatureCollection", "features": [*features, point]},
        features,
        {"type": "Feature", "geometry": both},
        {"type": "GeometryCollection", "geometries": [polygon, second]},
    ):
        path = tmp_path / "tissue.geojson"
        path.write_text(json.dumps(content))
        assert (find_tissue(slide, path).mask == expected).all()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("mask.png", b"no image", "cannot be read"),
        ("mask.geojson", b"{", "is no GeoJSON"),
        ("mask.geojson", b'{"kind": "Polygon"}', "is no GeoJSON"),
        ("mask.geojson", b'{"type": "FeatureCollection", "features": []}', "marks nothing"),
        ("mask.geojson", b'{"type": "Polygon", "coordinates": [[[9000, 1], [9999, 1], [9999, 99]]]}', "marks nothing"),
    ],
)
def test_unusable_mask_file_is_named(slide_of, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlideError, match=words) as raised:
        find_tissue(slide_of(stained_image(256, 256, [])), tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)


def test_mask_of_another_shape_and_a_missing_one_are_refused(slide_of, tmp_path):
    slide = slide_of(stained_image(512, 256, []))
    Image.fromarray(np.ones((64, 64), np.uint8)).save(tmp_path / "square.png")
    with pytest.raises(SlideError, match=r"square.png is 64 x 64, which is not the shape of .*512 x 256"):
        find_tissue(slide, tmp_path / "square.png")
    with pytest.raises(SlideError, match="No such file"):
        find_tissue(slide, tmp_path / "none.png")


def test_all_takes_the_whole_slide(slide_of):
    assert find_tissue(slide_of(stained_image(256, 256, [])), "all").share == 1


@pytest.mark.parametrize(
    ("name", "mpp", "share"),
    [("CMU-1-Small-Region.svs", None, (0.35, 0.5)), ("TCGA-CR-7395-TS1_x0-2047.svs", 0.5, (0.5, 0.62))],
)
def test_real_slides(shared_slide, name, mpp, share):
    slide = Slide(shared_slide(f"slides/{name}"), mpp=mpp)
    tissue = find_tissue(slide)
    assert share[0] < tissue.share < share[1]
    overview = np.asarray(Image.fromarray(slide.thumbnail(256)).resize(tissue.mask.shape[::-1]))
    stained = overview[..., 1] < 170
    assert (stained & tissue.mask).sum() / stained.sum() > 0.97
    white = overview.min(-1) > 250
    assert (white & tissue.mask).sum() < 0.02 * tissue.mask.sum()
