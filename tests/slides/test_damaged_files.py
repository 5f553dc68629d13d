# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Damaged files give a result or a named error: never a traceback, an abort, a hang or a swap storm.

`SPARSEPATH_FUZZ_CASES=2000` takes so many of every kind, `SPARSEPATH_FUZZ_SLIDES=FOLDER` the files of a folder too.
"""

import json
import logging
import os
import random
import signal
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

import damaged_files
import h5py
import numpy as np
import psutil
import pytest
import tifffile
from PIL import Image
from slide_files import stained_image, write_pyramid

from sparsepath_vit.slides import EmbedSettings, Slide, SlideError, embed_slides, find_tissue, read_token_values
from sparsepath_vit.slides import reading_process as reading
from sparsepath_vit.slides.errors import decoding
from sparsepath_vit.slides.regions import read_manifest

CASES = int(os.environ.get("SPARSEPATH_FUZZ_CASES", "40"))
MOST_SECONDS, MOST_BYTES = 10, 2**30
KINDS = {"svs": damaged_files.TIFF, "ome.tif": damaged_files.TIFF, "png": damaged_files.PNG, "jpg": damaged_files.JPEG}
KINDS |= dict.fromkeys(("deflate", "lzw", "jpeg", "jpeg2000", "none", "strips"), damaged_files.TIFF)


@pytest.fixture(scope="module")
def image():
    return stained_image(300, 260, [(40, 40, 200, 180)])


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(reading, "_PATIENCE", 60.0)


def write_sound(kind, image, folder):
    """A sound file of a kind; the name of most is that of the codec."""
    path = folder / (f"sound.{kind}" if "." in kind or kind in ("svs", "png", "jpg") else "sound.tif")
    if kind in ("png", "jpg"):
        Image.fromarray(image).save(path)
    elif kind == "ome.tif":
        metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        tifffile.imwrite(path, image, ome=True, photometric="rgb", tile=(64, 64), metadata=metadata)
    elif kind == "strips":
        tifffile.imwrite(path, image, rowsperstrip=32, compression="lzw", photometric="rgb")
    elif kind == "svs":
        text = "Aperio Image Library v1\n300x260 (64x64) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"
        write_pyramid(path, image, compression="jpeg", description=text)
    else:
        write_pyramid(path, image, compression=None if kind == "none" else kind)
    return path


def read_some(path):
    """The overview and two corners of every level, decoded in the reading process."""
    with Slide(path, apart=True) as slide:
        slide.thumbnail(256)
        for level, (width, height) in enumerate(slide.levels):
            size = (min(width, 200), min(height, 200))
            for corner in ((0, 0), (width - size[0], height - size[1])):
                pixels = slide._open().read(level, *corner, *size)
                assert pixels.shape == (size[1], size[0], 3)


def check_slides(sound, suffix, ways, seed, cases, tmp_path):
    """Each case is read or a SlideError: a fault of ours comes out of the reading process as RuntimeError."""
    logging.disable(logging.ERROR)  # the decoders complain of every file
    try:
        for case in range(cases):
            generator = random.Random(f"{seed} {case}")
            content, way = damaged_files.damaged(sound, ways, generator)
            path = tmp_path / f"case{suffix}"
            path.write_bytes(content)
            start = time.perf_counter()
            try:
                read_some(path)
            except SlideError as error:
                assert str(error), way
            seconds = time.perf_counter() - start
            assert seconds < MOST_SECONDS or psutil.getloadavg()[0] > os.cpu_count(), f"{seed} {case} {way}"
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_slides_are_read_or_named(image, tmp_path, kind):
    sound = write_sound(kind, image, tmp_path)
    read_some(sound)
    suffix = ".ome.tif" if kind == "ome.tif" else sound.suffix
    check_slides(sound.read_bytes(), suffix, KINDS[kind], kind, CASES, tmp_path)
    # The most that it ever took, libraries included.
    with open(f"/proc/{reading.reading_process().pid}/status") as lines:
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    assert peak < MOST_BYTES


@pytest.mark.skipif("SPARSEPATH_FUZZ_SLIDES" not in os.environ, reason="SPARSEPATH_FUZZ_SLIDES names no folder")
def test_damaged_real_slides_are_read_or_named(tmp_path):
    for sound in sorted(Path(os.environ["SPARSEPATH_FUZZ_SLIDES"]).glob("*.*")):
        suffix = ".ome.tif" if sound.name.endswith(".ome.tif") else sound.suffix
        ways = KINDS.get(suffix.lstrip("."), damaged_files.TIFF)
        check_slides(sound.read_bytes(), suffix, ways, sound.name, CASES, tmp_path)


def write_store(path):
    """What `read_token_values` reads of an embedded slide."""
    corners = np.arange(32).reshape(16, 2)
    with h5py.File(path, "w") as file:
        file["token_coords"], file["patch_coords"], file["coords"] = corners, corners, corners[:1]
        file["prune_scores"], file["token_counts"] = np.linspace(0, 1, 16), np.array([16])
        file["patch_features"] = np.ones((16, 4), dtype=np.float16)
        file["coords"].attrs.update({"level0_width": 300, "level0_height": 260, "mpp": 0.5})
        file["token_coords"].attrs.update({"token_size_level0": (16.0, 16.0), "token_size": 16})


def test_damaged_tables_annotations_and_stores_are_read_or_named(small_slide, tmp_path):
    write_store(tmp_path / "sound.h5")
    ring = [[40, 40], [200, 40], [200, 200], [40, 40]]
    polygon = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    (tmp_path / "sound.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [polygon] * 3}))
    (tmp_path / "sound.csv").write_text("slide,mpp,x,y,width,height,label\n" + "a.svs,0.5,0,0,300,200,tumour\n" * 3)
    with Slide(small_slide, mpp=0.5) as slide:
        readers = {
            "geojson": (lambda path: find_tissue(slide, path), damaged_files.TEXT),
            "csv": (read_manifest, damaged_files.TEXT),
            "h5": (lambda path: read_token_values(path, "prune_scores"), damaged_files.ANYWHERE),
        }
        for suffix, (read, ways) in readers.items():
            read(tmp_path / f"sound.{suffix}")
            sound = (tmp_path / f"sound.{suffix}").read_bytes()
            for case in range(4 * CASES):
                content, way = damaged_files.damaged(sound, ways, random.Random(f"{suffix} {case}"))
                path = tmp_path / f"case.{suffix}"
                path.write_bytes(content)
                try:
                    read(path)
                except ValueError as error:  # SlideError is one
                    assert path.name in str(error) or isinstance(error, SlideError), f"{suffix} {case} {way}: {error!r}"
                except Exception as error:
                    raise AssertionError(f"{suffix} {case} {way}: {content[:300]!r}") from error


def test_pixels_read_apart_are_the_same(small_slide):
    with Slide(small_slide) as here, Slide(small_slide, apart=True) as apart:
        assert (apart.levels, apart.mpp) == (here.levels, here.mpp)
        for level in (0.5, 1.0, 2.0):
            assert (apart.read_region(16, 8, 100, 60, level) == here.read_region(16, 8, 100, 60, level)).all()


@pytest.mark.parametrize("when", ["before it is asked", "while it is read"])
def test_the_end_of_the_reading_process_costs_one_slide(small_slide, when, monkeypatch):
    with Slide(small_slide, apart=True) as slide:
        first = reading.reading_process()
        pid = first.pid
        if when == "before it is asked":
            os.kill(pid, signal.SIGABRT)
        else:
            send = first.ask

            def ask_and_break(work, **arguments):
                os.kill(pid, signal.SIGSTOP)  # it cannot answer before it breaks down
                threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
                return send(work, **arguments)

            monkeypatch.setattr(first, "ask", ask_and_break)
        with pytest.raises(SlideError, match=r"small.* decoder broke down: signal SIG(ABRT|KILL)"):
            slide.read_region(0, 0, 64, 64)
    with Slide(small_slide, apart=True) as slide:
        assert slide.read_region(0, 0, 64, 64).shape == (64, 64, 3)
        assert reading.reading_process().pid != pid


def test_a_decoder_without_end_is_ended(small_slide, monkeypatch):
    with Slide(small_slide, apart=True) as slide:
        os.kill(reading.reading_process().pid, signal.SIGSTOP)
        monkeypatch.setattr(reading, "_PATIENCE", 0.2)
        with pytest.raises(SlideError, match="did not come to an end"):
            slide.read_region(0, 0, 64, 64)


def test_a_run_outlives_a_slide_that_breaks_its_decoder(image, model_folder, tmp_path, monkeypatch):
    for number in range(3):
        write_pyramid(tmp_path / f"slide{number}.tiff", image)
    open_apart = reading.ApartBackend.__init__

    def open_and_break(self, path, cache_bytes):
        open_apart(self, path, cache_bytes)
        if path.name == "slide1.tiff":
            os.kill(self._process.pid, signal.SIGABRT)

    monkeypatch.setattr(reading.ApartBackend, "__init__", open_and_break)
    slides = sorted(tmp_path.glob("*.tiff"))
    report = embed_slides(slides, model_folder, tmp_path / "out", EmbedSettings(region_size=128), device="cpu")
    assert report.done == 2
    ((name, reason),) = report.failed
    assert name.endswith("slide1.tiff")
    assert "signal SIGABRT" in reason
    assert "slide1.tiff" in (tmp_path / "out" / "failures.csv").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_the_reading_process_cannot_fill_the_memory(tmp_path, monkeypatch):
    Image.new("RGB", (9000, 9000), "white").save(tmp_path / "large.png", compress_level=1)
    monkeypatch.setattr(reading, "free_bytes", lambda device: 2**28)
    monkeypatch.setattr(reading, "_current", None)
    with pytest.raises(SlideError, match=r"large.png cannot be read: more memory is asked for than there is"):
        Slide(tmp_path / "large.png", apart=True)
    reading.reading_process().end()


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), MemoryError(), OverflowError("too large")])
def test_what_damaged_bytes_raise_is_a_slide_error(error):
    with pytest.raises(SlideError, match="tile 7 cannot be decoded") as raised, decoding("tile 7 cannot be decoded"):
        raise error
    assert raised.value.__cause__ is error


def test_a_type_error_is_the_files_in_a_library_and_a_fault_in_our_lines(tmp_path):
    with pytest.raises(SlideError, match="TypeError"), decoding():
        json.loads(3)
    ours = {"__name__": "sparsepath_vit.slides.new_lines"}
    exec("def fail():\n    return 1 + None", ours)
    with pytest.raises(TypeError), decoding():
        ours["fail"]()


def damage_value(content, tag, number):
    """Writes `number` as the value of a tag of the first page."""
    order, offset, count = damaged_files.tiff_directories(content)[0]
    for entry in range(offset + 2, offset + 2 + 12 * count, 12):
        number_of_tag, kind = struct.unpack_from(order + "HH", content, entry)
        if number_of_tag == tag:
            struct.pack_into(order + ("H" if kind == 3 else "I"), content, entry + 8, number)


@pytest.mark.parametrize(
    ("tags", "number", "words"),
    [
        ([256], 60_000, r"page 0 of 60000 x 260 pixels needs 4,690 tiles or strips of 64 x 64, and the file lists 25"),
        (
            [322, 323],
            60_000,
            r"page 0 declares tiles or strips of 60000 x 60000 pixels, which [\d,]+ bytes cannot hold",
        ),
        ([322], 0, r"page 0 has 300 x 260 pixels in tiles or strips of 300 x 0"),
    ],
)
def test_sizes_that_cannot_be_true_are_named_before_anything_is_allocated(image, tmp_path, tags, number, words):
    path = write_pyramid(tmp_path / "slide.tiff", image, compression="lzw")
    content = bytearray(path.read_bytes())
    for tag in tags:
        damage_value(content, tag, number)
    path.write_bytes(content)
    with pytest.raises(SlideError, match=words):
        Slide(path)


def test_pages_in_a_circle_are_named_not_followed(image, tmp_path):
    path = write_pyramid(tmp_path / "slide.tiff", image)
    content = bytearray(path.read_bytes())
    (_, first, _), (order, offset, count) = damaged_files.tiff_directories(content)
    struct.pack_into(order + "I", content, offset + 2 + 12 * count, first)
    path.write_bytes(content)
    with pytest.raises(SlideError, match="leads from page 2 back to an earlier one"):
        Slide(path)


def test_a_png_that_declares_more_than_its_bytes_can_hold_is_damaged(image, tmp_path):
    Image.fromarray(image[:8, :8]).save(tmp_path / "small.png")
    content = bytearray((tmp_path / "small.png").read_bytes())
    struct.pack_into(">II", content, 16, 20_000, 20_000)
    struct.pack_into(">I", content, 29, zlib.crc32(content[12:29]))
    (tmp_path / "small.png").write_bytes(content)
    with pytest.raises(SlideError, match=r"declares 20000 x 20000 pixels, which .* bytes of PNG cannot hold"):
        Slide(tmp_path / "small.png")
