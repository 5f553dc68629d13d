# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
from PIL import Image
from slide_files import stained_image, write_leica, write_pyramid
from typer.testing import CliRunner

from sparsepath.app import app
from sparsepath_vit.slides import EmbedSettings, Slide, find_tissue, inspect_slide, tissue_regions
from sparsepath_vit.slides.inspection import _FRAME_COLOR, _REGION_COLOR, _TISSUE_COLOR, _TITLE_HEIGHT

PATCH = 16


def places_of(picture, color):
    """(left, top, right, bottom) of the pixels of a colour, below the title."""
    rows, columns = np.nonzero((np.asarray(picture)[_TITLE_HEIGHT:] == color).all(-1))
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_facts_are_those_of_the_file_and_of_embed(small_slide):
    found = inspect_slide(small_slide, EmbedSettings(region_size=256), patch_size=PATCH, max_size=640)
    facts = dict(found.facts)
    assert not found.problems
    assert facts["levels"] == "2: 640 x 512 (1/1), 160 x 128 (1/4)"
    assert facts["format"] == "TIFF, scanner generic-tiff" and facts["read by"] == "OpenSlide"
    assert facts["colour"].startswith("RGB, 3 samples of 8 bits (uint)") and "in tiles" in facts["codec"]
    assert facts["resolution"] == "0.5 micrometres per pixel are used (0.5 x 0.5 stated in TIFF resolution tags (cm))"
    assert facts["bounds"].startswith("none stated")
    with Slide(small_slide) as slide:
        tissue = find_tissue(slide)
        regions = tissue_regions(slide, tissue, PATCH, 256, 0.5)
        tokens = [
            tissue.token_grid(slide, PATCH, 0.5, region.x, region.y, region.width, region.height).sum()
            for region in regions
        ]
    assert facts["tissue"].startswith(f"{tissue.share:.1%} of the slide")
    assert f"{len(regions)} regions of up to 256 px at 0.5" in facts["embed"]
    assert f"{sum(tokens)} tissue tokens of patch size 16, at most {max(tokens)} a forward" in facts["embed"]


def test_the_picture_outlines_tissue_and_regions(small_slide):
    found = inspect_slide(small_slide, EmbedSettings(region_size=256), patch_size=PATCH, max_size=640)
    assert found.picture.size == (640, 512 + _TITLE_HEIGHT)
    with Slide(small_slide) as slide:
        tissue = find_tissue(slide)
        regions = tissue_regions(slide, tissue, PATCH, 256, 0.5)
    ends = np.array([(region.x, region.y, region.x + region.width, region.y + region.height) for region in regions])
    left, top, right, bottom = places_of(found.picture, _REGION_COLOR)
    assert (left, top) == tuple(ends[:, :2].min(axis=0)) and (right + 1, bottom + 1) == tuple(ends[:, 2:].max(axis=0))
    rows, columns = np.nonzero(tissue.mask)
    left, top, right, bottom = places_of(found.picture, _TISSUE_COLOR)
    assert abs(left - columns.min() * tissue.scale[0]) <= 2 and abs(top - rows.min() * tissue.scale[1]) <= 2
    assert abs(bottom + 1 - (rows.max() + 1) * tissue.scale[1]) <= 2


def test_the_scanned_area_is_shown_and_its_share_told(tmp_path):
    path = write_leica(tmp_path / "scan.scn", stained_image(640, 512, [(64, 96, 384, 256)]), (320, 448))
    found = inspect_slide(path, patch_size=PATCH, max_size=1500)
    facts = dict(found.facts)
    assert (
        facts["bounds"] == "x=320, y=448, width=640, height=512 (level-0 pixels); coordinates count from x=320, y=448"
    )
    assert "of its scanned area" in facts["tissue"] and facts["objective"] == "20x, as stated"
    assert places_of(found.picture, _FRAME_COLOR) == (320, 448, 959, 959)
    at_corner = dict(inspect_slide(path, EmbedSettings(origin="slide"), patch_size=PATCH).facts)
    assert at_corner["bounds"].endswith("count from x=0, y=0")


@pytest.mark.parametrize(
    ("kind", "problem", "last_fact", "has_picture"),
    [
        ("missing", "does not exist", None, False),
        ("text", "cannot be read", "codec", False),
        ("no resolution", "does not state its resolution", "bounds", True),
        ("no tissue", "no tissue was found", "resolution", True),
        ("16 bits", "does not state which value is white", "codec", False),
    ],
)
def test_what_is_wrong_stands_beside_what_is_known(tmp_path, kind, problem, last_fact, has_picture):
    path = tmp_path / "slide.tiff"
    image = stained_image(640, 512, [] if kind == "no tissue" else [(64, 96, 384, 256)])
    if kind == "text":
        path = tmp_path / "slide.svs"
        path.write_text("no slide")
    elif kind == "16 bits":
        write_pyramid(path, image.astype(np.uint16) * 16, factors=())
    elif kind != "missing":
        write_pyramid(path, image, mpp=None if kind == "no resolution" else 0.5)
    found = inspect_slide(path)
    assert len(found.problems) == 1 and problem in found.problems[0] and str(path) in found.problems[0]
    assert (found.facts[-1][0] if found.facts else None) == last_fact
    assert (found.picture is not None) == has_picture


def test_command_prints_all_slides_and_ends_with_an_error_where_one_has_a_problem(small_slide, tmp_path):
    (tmp_path / "none.tiff").write_bytes(b"II*\0" + bytes(20))
    out = tmp_path / "pictures"
    arguments = ["inspect", str(tmp_path / "none.tiff"), str(small_slide), "--out", str(out), "--patch-size", "16"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1 and "problem" in result.output
    assert "small.tiff" in result.output and "tissue tokens of patch size 16" in result.output
    assert [path.name for path in out.iterdir()] == ["small_inspection.png"]
    with Image.open(out / "small_inspection.png") as picture:
        assert picture.size == (640, 512 + _TITLE_HEIGHT)
    assert CliRunner().invoke(app, [*arguments[:1], *arguments[2:]]).exit_code == 0


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "CMU-1_panda_layout.tiff", "OS-1-detail.ome.tif"])
def test_real_slides_have_no_problem(shared_slide, name):
    found = inspect_slide(shared_slide(f"slides/{name}"), EmbedSettings(region_size=448))
    assert not found.problems
    assert [fact for fact, _ in found.facts if fact != "objective"] == [
        *("file", "format", "image", "colour", "codec", "read by", "levels", "bounds", "resolution", "tissue", "embed")
    ]
