# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
from slide_files import stained_image, write_pyramid

from sparsepath_vit.slides import Slide, SlideError
from sparsepath_vit.slides.regions import Box, SlideInput, read_inputs, tissue_regions
from sparsepath_vit.slides.tissue import TissueMask


@pytest.fixture
def slide(tmp_path):
    return Slide(write_pyramid(tmp_path / "slide.tiff", stained_image(1000, 700, []), factors=(), compression=None))


def random_tissue(slide, share, seed=0, pixel=50):
    width, height = slide.dimensions
    mask = np.random.default_rng(seed).random((height // pixel, width // pixel)) < share
    return TissueMask.of_mask(mask, slide)


@pytest.mark.parametrize("mpp", [None, 0.5, 0.73, 1.0])
@pytest.mark.parametrize(("region_size", "overlap"), [(140, 0), (150, 0), (140, 28), (140, 139), (14, 0), (5000, 0)])
def test_every_tissue_token_lies_in_a_region(slide, mpp, region_size, overlap):
    tissue = random_tissue(slide, 0.1)
    present = tissue.token_grid(slide, 14, mpp)
    scale_x, scale_y = slide.scale(mpp)
    covered = np.zeros_like(present, dtype=int)
    for region in tissue_regions(slide, tissue, 14, region_size, mpp, overlap):
        assert region.width % 14 == region.height % 14 == 0
        row, column = (round(start / scale / 14) for start, scale in ((region.y, scale_y), (region.x, scale_x)))
        assert region.x == pytest.approx(column * 14 * scale_x) and region.y == pytest.approx(row * 14 * scale_y)
        tokens = np.s_[row : row + region.height // 14, column : column + region.width // 14]
        inside = tissue.token_grid(slide, 14, mpp, region.x, region.y, region.width, region.height)
        assert inside.any() and (inside == present[tokens]).mean() > 0.99
        covered[tokens] += 1
    assert present.any() and covered[present].min() >= 1
    if overlap == 0:
        assert covered.max() == 1


def test_order_is_raster_and_repeatable(slide):
    tissue = random_tissue(slide, 0.3)
    regions = tissue_regions(slide, tissue, 14, 140)
    assert regions == tissue_regions(slide, tissue, 14, 140)
    assert [(region.y, region.x) for region in regions] == sorted((region.y, region.x) for region in regions)


def test_minimum_tissue_counts_tokens(slide):
    mask = np.zeros((700, 1000), bool)
    mask[:140, :70] = True  # half of the first region
    mask[:140, 280:420] = True
    tissue = TissueMask.of_mask(mask, slide)
    corners = [
        [region.x for region in tissue_regions(slide, tissue, 14, 140, minimum_tissue=m)] for m in (0, 0.5, 0.51)
    ]
    assert corners == [[0, 280], [0, 280], [280]]
    with pytest.raises(SlideError, match="no region of 5000 pixels has tissue in at least 90%"):
        tissue_regions(slide, tissue, 14, 5000, minimum_tissue=0.9)


def test_regions_at_the_edge_read_with_white_up_to_the_last_token(slide):
    everywhere = TissueMask.everywhere(slide)
    last = tissue_regions(slide, everywhere, 16, 160)[-1]
    assert (last.x, last.y, last.width, last.height) == (960, 640, 48, 64)
    pixels = slide.read_region(last.x, last.y, last.width, last.height, 0.5, pad=True)
    assert (pixels[60:] == 255).all() and (pixels[:, 40:] == 255).all()
    assert (pixels[:60, :40] == slide.read_region(960, 640, 40, 60)).all()


@pytest.mark.parametrize("arguments", [{"region_size": 0}, {"overlap": -1}, {"overlap": 140}, {"minimum_tissue": 1.1}])
def test_impossible_arguments_are_refused(slide, arguments):
    with pytest.raises(SlideError, match="are not possible"):
        tissue_regions(slide, TissueMask.everywhere(slide), 14, **{"region_size": 140, **arguments})


def test_files_folders_and_manifests_give_each_slide_once_in_order(tmp_path):
    for name in ("b.svs", "a.tiff", "sub/c.OME.TIF", "sub/d.png", "notes.txt", ".hidden.svs", "sub/e.csv"):
        path = tmp_path / "slides" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    single = tmp_path / "slides/b.svs"
    inputs = read_inputs([str(single), tmp_path / "slides"])
    assert [item.path.name for item in inputs] == ["b.svs", "a.tiff", "c.OME.TIF", "d.png"]
    manifest = tmp_path / "list.csv"
    manifest.write_text("slide\nslides/a.tiff\nslides/b.svs\n")
    assert [item.path.name for item in read_inputs([manifest, tmp_path / "slides"])][:2] == ["a.tiff", "b.svs"]


def test_manifest_rows_are_read_in_full(tmp_path):
    manifest = tmp_path / "list.csv"
    manifest.write_text(
        "\ufeffslide,mpp,x,y,width,height,label,patient\n"
        "a.svs,0.25,10,20,300,400,tumour,7\n"
        "b.svs,,,,,,benign,8\n"
        '"a.svs",0.25, 500,20,300,400,,7\n'
        "c.svs,0.5,,,,,,9\n",
        encoding="utf-8",
    )
    boxes = (Box(10, 20, 300, 400, "tumour"), Box(500, 20, 300, 400))
    assert read_inputs([manifest]) == [
        SlideInput(tmp_path / "a.svs", 0.25, boxes),
        SlideInput(tmp_path / "b.svs", label="benign"),
        SlideInput(tmp_path / "c.svs", 0.5),
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("wsi,mpp\na.svs,0.25\n", {"mpp": 0.25}),
        (
            "sample_id,image_path,mask_path,spacing_at_level_0\ncase-1,a.svs,masks/a.png,0.5\n",
            {"mpp": 0.5, "name": "case-1", "tissue_mask": "masks/a.png"},
        ),
        ("case_id,slide_id,label\np1,a,tumour\n", {"label": "tumour"}),
    ],
    ids=["TRIDENT", "slide2vec", "CLAM"],
)
def test_manifests_of_other_toolkits_are_read(tmp_path, content, expected):
    (tmp_path / "a.svs").touch()
    (tmp_path / "list.csv").write_text(content)
    if "tissue_mask" in expected:
        expected = {**expected, "tissue_mask": tmp_path / expected["tissue_mask"]}
    assert read_inputs([tmp_path / "list.csv"]) == [SlideInput(tmp_path / "a.svs", **expected)]


def test_a_slide_without_its_ending_that_may_be_two_is_refused(tmp_path):
    for name in ("a.svs", "a.tif"):
        (tmp_path / name).touch()
    (tmp_path / "list.csv").write_text("slide_id\na\n")
    with pytest.raises(ValueError, match=r"line 2: .*/a may be a\.svs or a\.tif: add the ending"):
        read_inputs([tmp_path / "list.csv"])


def test_whole_numbers_as_pandas_writes_them(tmp_path):
    """A column with empty cells holds floats there, and was refused."""
    (tmp_path / "list.csv").write_text("slide,x,y,width,height\na.svs,10.0,20.0,300.0,400.0\nb.svs,,,,\n")
    assert [item.boxes for item in read_inputs([tmp_path / "list.csv"])] == [(Box(10, 20, 300, 400),), ()]


def test_unused_columns_are_named(tmp_path, caplog):
    (tmp_path / "list.csv").write_text("slide,patient\na.svs,7\n")
    read_inputs([tmp_path / "list.csv"])
    assert "['patient'] are not used" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("path,label\na.svs,1\n", "no column 'slide'"),
        ("slide;mpp\na.svs;0,5\n", "no column 'slide'"),
        ("", "no column 'slide'"),
        ("slide,mpp\n,0.5\n", "line 2: the column 'slide' is empty"),
        ("slide,mpp\na.svs,half\n", "line 2: mpp='half' is not a number"),
        ("slide,mpp\na.svs,20\n", "line 2: mpp=20.0 is not the micrometres"),
        ("slide,x,y,width,height\na.svs,1,2,3,4\nb.svs,1,2,,4\n", "line 3: a region needs x, y, width and height"),
        ("slide,x,y,width,height\na.svs,1,2,0,4\n", "line 2: the region is 0 x 4"),
        ("slide,x,y,width,height\na.svs,1.5,2,3,4\n", "line 2: x='1.5' is not a whole number"),
        ("slide,x,y,width,height\na.svs,1,2,3,4\na.svs,,,,\n", "line 3: a.svs stands in several rows"),
        ("slide,mpp,x,y,width,height\na.svs,0.5,1,2,3,4\na.svs,0.4,1,2,3,4\n", "line 3: a.svs stands in several"),
        ("slide\n", "no slides were given"),
        ("slide,widht\na.svs,7\n", "Did you mean 'width' by 'widht'"),
        ("slides,mpp\na.svs,0.5\n", "no column 'slide'. Did you mean 'slide' by 'slides'"),
        ("slide,label\na.svs,tumour, high grade\n", "line 2: the row has 3 cells, the header 2 columns"),
        ("slide,x,y,width,height\na.svs,1e300,2,3,4\n", "line 2: x='1e300' is not a whole number"),
    ],
)
def test_manifest_mistakes_are_named_with_their_line(tmp_path, content, words):
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_inputs([tmp_path / "list.csv"])


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no slides were given"):
        read_inputs([])
    with pytest.raises(ValueError, match=r"holds no slides: expected files ending in \.svs"):
        read_inputs([tmp_path])
    with pytest.raises(ValueError, match="cannot be read"):
        read_inputs([tmp_path / "none.csv"])


