# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import builtins
import importlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from sparsepath_vit.slides import SlideError
from sparsepath_vit.slides.backends import OpenSlideBackend, PillowBackend, TifffileBackend, open_backend

CACHE = 2**20


def whole(backend, level=0):
    return backend.read(level, 0, 0, *backend.level_dimensions[level])


@pytest.mark.parametrize("tile", [None, (64, 48)], ids=["strips", "tiles"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("compression", [None, "deflate"])
def test_tifffile_backend_reads_every_rectangle_exactly(tmp_path, small_image, tile, planar, compression):
    image = small_image[:301, :203]
    stored = np.moveaxis(image, -1, 0) if planar == "separate" else image
    path = tmp_path / "image.tif"
    layout = {"tile": tile} if tile else {"rowsperstrip": 37}
    tifffile.imwrite(path, stored, photometric="rgb", planarconfig=planar, compression=compression, **layout)
    backend = TifffileBackend(path, CACHE)
    assert (whole(backend) == image).all()
    for x, y, width, height in [(0, 0, 1, 1), (202, 300, 1, 1), (47, 63, 2, 2), (10, 40, 150, 200), (48, 64, 48, 64)]:
        assert (backend.read(0, x, y, width, height) == image[y : y + height, x : x + width]).all()


def test_tifffile_backend_keeps_at_most_its_cache_of_decoded_tiles(small_slide):
    backend = TifffileBackend(small_slide, cache_bytes=5 * 64 * 64 * 3)
    before = whole(backend)
    held = sum(tile.nbytes for tile in backend._cache.values())
    assert held == backend._cached_bytes == 5 * 64 * 64 * 3
    assert (whole(backend) == before).all()


def test_tile_that_was_never_written_is_white(tmp_path, small_image):
    path = tmp_path / "sparse.tif"
    tiles = (tile for tile in (small_image[96:160, 64:128], None))
    tifffile.imwrite(
        path, tiles, shape=(64, 128, 3), dtype=np.uint8, tile=(64, 64), compression="deflate", photometric="rgb"
    )
    backend = TifffileBackend(path, CACHE)
    assert (whole(backend)[:, :64] == small_image[96:160, 64:128]).all()
    assert (whole(backend)[:, 64:] == 255).all()


def test_transparent_pixels_become_white_and_opaque_ones_stay(tmp_path, small_image):
    alpha = np.full((*small_image.shape[:2], 1), 255, dtype=np.uint8)
    alpha[:, :100] = 0
    rgba = np.concatenate([small_image, alpha], axis=-1)
    Image.fromarray(rgba).save(tmp_path / "image.png")
    tifffile.imwrite(tmp_path / "image.tif", rgba, photometric="rgb", extrasamples="unassalpha", tile=(64, 64))
    for backend in (PillowBackend(tmp_path / "image.png", CACHE), TifffileBackend(tmp_path / "image.tif", CACHE)):
        assert (whole(backend)[:, :100] == 255).all()
        assert (whole(backend)[:, 100:] == small_image[:, 100:]).all()


def test_grey_and_palette_images_become_rgb(tmp_path, small_image):
    grey = small_image[..., 1]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    tifffile.imwrite(tmp_path / "grey.tif", grey, tile=(64, 64), photometric="minisblack")
    for path in (tmp_path / "grey.png", tmp_path / "grey.tif"):
        assert (whole(open_backend(path, CACHE)) == grey[..., None]).all()
    flat = Image.fromarray(np.where(small_image > 200, 255, 0).astype(np.uint8))
    flat.convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.tif")
    assert (whole(open_backend(tmp_path / "palette.tif", CACHE)) == np.asarray(flat)).all()


def test_rotated_jpeg_is_read_as_viewers_show_it(tmp_path, small_image):
    image = Image.fromarray(small_image)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    backend = open_backend(tmp_path / "turned.png", CACHE)
    assert backend.level_dimensions == ((512, 640),)
    assert (whole(backend) == np.rot90(small_image, -1)).all()


def test_ome_tiff_pyramid_in_subifds_is_not_lost(tmp_path, small_image):
    """OpenSlide opens such a file as a generic TIFF and sees level 0 alone."""
    path = tmp_path / "pyramid.ome.tif"
    options = {"tile": (64, 64), "photometric": "rgb", "compression": "deflate"}
    size = {"PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        tiff.write(small_image, subifds=1, metadata={"axes": "YXS", **size}, **options)
        tiff.write(small_image[::2, ::2], subfiletype=1, **options)
    backend = open_backend(path, CACHE)
    assert backend.level_dimensions == ((640, 512), (320, 256))
    assert backend.stated_mpp == pytest.approx((0.25, 0.25))
    assert (whole(backend, 1) == small_image[::2, ::2]).all()


@pytest.mark.parametrize(
    ("array", "options", "word"),
    [
        (np.zeros((64, 64, 3), np.uint16), {"photometric": "rgb"}, "uint16"),
        (np.zeros((4, 64, 64), np.uint8), {"photometric": "minisblack", "metadata": {"axes": "CYX"}}, "axes"),
    ],
    ids=["16-bit", "fluorescence"],
)
def test_what_is_no_bright_field_image_is_refused_by_name(tmp_path, array, options, word):
    path = tmp_path / "image.ome.tif"
    tifffile.imwrite(path, array, **options)
    with pytest.raises(SlideError, match=word):
        open_backend(path, CACHE)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.svs", b"", "is empty"),
        ("notes.svs", b"these are only notes on a slide", "cannot be read as a slide"),
        ("header.tif", b"II*\x00\x08\x00\x00\x00", "cannot be read as a slide"),
        ("image.png", b"\x89PNG\r\n\x1a\n", "cannot be read as a slide"),
    ],
)
def test_file_that_is_no_slide_is_refused_with_its_path(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SlideError, match=words) as raised:
        open_backend(path, CACHE)
    assert str(path) in str(raised.value) and "copy it again" in str(raised.value)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("kind", ["pyramid", "one level, header first"])
def test_slide_cut_short_is_refused_when_opened_or_read(small_slide, small_image, share, kind):
    """tifffile opens such a file silently and shows the levels that are left."""
    if kind != "pyramid":
        tifffile.imwrite(small_slide, small_image, rowsperstrip=16, photometric="rgb", compression="deflate")
    content = small_slide.read_bytes()
    small_slide.write_bytes(content[: int(share * len(content))])
    with pytest.raises(SlideError):
        whole(open_backend(small_slide, CACHE))


def test_tile_with_damaged_bytes_is_named(tmp_path, small_image):
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, small_image, rowsperstrip=16, photometric="rgb", compression="deflate")
    with tifffile.TiffFile(path) as file:
        offset = file.pages[0].dataoffsets[7]
    content = bytearray(path.read_bytes())
    content[offset : offset + 40] = bytes(40)
    path.write_bytes(content)
    backend = open_backend(path, CACHE)
    assert (backend.read(0, 0, 0, 640, 16) == small_image[:16]).all()
    with pytest.raises(SlideError, match="tile 7 cannot be decoded"):
        whole(backend)


