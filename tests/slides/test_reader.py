# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openslide
import pytest
import tifffile
import torch
from PIL import Image
from slide_files import stained_image, write_pyramid

from sparsepath_vit.slides import Slide, SlideError


def on_white(region):
    return np.asarray(Image.alpha_composite(Image.new("RGBA", region.size, "white"), region).convert("RGB"))


def test_level_0_pixels_are_the_files(small_slide, small_image):
    slide = Slide(small_slide)
    assert slide.dimensions == (640, 512) and slide.levels == ((640, 512), (160, 128))
    for mpp in (None, 0.5, 0.4971):
        assert (slide.read_region(31, 17, 300, 200, mpp=mpp) == small_image[17:217, 31:331]).all()


@pytest.mark.parametrize("name", ["CMU-1-Small-Region.svs", "CMU-1_panda_layout.tiff", "TCGA-CR-7395-TS1_x0-2047.svs"])
def test_real_region_is_openslides_own_at_level_0(shared_slide, name):
    path = shared_slide(f"slides/{name}")
    slide, reference = Slide(path, mpp=0.5), openslide.OpenSlide(path)
    width, height = slide.dimensions
    for x, y, region_width, region_height in [(0, 0, 700, 900), (1003, 1501, 777, 555), (width - 5, height - 7, 5, 7)]:
        expected = on_white(reference.read_region((x, y), 0, (region_width, region_height)))
        assert (slide.read_region(x, y, region_width, region_height, mpp=0.5) == expected).all()


def test_coarse_region_comes_from_the_coarsest_level_that_is_fine_enough(tmp_path):
    """Each level has its own grey, so the pixels tell where they come from."""
    path = tmp_path / "levels.tif"
    with tifffile.TiffWriter(path) as tiff:
        for grey, side, kind in ((50, 512, 0), (100, 256, 1), (150, 128, 1)):
            pixels = np.full((side, side, 3), grey, np.uint8)
            tiff.write(pixels, tile=(64, 64), photometric="rgb", subfiletype=kind, metadata=None)
    slide = Slide(path, mpp=0.25)
    for mpp, grey in [
        (0.25, 50),
        (0.4, 50),
        (0.4999, 100),
        (0.5, 100),
        (0.6, 100),
        (0.99, 100),
        (1.0, 150),
        (3.0, 150),
    ]:
        assert (slide.read_region(0, 0, 16, 16, mpp=mpp) == grey).all(), mpp


def test_resampling_is_antialiased_and_in_place(tmp_path):
    """A one-pixel checkerboard must turn grey, not into stripes, and an edge must stay where it is."""
    board = np.indices((512, 512)).sum(0) % 2 * 255
    board[:, 300:] = 0
    slide = Slide(
        write_pyramid(tmp_path / "board.tif", np.repeat(board[..., None], 3, -1).astype(np.uint8), factors=())
    )
    for mpp in (1.3, 2.0, 5.0):
        region = slide.read_region(0, 0, *slide.size_at(mpp), mpp=mpp)[..., 0].astype(float)
        edge = 300 * 0.5 / mpp
        inside, outside = region[:, 2 : int(edge) - 2], region[:, int(edge) + 3 :]
        assert np.abs(inside - 127.5).max() < 6 and outside.max() < 3
        assert region[5].sum() / 127.5 == pytest.approx(edge, abs=0.6 * mpp)


def test_coarse_pixels_are_the_means_of_what_they_cover(small_image, tmp_path):
    slide = Slide(write_pyramid(tmp_path / "one_level.tif", small_image, factors=()))
    region = slide.read_region(0, 0, 40, 32, mpp=8.0).astype(float)
    means = small_image.reshape(32, 16, 40, 16, 3).mean((1, 3))
    inner = np.ones((32, 40), bool)
    for edge in (4, 28):
        inner[:, edge - 2 : edge + 2] = False
    inner[4:8], inner[20:24] = False, False  # bicubic overshoots beside the tissue's edges
    assert np.abs(region - means)[inner].max() < 4