def test_box_becomes_a_region_at_any_mpp(slide):
    region = Box(100, 50, 301, 200, "tumour").at(slide, 1.0)
    assert (region.x, region.y, region.width, region.height, region.label) == (100, 50, 150, 100, "tumour")
    assert not Box(100, 50, 301, 200).overhangs(slide)


@pytest.mark.parametrize("box", [Box(950, 650, 300, 300), Box(-40, -30, 100, 100), Box(0, 0, 4000, 2000)])
def test_box_may_reach_over_the_slide(slide, box):
    region = box.at(slide, None)
    assert (region.x, region.y, region.width, region.height) == (box.x, box.y, box.width, box.height)
    assert box.overhangs(slide)


@pytest.mark.parametrize(
    ("box", "words"),
    [
        (Box(1000, 0, 50, 50), r"x=1000\.\.1050, y=0\.\.50 \(level-0 pixels\) is not inside .* 1000 x 700"),
        (Box(0, -50, 50, 50), "is not inside"),
        (Box(0, 700, 50, 50), "is not inside"),
        (Box(0, 0, 10**9, 10**9), "is far larger than"),
    ],
)
def test_box_outside_the_slide_or_far_larger_is_refused(slide, box, words):
    with pytest.raises(SlideError, match=words):
        box.at(slide, 0.5)