def test_missing_file_and_folder_say_so(tmp_path):
    with pytest.raises(SlideError, match="does not exist"):
        open_backend(tmp_path / "none.svs", CACHE)
    with pytest.raises(SlideError, match="is a folder"):
        open_backend(tmp_path, CACHE)


def test_file_without_read_permission_says_so(small_slide, monkeypatch):
    def refuse(path, *arguments, **keywords):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(SlideError, match=r"may not be read by this user.*chmod"):
        open_backend(small_slide, CACHE)


@pytest.mark.parametrize("failure", [ModuleNotFoundError("No module named 'openslide'"), OSError("libopenslide.so.1")])
def test_missing_openslide_gives_the_install_command(small_slide, tmp_path, small_image, monkeypatch, failure):
    import_module = importlib.import_module

    def without_openslide(name, *arguments):
        if name == "openslide":
            raise failure
        return import_module(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", without_openslide)
    with pytest.raises(ImportError, match=r'pip install "sparsepath-vit\[slides\]"'):
        open_backend(small_slide, CACHE)
    Image.fromarray(small_image).save(tmp_path / "plain.png")
    assert (whole(open_backend(tmp_path / "plain.png", CACHE)) == small_image).all()


def test_png_dots_per_inch_are_believed_only_where_credible(tmp_path, small_image):
    for dpi, expected in [(72, None), (300, None), (50800, pytest.approx((0.5, 0.5), rel=1e-3))]:
        Image.fromarray(small_image).save(tmp_path / "image.png", dpi=(dpi, dpi))
        assert PillowBackend(tmp_path / "image.png", CACHE).stated_mpp == expected


def test_real_slides_open_with_the_expected_backend(shared_slide):
    expected = {
        "slides/CMU-1-Small-Region.svs": (OpenSlideBackend, (0.499, 0.499)),
        "slides/CMU-1_panda_layout.tiff": (OpenSlideBackend, (0.499, 0.499)),
        "slides/TCGA-CR-7395-TS1_x0-2047.svs": (OpenSlideBackend, None),
        "slides/OS-1-detail.ome.tif": (TifffileBackend, pytest.approx((0.2271, 0.2271), rel=1e-3)),
        "rois/OS-1_1101x1101.png": (PillowBackend, None),
    }
    for name, (kind, mpp) in expected.items():
        backend = open_backend(shared_slide(name), CACHE)
        assert isinstance(backend, kind) and backend.stated_mpp == mpp


def test_real_ome_tiff_has_the_pixels_of_its_png_copy(shared_slide):
    slide = TifffileBackend(shared_slide("slides/OS-1-detail.ome.tif"), CACHE)
    copy = PillowBackend(shared_slide("rois/OS-1_1101x1101.png"), CACHE)
    assert (whole(slide) == whole(copy)).all()


def test_tifffile_decodes_real_jpeg_tiles_as_openslide_does(shared_slide):
    path = shared_slide("slides/CMU-1_panda_layout.tiff")
    difference = whole(TifffileBackend(path, CACHE)).astype(int) - whole(OpenSlideBackend(path, CACHE))
    assert np.abs(difference).max() <= 2
