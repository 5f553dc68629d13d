# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Kinds of files that one decoder or another turns into something else: right, or refused by name."""

import logging
import os

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image
from slide_files import write_ome_parts, write_pyramid

from sparsepath_vit.model.image_inputs import load_rgb
from sparsepath_vit.slides import Slide, SlideError, describe
from sparsepath_vit.slides.backends import OpenSlideBackend, TifffileBackend, open_backend
from sparsepath_vit.slides.errors import UnsupportedSlideError
from sparsepath_vit.slides.samples import YCbCr, ycbcr_to_rgb

HEIGHT, WIDTH, TILE = 150, 203, 64
LAYOUTS = {"strips": {"rowsperstrip": 37}, "tiles": {"tile": (TILE, TILE)}}
LOSSLESS = [None, "deflate", "lzw", "packbits", "zstd", "lzma", "png"]
SCAN = {"PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "µm"}


@pytest.fixture
def rgb():
    """(HEIGHT, WIDTH, 3) uint8, smooth, so that lossy codecs stay near, with every value somewhere."""
    rows, columns = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([rows * 255 // HEIGHT, columns * 255 // WIDTH, (rows + columns) % 256], -1).astype(np.uint8)


def whole(backend):
    return backend.read(0, 0, 0, *backend.level_dimensions[0])


def readings(path):
    """What each backend that takes the file reads; the two together must cover it."""
    found = {}
    for backend in (OpenSlideBackend, TifffileBackend):
        try:
            found[backend.name] = whole(backend(path, 2**20)).astype(int)
        except UnsupportedSlideError:
            continue
    assert found
    found["chosen"] = whole(open_backend(path, 2**20)).astype(int)
    return found


def on_white(rgb, alpha):
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


def colour_spaces(rgb):
    """Name -> (stored, options of tifffile, expected, tolerance)."""
    gray, alpha = rgb[..., 1], np.tile(np.arange(WIDTH, dtype=np.uint8), (HEIGHT, 1))
    premultiplied = np.rint(rgb * (alpha[..., None] / 255)).astype(np.uint8)
    expected_alpha = on_white(rgb, alpha)
    four = np.concatenate([rgb[..., :3], rgb[..., :1] // 2], -1)
    cmyk = np.asarray(Image.fromarray(four, "CMYK").convert("RGB"))
    ycbcr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
    colormap = np.random.default_rng(0).integers(0, 65536, (3, 256), dtype=np.uint16)
    return {
        "RGB": (rgb, {"photometric": "rgb"}, rgb, 0),
        "gray": (gray, {"photometric": "minisblack"}, np.repeat(gray[..., None], 3, -1), 0),
        "white is zero": (255 - gray, {"photometric": "miniswhite"}, np.repeat(gray[..., None], 3, -1), 0),
        "palette": (gray, {"photometric": "palette", "colormap": colormap}, (colormap >> 8).T[gray], 0),
        "CMYK": (four, {"photometric": "separated"}, cmyk, 0),
        "YCbCr": (ycbcr, {"photometric": "ycbcr", "subsampling": (1, 1)}, rgb, 3),
        "straight alpha": (
            np.concatenate([rgb, alpha[..., None]], -1),
            {"photometric": "rgb", "extrasamples": ["unassalpha"]}, expected_alpha, 1,
        ),
        "premultiplied": (
            np.concatenate([premultiplied, alpha[..., None]], -1),
            {"photometric": "rgb", "extrasamples": ["assocalpha"]}, expected_alpha, 1.01,
        ),
        "12 bits stated": (
            np.rint(rgb * (4095 / 255)).astype(np.uint16),
            {"photometric": "rgb", "extratags": [(280, 3, 3, (0,) * 3, True), (281, 3, 3, (4095,) * 3, True)]}, rgb, 0,
        ),
        "float stated": (
            (rgb / 255).astype(np.float32),
            {"photometric": "rgb", "extratags": [(340, 11, 3, (0.0,) * 3, True), (341, 11, 3, (1.0,) * 3, True)]},
            rgb, 0,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compression", LOSSLESS)
def test_every_colour_space_is_read_rightly_by_whoever_reads_it(tmp_path, rgb, compression, layout):
    for name, (stored, options, expected, tolerance) in colour_spaces(rgb).items():
        if compression == "png" and (stored.dtype == np.float32 or name in ("YCbCr", "CMYK")):
            continue  # no such PNG
        path = tmp_path / "image.tif"
        tifffile.imwrite(path, stored, compression=compression, metadata=None, **LAYOUTS[layout], **options)
        found = readings(path)
        for reader, pixels in found.items():
            assert np.abs(pixels - expected).max() <= tolerance, (name, reader)
            assert (pixels == found["chosen"]).all(), (name, reader)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_that_of_the_image_processor(tmp_path, rgb, orientation, planar, layout):
    stored = np.moveaxis(rgb, -1, 0) if planar == "separate" else rgb
    path = tmp_path / "image.tif"
    resolution = {"resolution": (1e4 / 0.25, 1e4 / 0.5), "resolutionunit": "CENTIMETER"}
    tags = [(274, 3, 1, orientation, True)]
    tifffile.imwrite(
        path, stored, photometric="rgb", planarconfig=planar, extratags=tags, metadata=None,
        **LAYOUTS[layout], **resolution,
    )  # fmt: skip
    turned = [
        rgb, rgb[:, ::-1], rgb[::-1, ::-1], rgb[::-1], rgb.swapaxes(0, 1), np.rot90(rgb, -1),
        rgb[::-1, ::-1].swapaxes(0, 1), np.rot90(rgb),
    ][orientation - 1]  # fmt: skip
    for reader, pixels in readings(path).items():
        assert pixels.shape == turned.shape and (pixels == turned).all(), reader
    if planar == "contig":
        np.testing.assert_array_equal(load_rgb(path, "image", 2**28).permute(1, 2, 0).numpy(), turned)
    with Slide(path) as slide:
        assert slide.mpp_xy == pytest.approx((0.5, 0.25) if orientation >= 5 else (0.25, 0.5))
        part = slide.read_region(31, 17, 90, 101)
        assert (part == turned[17:118, 31:121]).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("compression", "options"),
    [
        ("jpeg", {"subsampling": (1, 1)}),
        ("jpeg", {"subsampling": (2, 1)}),
        ("jpeg", {"subsampling": (2, 2)}),
        ("jpeg", {"compressionargs": {"outcolorspace": "rgb"}}),
        ("webp", {}),
        ("jpegxl", {}),
        ("jpeg2000", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(str(part) for part in value.values()),
)
def test_codecs_of_pictures(tmp_path, rgb, compression, options, layout):
    path = tmp_path / "image.tif"
    layout = {"rowsperstrip": 48} if layout == "strips" else LAYOUTS[layout]  # whole blocks of subsampled chroma
    tifffile.imwrite(path, rgb, photometric="rgb", compression=compression, metadata=None, **layout, **options)
    found = readings(path)
    for reader, pixels in found.items():
        assert np.abs(pixels - rgb).mean() < 6, reader
        assert np.abs(pixels - found["chosen"]).max() <= 2, reader


@pytest.mark.parametrize("transforms", [False, True], ids=["plain", "transformed by the codec"])
def test_jpeg_2000_of_luma_and_chroma_is_converted_once(tmp_path, rgb, transforms):
    """Aperio's code 33003 with the scanner's text removed: the tags say RGB, the samples are luma and chroma."""
    image = rgb[:TILE, :TILE] if transforms else np.asarray(Image.fromarray(rgb[:TILE, :TILE]).convert("YCbCr"))
    tile = imagecodecs.jpeg2k_encode(np.ascontiguousarray(image), level=0, mct=transforms, codecformat="J2K")
    path = tmp_path / "image.svs"
    tifffile.imwrite(
        path, iter([tile]), shape=(TILE, TILE, 3), dtype=np.uint8, tile=(TILE, TILE), photometric="rgb",
        compression=33003, metadata=None,
    )  # fmt: skip
    assert np.abs(whole(open_backend(path, 2**20)).astype(int) - rgb[:TILE, :TILE]).max() <= 3


def test_own_coefficients_and_reference_of_luma_and_chroma_count():
    """Studio range and BT.709: black is 16, white 235."""
    meaning = YCbCr((0.2126, 0.7152, 0.0722), (16, 235, 128, 240, 128, 240))
    pixels = np.uint8([[[16, 128, 128], [235, 128, 128], [63, 102, 240]]])
    np.testing.assert_allclose(ycbcr_to_rgb(pixels, meaning)[0], [[0] * 3, [255] * 3, [255, 0, 0]], atol=4)


@pytest.mark.parametrize("layout", [{}, {"tile": (TILE, TILE)}], ids=["strips", "tiles"])
@pytest.mark.parametrize(("names", "is_rgb"), [(["Red", "Green", "Blue"], True), (["DAPI", "CD3", "CD8"], False)])
def test_one_page_for_each_channel(tmp_path, rgb, layout, names, is_rgb):
    planes = np.ascontiguousarray(np.moveaxis(rgb, -1, 0))
    path = tmp_path / "channels.ome.tif"
    metadata = {"axes": "CYX", "Channel": {"Name": names}, **SCAN}
    tifffile.imwrite(path, planes, photometric="minisblack", metadata=metadata, ome=True, **layout)
    if is_rgb:
        with Slide(path) as slide:
            assert (slide.read_region(0, 0, WIDTH, HEIGHT) == rgb).all() and slide.mpp == 0.25
    else:
        with pytest.raises(SlideError, match=r"3 channels.*export a single plane"):
            Slide(path)
    with pytest.raises(ValueError, match="another page of the same size"):
        load_rgb(path, "image 0", 2**28)


def write_images(path, images):
    with tifffile.TiffWriter(path, ome=True) as file:
        for pixels, name, mpp in images:
            size = {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp} if mpp else {}
            file.write(pixels, photometric="rgb", tile=(TILE, TILE), metadata={"axes": "YXS", "Name": name, **size})
    return path


@pytest.mark.parametrize("name", ["macro", "label", "Series 1"])
def test_the_slide_is_chosen_among_the_images_of_a_file(tmp_path, rgb, name):
    scan = np.tile(rgb, (2, 2, 1))
    path = write_images(tmp_path / "a.ome.tif", [(rgb[:70, :70], name, 4.0), (scan, "scan", 0.25)])
    with Slide(path) as slide:
        assert slide.dimensions == (2 * WIDTH, 2 * HEIGHT) and slide.mpp == 0.25
        assert (slide.read_region(0, 0, *slide.dimensions) == scan).all()
    with pytest.raises(ValueError, match=f"another page of {2 * WIDTH} x {2 * HEIGHT} pixels.*slides.Slide"):
        load_rgb(path, "image 0", 2**28)


def test_a_macro_with_more_pixels_than_the_scan_is_not_the_slide(tmp_path, rgb):
    path = write_images(tmp_path / "a.ome.tif", [(rgb, "macro image", 4.0), (rgb[:90, :90], "", 0.25)])
    with Slide(path) as slide:
        assert slide.dimensions == (90, 90) and slide.mpp == 0.25
    path = write_images(tmp_path / "b.ome.tif", [(rgb, "first", 4.0), (rgb[:90, :90], "second", 0.25)])
    with pytest.raises(SlideError, match=r"cannot be told.*'first', 203 x 150.*'second', 90 x 90.*export one"):
        Slide(path)


def test_planes_in_several_files_are_read_from_these(tmp_path, rgb):
    """The first file's bytes were taken for all three colours."""
    parts = write_ome_parts(tmp_path, rgb)
    for path in parts:
        assert whole(open_backend(path, 2**20)).tolist() == rgb.tolist()
        assert set(describe(path).parts) == {part.name for part in parts} - {path.name}
    other = parts[2].read_bytes()
    parts[2].write_bytes(other[: len(other) // 2])
    with pytest.raises(SlideError, match="ends"):
        Slide(parts[0])
    parts[2].unlink()
    with pytest.raises(UnsupportedSlideError, match="not beside it: put them there"):
        Slide(parts[0])


def test_planes_that_are_stored_otherwise_or_elsewhere_are_refused(tmp_path, rgb):
    first, _, third = write_ome_parts(tmp_path, rgb)
    with tifffile.TiffFile(third) as file:
        description = file.ome_metadata.encode()
    options = {"photometric": "minisblack", "metadata": None, "description": description}
    tifffile.imwrite(third, rgb[..., 2], tile=(32, 32), **options)
    with pytest.raises(UnsupportedSlideError, match="not stored alike"):
        Slide(first)
    inner = tmp_path / "inner"
    inner.mkdir()
    first, *_ = write_ome_parts(inner, rgb, names=("a_R.ome.tif", "../a_G.ome.tif", "../a_B.ome.tif"))
    with pytest.raises(UnsupportedSlideError, match="names a file outside its folder"):
        Slide(first)
    only_planes = tmp_path / "planes.ome.tif"
    description = b'<OME><BinaryOnly MetadataFile="a.companion.ome" UUID="urn:uuid:1"/></OME>'
    tifffile.imwrite(only_planes, rgb[..., 0], photometric="minisblack", metadata=None, description=description)
    with pytest.raises(UnsupportedSlideError, match=r"only holds planes of an image that a\.companion\.ome describes"):
        Slide(only_planes)


def test_a_pyramid_in_another_file_than_its_description(tmp_path, rgb):
    """The scan is the second image and lies with its levels in b; a has the description and the macro."""
    image = """<Image ID="Image:{n}" Name="{name}"><Pixels ID="Pixels:{n}" DimensionOrder="XYCZT" Type="uint8"
        SizeX="{width}" SizeY="{height}" SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="0.5" PhysicalSizeY="0.5">
        <Channel ID="Channel:{n}:0" SamplesPerPixel="3"/>
        <TiffData IFD="0" PlaneCount="1"><UUID FileName="{file}">urn:uuid:{n}</UUID></TiffData></Pixels></Image>"""
    images = [("macro", 40, 30, "a.ome.tif"), ("scan", rgb.shape[1], rgb.shape[0], "b.ome.tif")]
    listed = "".join(
        image.format(n=number, name=name, width=width, height=height, file=file)
        for number, (name, width, height, file) in enumerate(images)
    )
    tile = {"tile": (32, 32), "photometric": "rgb", "metadata": None}
    for number, file in enumerate(("a.ome.tif", "b.ome.tif")):
        description = f'<OME UUID="urn:uuid:{number}">{listed}</OME>'.encode()
        with tifffile.TiffWriter(tmp_path / file) as tiff:
            if number == 0:
                tiff.write(rgb[:30, :40], description=description, **tile)
                continue
            tiff.write(rgb, description=description, subifds=1, **tile)
            tiff.write(rgb[::2, ::2], subfiletype=1, **tile)
    for file in ("a.ome.tif", "b.ome.tif"):
        backend = open_backend(tmp_path / file, 2**20)
        assert backend.level_dimensions == (rgb.shape[1::-1], rgb[::2, ::2].shape[1::-1])
        assert whole(backend).tolist() == rgb.tolist() and Slide(tmp_path / file).mpp == 0.5
        assert backend.read(1, 0, 0, *backend.level_dimensions[1]).tolist() == rgb[::2, ::2].tolist()


def test_a_format_without_a_reader_is_not_called_damaged(tmp_path):
    path = tmp_path / "slide.dzi"
    path.write_text('<?xml version="1.0"?><Image Format="jpeg" TileSize="254"/>')
    with pytest.raises(UnsupportedSlideError, match="not supported here, because Deep Zoom"):
        Slide(path)


@pytest.mark.parametrize(
    "said, is_sound",
    [
        ("Reading a.dcm: Unsupported transfer syntax 1.2.840.10008.1.2.4.201", True),
        ('Unrecognized subblock dimension "Z"', True),
        ("Unsupported TIFF compression: 34712", True),
        ("Slides with dissimilar main images are not supported", True),
        ("Unsupported marker type 0x51", False),
    ],
)
def test_what_openslide_lacks_is_no_damage(tmp_path, monkeypatch, rgb, said, is_sound):
    path = write_pyramid(tmp_path / "a.tiff", rgb)

    def refuse(path):
        raise openslide.OpenSlideError(said)

    description = describe(path)
    monkeypatch.setattr("openslide.OpenSlide", refuse)
    with pytest.raises(SlideError) as error:
        OpenSlideBackend(path, 2**20, description)
    assert isinstance(error.value, UnsupportedSlideError) == is_sound


def test_a_file_whose_writer_stopped_before_the_first_tile_is_no_white_slide(tmp_path, rgb):
    path = write_pyramid(tmp_path / "a.tiff", rgb)
    with tifffile.TiffFile(path, mode="r+b") as file:
        for name in ("TileOffsets", "TileByteCounts"):
            tag = file.pages[0].tags[name]
            tag.overwrite([0] * tag.count)
    with pytest.raises(SlideError, match="level 0 holds no tile or strip"):
        Slide(path)


def test_the_image_processor_says_which_codec_pillow_lacks(tmp_path, rgb, monkeypatch):
    path = tmp_path / "a.tiff"
    tifffile.imwrite(path, rgb, compression="webp", tile=(64, 64), photometric="rgb")

    def lacks_the_codec(image):
        raise OSError("decoder error -2")

    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", lacks_the_codec)
    with pytest.raises(OSError, match=r"may be without webp compression.*sparsepath_vit\.slides\.Slide"):
        load_rgb(path, path.name, 2**28, None)
    assert Slide(path).read_region(0, 0, WIDTH, HEIGHT).shape == (HEIGHT, WIDTH, 3)


def test_two_scans_of_a_file_are_named(tmp_path, rgb, caplog):
    path = write_images(tmp_path / "a.ome.tif", [(rgb[:120], "first", 0.25), (rgb, "second", 0.25)])
    with Slide(path) as slide:
        assert slide.dimensions == (WIDTH, HEIGHT)
    assert "'second', 203 x 150" in caplog.text and "'first', 203 x 120" in caplog.text


@pytest.mark.parametrize(
    ("stored", "options", "words"),
    [
        (np.full((96, 96, 3), 2000, np.uint16), {"photometric": "rgb"}, "uint16.*which value is white"),
        (np.full((96, 96), 2000, np.uint16), {"photometric": "minisblack"}, "uint16.*which value is white"),
        (np.full((96, 96, 3), 5, np.int16), {"photometric": "rgb"}, "int16"),
        (np.full((96, 96, 3), 0.5, np.float32), {"photometric": "rgb"}, "float32.*which value is white"),
        (np.full((96, 96, 3), 9, np.uint8), {"photometric": "cielab"}, "CIELAB"),
        (np.full((96, 96, 3), 9, np.uint8), {"photometric": "icclab"}, "ICCLAB"),
        (np.full((96, 96, 3), 9, np.uint8), {"photometric": "minisblack", "planarconfig": "contig"}, "3 channels"),
        (np.full((96, 96, 5), 9, np.uint8), {"photometric": "rgb", "extrasamples": [0, 0]}, "5 channels"),
        (np.full((4, 96, 96, 3), 9, np.uint8), {"photometric": "rgb"}, "axes are .YXS.*4 images"),
        (np.full((4, 96, 96), 9, np.uint8), {"photometric": "minisblack"}, "axes are .YX.*4 images"),
        (np.full((96, 96, 4), 9, np.uint8), {"photometric": "rgb", "extrasamples": [0]}, "ExtraSamples"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", [{}, {"tile": (TILE, TILE)}], ids=["strips", "tiles"])
def test_what_has_no_one_right_meaning_is_refused_and_not_called_damaged(tmp_path, stored, options, words, layout):
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, stored, metadata=None, **options, **layout)
    expected = f"image.tif is not supported here, because it.*{words}"
    with pytest.raises(UnsupportedSlideError, match=expected) as raised, Slide(path) as slide:
        slide.read_region(0, 0, 50, 50)
    assert "damaged" not in str(raised.value)
    with pytest.raises((ValueError, OSError)):
        load_rgb(path, "image 0", 2**28)


def test_an_opaque_fourth_channel_needs_no_name(tmp_path, rgb):
    path = tmp_path / "image.tif"
    stored = np.concatenate([rgb, np.full_like(rgb[..., :1], 255)], -1)
    tifffile.imwrite(path, stored, photometric="rgb", extrasamples=[0], tile=(TILE, TILE), metadata=None)
    with Slide(path) as slide:
        assert (slide.read_region(0, 0, WIDTH, HEIGHT) == rgb).all()


@pytest.mark.parametrize("reader", ["slide", "processor"])
@pytest.mark.parametrize(("bits", "is_refused"), [(10, True), (12, True), (16, False)])
def test_16_bit_png(tmp_path, rgb, bits, is_refused, reader):
    deep = np.rint(rgb * ((2**bits - 1) / 255)).astype(np.uint16)
    path = tmp_path / "image.png"
    path.write_bytes(imagecodecs.png_encode(deep))

    def read():
        if reader == "processor":
            return load_rgb(path, "image 0", 2**28).permute(1, 2, 0).numpy()
        with Slide(path) as slide:
            return slide.read_region(0, 0, WIDTH, HEIGHT)

    if is_refused:
        with pytest.raises(ValueError, match="16-bit samples, none of them in the upper three quarters"):
            read()
    else:
        assert np.abs(read().astype(int) - rgb).max() <= 1


def test_a_plain_image_over_pillows_limit_is_sound(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("RGB", (300, 200), (230, 200, 220)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with Slide(path) as slide:
        assert (slide.read_region(10, 10, 20, 20) == (230, 200, 220)).all()
    monkeypatch.setattr("sparsepath_vit.slides.plain_images._MOST_PIXELS", 59_999)
    with pytest.raises(SlideError, match=r"is not supported here, because it is 300 x 200 pixels.*tiled TIFF"):
        Slide(path)


def test_animations_and_other_stacks_of_pictures_are_refused(tmp_path, rgb):
    frames = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    for suffix in ("png", "webp"):
        path = tmp_path / f"moving.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        for read in (Slide, lambda path: load_rgb(path, "image 0", 2**28)):
            with pytest.raises(ValueError, match="holds 2 pictures of equal rank"):
                read(path)


def test_the_picture_of_a_mirax_slide_is_not_the_slide(tmp_path, rgb):
    path = tmp_path / "slide.mrxs"
    Image.fromarray(rgb).save(path, format="JPEG")
    with pytest.raises(SlideError, match="first of many files"):
        Slide(path)


@pytest.mark.parametrize("mode", ["CMYK", "L", "P"])
def test_plain_images_follow_the_image_processor(tmp_path, rgb, mode):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    Image.fromarray(rgb).convert(mode).save(path)
    with Slide(path) as slide:
        pixels = slide.read_region(0, 0, WIDTH, HEIGHT)
    np.testing.assert_array_equal(pixels, load_rgb(path, "image 0", 2**28).permute(1, 2, 0).numpy())


def test_a_slide_asked_for_finer_than_it_is_is_named_once(tmp_path, rgb, caplog):
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, rgb, photometric="rgb", resolution=(1e4, 1e4), resolutionunit="CENTIMETER", metadata=None)
    slide = Slide(path)
    for mpp in (1.0, 1.05, 2.0, 0.95):
        slide.scale(mpp)
    assert not caplog.records and slide.enlargement(0.5) == pytest.approx(2)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        slide.read_region(0, 0, 100, 100, mpp=0.25)
        slide.read_region(9, 0, 100, 100, mpp=0.25)
    assert len(caplog.records) == 1
    assert "image.tif is asked for at 0.25 micrometres per pixel and has 1 itself: it is enlarged 4" in caplog.text


def test_a_contradiction_along_y_alone_is_named(tmp_path, rgb, caplog):
    path = tmp_path / "oblong.tif"
    resolution = {"resolution": (1e4 / 0.25, 1e4 / 0.5), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, rgb, photometric="rgb", metadata=None, **resolution)
    assert Slide(path, mpp=0.25).mpp == 0.25
    assert "states 0.25 micrometres per pixel (along y 0.5)" in caplog.text


def test_imagej_states_its_own_unit(tmp_path, rgb):
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, rgb, imagej=True, resolution=(4, 4), metadata={"unit": "um", "axes": "YXS"})
    assert describe(path).resolution.source == "ImageJ metadata"
    assert Slide(path).mpp == 0.25


def test_description_of_real_slides(shared_slide):
    found = describe(shared_slide("slides/CMU-1-Small-Region.svs"))
    assert (found.vendor, found.readers[0], found.levels) == ("aperio", "OpenSlide", ((2220, 2967),))
    assert found.resolution.mpp == (0.499, 0.499) and found.objective_power == "20"
    assert (found.codec, found.samples.bits, found.samples.photometric, found.tiled) == ("JPEG", 8, "RGB", True)
    found = describe(shared_slide("slides/OS-1-detail.ome.tif"))
    assert (found.format, found.readers) == ("OME-TIFF", ("tifffile",))
    assert found.resolution.source == "OME-XML" and found.refusal is None


def test_description_says_why_a_file_is_refused(tmp_path):
    path = tmp_path / "image.tif"
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint16), photometric="rgb", metadata=None)
    found = describe(path)
    assert found.readers == () and "uint16" in found.refusal and found.levels == ((64, 64),)
    assert os.fspath(found.path) == os.fspath(path)