def test_spaces_semicolons_tabs_and_capitals_of_a_manifest_are_read(tmp_path):
    expected = [SlideInput(tmp_path / "a.svs", 0.25, label="tumour, high grade")]
    for name, text in {
        "spaces.csv": 'slide, mpp, label\na.svs, 0.25, "tumour, high grade"\n',
        "semicolons.csv": "Slide;MPP;Label\na.svs;0.25;tumour, high grade\n",
        "tabs.tsv": "slide\tmpp\tlabel\na.svs\t0.25\ttumour, high grade\n",
        "spreadsheet.csv": 'slide,mpp,label,,\n,,,,\na.svs,0.25,"tumour, high grade",,\n,,,,\n',
    }.items():
        (tmp_path / name).write_text(text)
        assert read_inputs([tmp_path / name]) == expected, name


def test_slide_given_twice_with_other_labels_is_refused(tmp_path):
    for name, label in (("one", "tumour"), ("two", "benign")):
        (tmp_path / f"{name}.csv").write_text(f"slide,label\na.svs,{label}\n")
    with pytest.raises(ValueError, match=r"given twice .* different mpp, regions or labels"):
        read_inputs([tmp_path / "one.csv", tmp_path / "two.csv"])


def test_two_names_of_a_slide_in_a_manifest_are_one_slide(tmp_path, caplog):
    (tmp_path / "a.svs").write_bytes(b"a slide")
    (tmp_path / "b.svs").hardlink_to(tmp_path / "a.svs")
    (tmp_path / "list.csv").write_text("slide\na.svs\nb.svs\n")
    assert [item.path.name for item in read_inputs([tmp_path / "list.csv"])] == ["a.svs"]
    assert f"b.svs is left out: it is {tmp_path / 'a.svs'} under another name" in caplog.text