@pytest.mark.parametrize("mpp", [0.5, 0.7, 1.0, 3.3])
def test_strips_are_the_rows_of_the_whole(small_image, tmp_path, mpp):
    slide = Slide(write_pyramid(tmp_path / "one_level.tif", small_image, factors=()))
    width, height = slide.size_at(mpp)
    whole = slide.read_region(0, 0, width, height, mpp=mpp).astype(int)
    step = slide.scale(mpp)[1]
    strips = [slide.read_region(0, top * step, width, min(14, height - top), mpp=mpp) for top in range(0, height, 14)]
    assert np.abs(np.concatenate(strips) - whole).max() <= 1


def test_bands_do_not_show(small_slide, monkeypatch):
    slide = Slide(small_slide)
    expected = [slide.read_region(3, 5, 200, 150, mpp=mpp) for mpp in (0.5, 0.9, 1.3)] + [slide.thumbnail(33)]
    monkeypatch.setattr("sparsepath_vit.slides.reader._BAND_PIXELS", 5000)
    banded = [slide.read_region(3, 5, 200, 150, mpp=mpp) for mpp in (0.5, 0.9, 1.3)] + [slide.thumbnail(33)]
    for one, other in zip(expected, banded, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_region_beyond_the_edge_is_an_error_or_white_by_choice(small_slide, small_image):
    slide = Slide(small_slide)
    for x, y, width, height in [(-1, 0, 8, 8), (0, -1, 8, 8), (633, 0, 8, 8), (0, 505, 8, 8), (5000, 0, 8, 8)]:
        with pytest.raises(SlideError, match=r"is not inside .*small.tiff, which is 640 x 512.*pad=True"):
            slide.read_region(x, y, width, height)
    padded = slide.read_region(-10, 500, 660, 20, pad=True)
    assert (padded[:12, 10:650] == small_image[500:]).all()
    assert (padded[12:] == 255).all() and (padded[:, :10] == 255).all() and (padded[:, 650:] == 255).all()
    assert (slide.read_region(5000, 5000, 8, 8, mpp=1.0, pad=True) == 255).all()
    coarse = slide.read_region(560, 0, 80, 10, mpp=1.0, pad=True)
    assert (coarse[:, 42:] == 255).all() and (coarse[:, :38] == slide.read_region(560, 0, 38, 10, mpp=1.0)).all()


@pytest.mark.parametrize(("width", "height"), [(0, 8), (8, 0), (-3, 8)])
def test_empty_region_is_refused(small_slide, width, height):
    with pytest.raises(SlideError, match="is empty"):
        Slide(small_slide).read_region(0, 0, width, height)


@pytest.mark.parametrize("mpp", [0.0, -0.5, float("nan"), float("inf")])
def test_impossible_mpp_is_refused(small_slide, mpp):
    with pytest.raises(SlideError, match="mpp="):
        Slide(small_slide).read_region(0, 0, 8, 8, mpp=mpp)
    with pytest.raises(SlideError, match="micrometres per pixel"):
        Slide(small_slide, mpp=mpp)


def test_objective_power_is_not_taken_for_mpp(small_slide):
    with pytest.raises(SlideError, match="not the objective power"):
        Slide(small_slide, mpp=20)


def test_unknown_mpp_says_how_to_pass_it_and_level_0_can_still_be_read(tmp_path, small_image):
    slide = Slide(write_pyramid(tmp_path / "unstated.tiff", small_image, mpp=None))
    assert not slide.states_mpp
    assert (slide.read_region(0, 0, 640, 512) == small_image).all()
    assert slide.thumbnail(64).shape == (51, 64, 3)
    with pytest.raises(SlideError, match=r"unstated.tiff does not state its resolution.*mpp=0\.25.*--slide-mpp"):
        slide.read_region(0, 0, 8, 8, mpp=0.5)
    assert Slide(slide.path, mpp=0.25).size_at(0.5) == (320, 256)


def test_72_dpi_is_not_a_resolution(tmp_path, small_image):
    """OpenSlide reports 352.8 micrometres per pixel for such a file."""
    path = tmp_path / "dpi.tiff"
    tifffile.imwrite(path, small_image, tile=(64, 64), photometric="rgb", resolution=(72, 72), resolutionunit="INCH")
    assert not Slide(path).states_mpp


def test_passed_mpp_overrides_the_stated_one_and_says_so(small_slide, caplog):
    assert Slide(small_slide).mpp == pytest.approx(0.5)
    assert Slide(small_slide, mpp=0.25).mpp == 0.25
    assert "states 0.5 micrometres per pixel" in caplog.text and "0.25" in caplog.text


def test_unequal_mpp_gives_square_output_pixels(tmp_path):
    image = stained_image(640, 512, [(0, 0, 320, 512)])
    path = tmp_path / "oblong.tiff"
    tifffile.imwrite(
        path, image, tile=(64, 64), photometric="rgb", resolution=(1e4 / 0.25, 1e4 / 0.5), resolutionunit="CENTIMETER"
    )
    slide = Slide(path)
    assert slide.mpp_xy == pytest.approx((0.25, 0.5))
    assert slide.size_at(0.5) == (320, 512)
    means = image.reshape(512, 320, 2, 3).mean(2)
    region = slide.read_region(0, 0, 320, 512, mpp=0.5)
    assert np.abs(region - means).mean() < 12 and region[:, 170:].min() > 200 > region[:, :150].mean()


def test_mpp_that_differ_by_rounding_count_as_one(shared_slide):
    slide = Slide(shared_slide("slides/OS-1-detail.ome.tif"))
    assert slide.mpp_xy[0] == slide.mpp_xy[1] == slide.mpp
    region = slide.read_region(0, 0, 1101, 1101, mpp=slide.mpp)
    assert (region == np.asarray(Image.open(shared_slide("rois/OS-1_1101x1101.png")).convert("RGB"))).all()


@pytest.mark.parametrize("name", ["a.svs", "a.b.svs", "a.ome.tif", "A.OME.TIFF"])
def test_name_drops_the_suffix(tmp_path, small_slide, name):
    path = small_slide.rename(tmp_path / name)
    assert Slide(path).name == {"a.b.svs": "a.b", "A.OME.TIFF": "A"}.get(name, "a")


def damage(path, level, tiles=slice(None)):
    """Overwrites the compressed bytes of some tiles."""
    with tifffile.TiffFile(path) as file:
        offsets, sizes = file.pages[level].dataoffsets[tiles], file.pages[level].databytecounts[tiles]
    content = bytearray(path.read_bytes())
    for offset, size in zip(offsets, sizes, strict=True):
        content[offset : offset + size] = b"\xff" * size
    path.write_bytes(content)
    return path


def test_damaged_level_is_replaced_by_a_finer_one(tmp_path, small_image, caplog):
    slide = Slide(damage(write_pyramid(tmp_path / "damaged.tiff", small_image), 1))
    region = slide.read_region(0, 0, 160, 128, mpp=2.0)
    undamaged = Slide(write_pyramid(tmp_path / "one_level.tiff", small_image, factors=()))
    assert (region == undamaged.read_region(0, 0, 160, 128, mpp=2.0)).all()
    assert "level 1 is damaged" in caplog.text
    assert (slide.read_region(0, 0, 640, 512) == small_image).all()


def test_damage_in_one_place_does_not_change_what_is_read_elsewhere(tmp_path, small_image):
    """Regions after a damaged one used to come from a finer level: their pixels depended on the order of reading."""
    whole = Slide(write_pyramid(tmp_path / "whole.tiff", small_image))
    slide = Slide(damage(write_pyramid(tmp_path / "damaged.tiff", small_image), 1, slice(1)))
    elsewhere = (256, 256, 96, 64, 2.0)
    slide.read_region(0, 0, 64, 64, 2.0)
    assert (slide.read_region(*elsewhere) == whole.read_region(*elsewhere)).all()


def test_threads_do_not_suffer_from_the_damage_that_another_meets(tmp_path, small_image):
    """OpenSlide refuses every read of a handle after a failed one: undamaged regions came from a finer level too."""
    whole = Slide(write_pyramid(tmp_path / "whole.tiff", small_image))
    slide = Slide(damage(write_pyramid(tmp_path / "damaged.tiff", small_image), 1, slice(1)))
    places = [(0, 0, 32, 32, 2.0), (256, 256, 96, 64, 2.0)] * 40
    with ThreadPoolExecutor(8) as pool:
        regions = list(pool.map(lambda place: slide.read_region(*place), places))
    expected = whole.read_region(*places[1])
    assert all((region == expected).all() for region in regions[1::2])
    assert all((region == regions[0]).all() for region in regions[::2])


def test_damaged_pixels_name_the_slide_and_do_not_spoil_the_next_read(tmp_path, small_image):
    """OpenSlide refuses every read of a handle after the first failed one."""
    slide = Slide(damage(write_pyramid(tmp_path / "damaged.tiff", small_image, factors=()), 0, slice(1)))
    with pytest.raises(SlideError, match=r"damaged.tiff: pixels of the region at x=0, y=0.*copy it again"):
        slide.read_region(0, 0, 64, 64)
    assert (slide.read_region(64, 64, 576, 448) == small_image[64:, 64:]).all()


def test_closed_slide_opens_again(small_slide, small_image):
    with Slide(small_slide) as slide:
        pass
    assert slide._handle is None
    assert (slide.read_region(0, 0, 640, 512) == small_image).all()


def test_pickle_drops_the_handle_and_keeps_the_mpp(small_slide):
    slide = pickle.loads(pickle.dumps(Slide(small_slide, mpp=0.25)))
    assert slide._handle is None
    assert slide.mpp == 0.25 and slide.dimensions == (640, 512)


class Regions(torch.utils.data.Dataset):
    def __init__(self, slide):
        self.slide = slide

    def __len__(self):
        return 10

    def __getitem__(self, index):
        region = self.slide.read_region(index * 64, 0, 64, 512)
        return torch.from_numpy(region), os.getpid(), self.slide._process


@pytest.mark.parametrize("kind", ["OpenSlide", "tifffile"])
def test_forked_dataloader_workers_open_their_own_handle(tmp_path, small_image, kind):
    path = tmp_path / "slide.tiff"
    if kind == "OpenSlide":
        write_pyramid(path, small_image)
    else:
        tifffile.imwrite(path, small_image, rowsperstrip=16, photometric="rgb", compression="deflate")
    slide = Slide(path)
    slide.read_region(0, 0, 64, 64)
    loader = torch.utils.data.DataLoader(Regions(slide), batch_size=None, num_workers=2, multiprocessing_context="fork")
    processes = set()
    for index, (region, process, opened_by) in enumerate(loader):
        assert (region.numpy() == small_image[:, index * 64 : index * 64 + 64]).all()
        assert process == opened_by != os.getpid()
        processes.add(process)
    assert len(processes) == 2
    assert (slide.read_region(0, 0, 640, 512) == small_image).all()


def test_threads_share_one_slide(tmp_path, small_image):
    path = tmp_path / "strips.tif"
    tifffile.imwrite(path, small_image, rowsperstrip=8, photometric="rgb", compression="deflate")
    slide = Slide(path)
    with ThreadPoolExecutor(4) as pool:
        regions = list(pool.map(lambda y: slide.read_region(0, y, 640, 8), range(0, 504, 3)))
    assert all((region == small_image[y : y + 8]).all() for y, region in zip(range(0, 504, 3), regions, strict=True))
