# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import errno
import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time

import h5py
import numpy as np
import psutil
import pytest
import torch
from accelerate import PartialState, debug_launcher
from PIL import Image
from slide_files import stained_image, write_pyramid

from sparsepath_vit.runtime.model_identity import weights_digest
from sparsepath_vit.slides import (
    EmbedReport,
    EmbedSettings,
    Slide,
    StoreError,
    embed_regions,
    embed_slide,
    embed_slides,
)
from sparsepath_vit.slides.store import EmbeddingStore, SlideWriter
from sparsepath_vit.slides.tissue import find_tissue

PATCH = 16
REGIONS = EmbedSettings(region_size=256, dense=True)


@pytest.fixture
def slides(tmp_path):
    """Three slides of different sizes; each has several regions of 256 pixels."""
    folder = tmp_path / "slides"
    folder.mkdir()
    for number, (width, height) in enumerate([(640, 512), (500, 700), (768, 300)]):
        image = stained_image(width, height, [(64, 32, width - 150, height - 100)], seed=number)
        write_pyramid(folder / f"slide{number}.tiff", image)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run(slides, model, out, settings=REGIONS, **options):
    return embed_slides([slides], model, out, settings, device="cpu", workers=2, **options)


def test_regions_of_every_slide_are_stored_as_embedded(slides, model_folder, model_and_processor, tmp_path):
    report = run(slides, model_folder, tmp_path / "out")
    assert (report.done, report.skipped, report.failed) == (3, 0, [])
    assert sorted(contents(tmp_path / "out")) == ["settings.json", "slide0.h5", "slide1.h5", "slide2.h5"]
    slide = Slide(slides / "slide1.tiff")
    tissue = find_tissue(slide)
    with h5py.File(tmp_path / "out/slide1.h5") as file:
        assert len(file["coords"]) == 6 and file["coords"][:].tolist()[:3] == [[0, 0], [256, 0], [0, 256]]
        assert len(file["features"]) == 6 and file["features"].shape[1] == 32
        first = 0
        for index, ((x, y), (width, height)) in enumerate(zip(file["coords"], file["region_sizes"], strict=True)):
            image = slide.read_region(x, y, width, height, 0.5, pad=True)
            present = tissue.token_grid(slide, PATCH, 0.5, x, y, width, height)
            (expected,) = embed_regions(*model_and_processor, [image], [present], dense=True)
            assert np.allclose(file["features"][index], expected.pooled, atol=1e-5)
            rows = np.s_[first : first + file["patch_counts"][index]]
            first = rows.stop
            assert (file["patch_positions"][rows] == expected.patch_positions).all()
            assert (file["patch_coords"][rows] == [x, y] + expected.patch_positions[:, ::-1] * PATCH).all()
            difference = file["patch_features"][rows] - expected.patch_features.astype(float)
            assert np.abs(difference).max() < 2e-2
        assert first == len(file["patch_features"]) and file["patch_features"].dtype == np.float16
        assert len(file["token_coords"]) == len(file["prune_scores"]) > first


def test_file_has_the_names_and_attributes_that_slide_toolkits_read(slides, model_folder, tmp_path):
    run(slides, model_folder, tmp_path / "out", EmbedSettings(mpp=1.0, region_size=150, overlap=20))
    with h5py.File(tmp_path / "out/slide0.h5") as file:
        assert sorted(file) == ["coords", "features", "region_sizes"]
        assert file["features"].dtype == np.float32 and file["coords"].dtype == np.int64
        assert dict(file["coords"].attrs) == {
            "name": "slide0",
            "patch_size": 160,
            "patch_size_level0": 320,
            "patch_level": 0,
            "custom_downsample": 2.0,
            "overlap": 20,
            "mpp": 1.0,
            "level0_mpp": 0.5,
            "level0_magnification": 20,
            "target_magnification": 10,
            "level0_width": 640,
            "level0_height": 512,
            "savetodir": ".",
        }
        encoder = f"{model_folder.name}-{json.loads(file.attrs['settings'])['weights'][:8]}"
        assert dict(file["features"].attrs) == {"name": "slide0", "savetodir": ".", "encoder": encoder}
        settings = json.loads(file.attrs["settings"])
        assert settings["mpp"] == 1.0 and settings["prune_ratio"] == 0.5 and settings["dtype"] == "float32"


def test_whole_slide_is_one_row_and_all_kept_tokens(slides, model_folder, model_and_processor, tmp_path):
    run(slides, model_folder, tmp_path / "out", EmbedSettings(whole_slide=True, dense=True))
    expected = embed_slide(*model_and_processor, Slide(slides / "slide2.tiff"), 0.5)
    with h5py.File(tmp_path / "out/slide2.h5") as file:
        assert np.allclose(file["features"][:], expected.pooled[None], atol=1e-5)
        assert file["coords"][:].tolist() == [[0, 0]] and file["region_sizes"][:].tolist() == [[768, 300]]
        assert (file["patch_positions"][:] == expected.patch_positions).all()
        assert (file["token_coords"][:] == expected.token_positions[:, ::-1] * PATCH).all()


def test_batches_and_threads_do_not_change_a_number(slides, model_folder, tmp_path):
    run(slides, model_folder, tmp_path / "one")
    embed_slides([slides], model_folder, tmp_path / "many", REGIONS, device="cpu", workers=5, batch_size=4)
    for name in ("slide0.h5", "slide1.h5", "slide2.h5"):
        with h5py.File(tmp_path / "one" / name) as one, h5py.File(tmp_path / "many" / name) as many:
            assert sorted(one) == sorted(many)
            for dataset in one:
                assert np.allclose(one[dataset][:].astype(float), many[dataset][:], atol=2e-2), dataset
            assert np.allclose(one["features"][:], many["features"][:], atol=1e-5)


def test_second_run_skips_what_is_done_and_makes_what_is_missing(slides, model_folder, tmp_path):
    out = tmp_path / "out"
    run(slides, model_folder, out)
    before = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    report = run(slides, model_folder, out)
    assert (report.done, report.skipped) == (0, 3)
    assert times == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / "slide1.h5").unlink()
    report = run(slides, model_folder, out)
    assert (report.done, report.skipped) == (1, 2)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [({"region_size": 128}, "region_size"), ({"mpp": 1.0}, "mpp"), ({"whole_slide": True}, "whole_slide")],
)
def test_settings_are_not_mixed_in_a_folder(slides, model_folder, tmp_path, change, named):
    run(slides, model_folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(StoreError, match=f"{named}: .* there, .* now"):
        run(slides, model_folder, tmp_path / "out", EmbedSettings(**{"region_size": 256, "dense": True, **change}))
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("file", "field", "value", "named"),
    [
        ("config.json", "layer_norm_eps", 1e-3, r"layer_norm_eps: 1e-06 there, 0\.001 now"),
        ("config.json", "position_interpolation_offset", 0.1, r"position_interpolation_offset: 0\.0 there, 0\.1 now"),
        (
            "preprocessor_config.json",
            "image_mean",
            [0.5] * 3,
            r"processor\.image_mean: .* there, \[0\.5, 0\.5, 0\.5\] now",
        ),
    ],
)
def test_same_weights_in_another_model_are_other_settings(slides, model_folder, tmp_path, file, field, value, named):
    run(slides, model_folder, tmp_path / "out")
    other = shutil.copytree(model_folder, tmp_path / "other")
    settings = json.loads((other / file).read_text())
    (other / file).write_text(json.dumps({**settings, field: value}))
    with pytest.raises(StoreError, match=named):
        run(slides, other, tmp_path / "out")


def test_other_weights_are_other_settings(model_and_processor):
    model, _ = model_and_processor
    before = weights_digest(model)
    with torch.no_grad():
        model.encoder.layers[2].mlp.fc1.bias += 1e-3
    assert weights_digest(model) != before


def test_slide_that_fails_is_on_record_and_the_others_go_on(slides, model_folder, tmp_path):
    (slides / "empty.svs").touch()
    (slides / "notes.svs").write_text("only text")
    Image.fromarray(np.full((400, 400, 3), 240, np.uint8)).save(slides / "unstated.png")
    write_pyramid(slides / "blank.tiff", stained_image(500, 500, []))
    whole = (slides / "slide2.tiff").read_bytes()
    (slides / "short.tiff").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out"
    report = run(slides, model_folder, out)
    assert report.done == 3
    reasons = {os.path.basename(slide): reason for slide, reason in report.failed}
    for name, words in {
        "empty.svs": "is empty",
        "notes.svs": "cannot be read as a slide",
        "unstated.png": "does not state its resolution",
        "blank.tiff": "no tissue was found",
        "short.tiff": "copy it again",
    }.items():
        assert words in reasons.pop(name), name
    assert not reasons
    lines = (out / "failures.csv").read_text().splitlines()
    assert lines[0] == "slide,reason" and len(lines) == 6
    before = contents(out)
    run(slides, model_folder, out)  # tries them again, and records them once
    assert contents(out) == before
    write_pyramid(slides / "short.tiff", stained_image(640, 512, [(64, 96, 384, 256)]))
    assert run(slides, model_folder, out).done == 1
    assert "short.tiff" not in (out / "failures.csv").read_text() and (out / "short.h5").exists()


@pytest.mark.parametrize("failing", ["embedder.embed_regions", "embedder.region_rows", "forward.forward_strips"])
def test_no_thread_still_reads_when_a_slide_is_closed_after_an_error(
    slides, model_folder, tmp_path, monkeypatch, failing
):
    """OpenSlide crashes the process when a file is closed under a read."""
    under_way, reads_at_closing = set(), []
    read, close = Slide.read_region, Slide.close

    def slow_read(self, x, y, *arguments, **options):
        under_way.add((x, y))
        time.sleep(0 if (x, y) == (0, 0) else 0.2)
        pixels = read(self, x, y, *arguments, **options)
        under_way.remove((x, y))
        return pixels

    def watched_close(self):
        reads_at_closing.append(len(under_way))
        close(self)

    def fail(model, strips, *arguments):
        if failing == "forward.forward_strips":
            next(strips)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Slide, "read_region", slow_read)
    monkeypatch.setattr(Slide, "close", watched_close)
    monkeypatch.setattr(f"sparsepath_vit.slides.{failing}", fail)
    settings = EmbedSettings(region_size=256, whole_slide=failing.startswith("forward"))
    report = run(slides / "slide1.tiff", model_folder, tmp_path / "out", settings)
    assert len(report.failed) == 1 and reads_at_closing == [0]


def test_resolution_of_slides_that_state_none_can_be_passed(slides, model_folder, tmp_path, caplog):
    with Image.open(slides / "slide0.tiff") as image:
        image.save(tmp_path / "plain.png")
        pyramid = write_pyramid(tmp_path / "pyramid.tiff", np.asarray(image.convert("RGB")), mpp=None)
    attributes = []

    def embed(path, folder, mpp=None, slide_mpp=None):
        settings = EmbedSettings(mpp=mpp)
        report = embed_slides([path], model_folder, tmp_path / folder, settings, slide_mpp=slide_mpp, device="cpu")
        if report.failed:
            assert "does not state its resolution" in report.failed[0][1] and "--slide-mpp" in report.failed[0][1]
            return False
        with h5py.File(tmp_path / folder / f"{path.stem}.h5") as file:
            attributes.append((file["coords"].attrs["level0_mpp"], file["coords"].attrs["custom_downsample"]))
        return True

    plain = tmp_path / "plain.png"
    assert not embed(plain, "a") and not embed(pyramid, "b") and not embed(pyramid, "c", mpp=0.5)
    assert embed(pyramid, "d", mpp=0.5, slide_mpp=0.25) and embed(plain, "e", mpp=0.5, slide_mpp=0.25)
    assert "is taken to have" not in caplog.text
    assert embed(plain, "f", mpp=0.5)  # what is asked for is not a scanner's resolution, but that of a plain image
    assert "plain.png does not state its resolution: it is taken to have the 0.5 micrometres per pixel" in caplog.text
    assert attributes == [(0.25, 2.0), (0.25, 2.0), (0.5, 1.0)]


def test_manifest_gives_regions_labels_and_resolution(slides, model_folder, model_and_processor, tmp_path):
    manifest = slides / "list.csv"
    manifest.write_text(
        "slide,mpp,x,y,width,height,label\n"
        "slide0.tiff,0.5,70,40,200,160,tumour\n"
        "slide0.tiff,0.5,300,100,96,96,\n"
        "slide1.tiff,,,,,,benign\n"
        "slide2.tiff,,800,100,300,100,\n"
    )
    out = tmp_path / "out"
    report = embed_slides([manifest], model_folder, out, REGIONS, device="cpu")
    assert report.done == 2 and "is not inside" in report.failed[0][1]
    slide = Slide(slides / "slide0.tiff")
    with h5py.File(out / "slide0.h5") as file:
        assert file["coords"][:].tolist() == [[70, 40], [300, 100]]
        assert file["region_sizes"][:].tolist() == [[200, 160], [96, 96]]
        assert file["labels"].asstr()[:].tolist() == ["tumour", ""]
        present = np.ones((10, 13), bool)  # the last of 12.5 token columns is half inside the region, and stays
        image = slide.read_region(70, 40, 200, 160)
        (expected,) = embed_regions(*model_and_processor, [image], [present])
        assert np.allclose(file["features"][0], expected.pooled, atol=1e-5)
    with h5py.File(out / "slide1.h5") as file:
        assert file["features"].attrs["label"] == "benign" and len(file["features"]) == 6
    manifest.write_text("slide,mpp,x,y,width,height\nslide0.tiff,0.5,70,40,200,176\n")
    (reason,) = [reason for _, reason in embed_slides([manifest], model_folder, out, REGIONS, device="cpu").failed]
    assert "was made from" in reason and "remove the file first" in reason


BLANK_MANIFEST = (
    "slide,x,y,width,height,label\n"
    "slide0.tiff,616,40,24,80,glass\n"  # no tissue, nor in its margin
    "slide0.tiff,70,40,200,160,tumour\n"
    "slide0.tiff,0,496,72,16,\n"
    "slide0.tiff,300,100,96,96,\n"
    "slide1.tiff,70,40,96,96,\n"
)


def test_region_without_tissue_is_left_out_on_record_and_costs_its_slide_nothing_else(slides, model_folder, tmp_path):
    """It used to fail the whole slide."""
    (slides / "list.csv").write_text(BLANK_MANIFEST)
    (slides / "without.csv").write_text(
        "".join(BLANK_MANIFEST.splitlines(keepends=True)[line] for line in (0, 2, 4, 5))
    )
    out = tmp_path / "out"

    def embed(manifest, folder):
        return embed_slides([slides / manifest], model_folder, folder, REGIONS, device="cpu", batch_size=2)

    report = embed("list.csv", out)
    assert (report.done, report.regions, report.regions_without_tissue, report.failed) == (2, 3, 2, [])
    assert "3 regions (2 without tissue left out)" in str(report)
    embed("without.csv", tmp_path / "without")
    with h5py.File(out / "slide0.h5") as file, h5py.File(tmp_path / "without/slide0.h5") as expected:
        assert file["skipped_regions"][:].tolist() == [[616, 40, 24, 80], [0, 496, 72, 16]]
        assert file["skipped_regions"].attrs["reason"] == "no tissue"
        assert set(file) == {*expected, "skipped_regions"} and "labels" in expected
        for dataset in expected:
            assert (file[dataset][:] == expected[dataset][:]).all(), dataset
    rows = (out / "failures.csv").read_text().splitlines()
    assert len(rows) == 3 and all("slide0.tiff" in row and "--tissue-mask all" in row for row in rows[1:])
    assert "x=616, y=40, width=24, height=80" in rows[1] and "x=0, y=496, width=72, height=16" in rows[2]

    before = contents(out)
    report = embed("list.csv", out)
    assert (report.done, report.skipped, report.regions, report.regions_without_tissue) == (0, 2, 0, 2)
    assert contents(out) == before


def test_slide_whose_regions_are_all_without_tissue_fails_by_name(slides, model_folder, tmp_path):
    (slides / "list.csv").write_text("slide,x,y,width,height\nslide0.tiff,616,40,24,80\nslide1.tiff,70,40,96,96\n")
    report = embed_slides([slides / "list.csv"], model_folder, tmp_path / "out", REGIONS, device="cpu")
    assert (report.done, report.regions_without_tissue) == (1, 0)
    ((slide, reason),) = report.failed
    assert slide.endswith("slide0.tiff") and "in any of the 1 regions that were asked for" in reason
    assert sorted(contents(tmp_path / "out")) == ["failures.csv", "settings.json", "slide1.h5"]


def test_tissue_only_in_patches_that_the_processor_leaves_out_is_no_tissue(slides, model_folder, tmp_path):
    """The last patches of a region may lie in it by less than half; the model used to get a region without tokens."""
    mask = np.zeros((512, 640), np.uint8)
    mask[:, 336:] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (slides / "list.csv").write_text("slide,x,y,width,height\nslide0.tiff,320,96,20,20\nslide0.tiff,320,96,64,64\n")
    report = embed_slides(
        [slides / "list.csv"], model_folder, tmp_path / "out", REGIONS, device="cpu", tissue_mask=tmp_path / "mask.png"
    )
    assert (report.regions, report.regions_without_tissue, report.failed) == (1, 1, [])


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ("640,40,60,60", "x=640..700, y=40..100 .* is not inside .*slide0.tiff, which is 640 x 512"),
        ("70,40,200,9", "x=70, y=40 has 200 x 9 pixels at 0.5 micrometres per pixel, less than one patch of 16"),
    ],
)
def test_impossible_region_is_left_out_by_name_and_costs_its_slide_nothing_else(
    slides, model_folder, tmp_path, box, words
):
    """It used to fail the whole slide."""
    header = "slide,x,y,width,height,label\n"
    (slides / "list.csv").write_text(f"{header}slide0.tiff,{box},odd\nslide0.tiff,70,40,96,96,tumour\n")
    (slides / "without.csv").write_text(f"{header}slide0.tiff,70,40,96,96,tumour\n")
    out = tmp_path / "out"
    for done, skipped in ((1, 0), (0, 1)):
        report = embed_slides([slides / "list.csv"], model_folder, out, REGIONS, device="cpu")
        assert (report.done, report.skipped, report.impossible_regions, report.failed) == (done, skipped, 1, [])
        assert "(1 impossible left out)" in str(report)
        rows = (out / "failures.csv").read_text().splitlines()
        assert len(rows) == 2 and re.search(words, rows[1]) and "It was left out" in rows[1]
    embed_slides([slides / "without.csv"], model_folder, tmp_path / "without", REGIONS, device="cpu")
    with h5py.File(out / "slide0.h5") as file, h5py.File(tmp_path / "without/slide0.h5") as expected:
        assert file["impossible_regions"][:].tolist() == [[int(number) for number in box.split(",")]]
        for dataset in expected:
            assert (file[dataset][:] == expected[dataset][:]).all(), dataset
            found, wanted = (
                {name: np.asarray(value).tolist() for name, value in stored[dataset].attrs.items()}
                for stored in (file, expected)
            )
            assert found == wanted


@pytest.mark.parametrize("mpp", [0.5, 1.0])
def test_region_over_the_edge_is_padded_and_what_lies_beyond_is_masked(
    slides, model_folder, model_and_processor, tmp_path, caplog, mpp
):
    write_pyramid(slides / "full.tiff", stained_image(320, 256, [(0, 0, 320, 256)]))
    boxes = [(224, 160, 192, 192), (-64, -32, 128, 128)]
    rows = "".join(f"full.tiff,{x},{y},{width},{height}\n" for x, y, width, height in boxes)
    (slides / "list.csv").write_text(f"slide,x,y,width,height\n{rows}")
    report = embed_slides(
        [slides / "list.csv"], model_folder, tmp_path / "out", EmbedSettings(mpp=mpp), device="cpu", tissue_mask="all"
    )
    assert (report.done, report.regions, report.failed) == (1, 2, [])
    assert "2 regions reach over its edge" in caplog.text
    slide, token = Slide(slides / "full.tiff"), round(PATCH * mpp / 0.5)
    with h5py.File(tmp_path / "out/full.h5") as file:
        for index, (x, y, width, height) in enumerate(boxes):
            image = np.full((height, width, 3), 255, np.uint8)
            left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, 320), min(y + height, 256)
            inside = slide.read_region(left, top, right - left, bottom - top)
            image[top - y : bottom - y, left - x : right - x] = inside
            present = np.zeros((height // token, width // token), bool)
            present[(top - y) // token : (bottom - y) // token, (left - x) // token : (right - x) // token] = True
            if mpp == 1.0:
                image = slide.read_region(x, y, width // 2, height // 2, mpp, pad=True)
            (expected,) = embed_regions(*model_and_processor, [image], [present])
            assert np.allclose(file["features"][index], expected.pooled, atol=1e-5)
        assert file["coords"][:].tolist() == [[224, 160], [-64, -32]]


def test_slide_that_changes_under_its_name_and_size_is_made_again(slides, model_folder, tmp_path):
    """It counted as done."""
    path, out = tmp_path / "raw.tiff", tmp_path / "out"
    for seed, done in ((0, 1), (0, 0), (1, 1), (1, 0)):
        image = stained_image(320, 256, [(0, 0, 320, 256)])
        write_pyramid(path, np.roll(image, 37 * seed, axis=1), compression=None)
        size = path.stat().st_size
        report = embed_slides([path], model_folder, out, REGIONS, device="cpu")
        assert (report.done, report.skipped, report.failed) == (done, 1 - done, [])
    assert path.stat().st_size == size
    embed_slides([path], model_folder, tmp_path / "fresh", REGIONS, device="cpu")
    assert (out / "raw.h5").read_bytes() == (tmp_path / "fresh/raw.h5").read_bytes()


def test_another_slide_of_the_same_name_does_not_replace_the_first(slides, model_folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(slides / "slide1.tiff", tmp_path / "elsewhere/slide0.tiff")
    out = tmp_path / "out"
    embed_slides([slides / "slide0.tiff"], model_folder, out, REGIONS, device="cpu")
    before = (out / "slide0.h5").read_bytes()
    ((_, reason),) = embed_slides([tmp_path / "elsewhere/slide0.tiff"], model_folder, out, REGIONS, device="cpu").failed
    assert "If these are two slides, give each its own folder" in reason
    shutil.copy(slides / "slide0.tiff", tmp_path / "elsewhere/slide0.tiff")  # only moved
    assert embed_slides([tmp_path / "elsewhere/slide0.tiff"], model_folder, out, REGIONS, device="cpu").skipped == 1
    assert (out / "slide0.h5").read_bytes() == before


def test_corrected_labels_reach_what_is_done(slides, model_folder, tmp_path, caplog):
    """They were compared with nothing, and the old ones stayed."""
    out, manifest = tmp_path / "out", slides / "list.csv"
    rows = (
        "slide,x,y,width,height{}\nslide0.tiff,70,40,96,96{}\nslide0.tiff,616,40,24,80{}\nslide0.tiff,300,100,96,96{}\n"
    )
    rows += "slide1.tiff,,,,{}\n"

    def embed(*labels):
        manifest.write_text(rows.format(*(f",{label}" if label is not None else "" for label in labels)))
        report = embed_slides([manifest], model_folder, out, REGIONS, device="cpu")
        with h5py.File(out / "slide0.h5") as first, h5py.File(out / "slide1.h5") as second:
            of_regions = first["labels"].asstr()[:].tolist() if "labels" in first else None
            return report.relabelled, of_regions, second["features"].attrs.get("label"), first["features"][:]

    *before, features = embed("label", "tumour", "glass", "benign", "grade 1")
    assert before == [0, ["tumour", "benign"], "grade 1"]
    *after, same = embed("label", "tumour", "glass", "tumour", "grade 2")
    assert after == [2, ["tumour", "tumour"], "grade 2"] and (same == features).all()
    assert "labels corrected" in caplog.text
    assert embed("label", "tumour", "pen", "tumour", "grade 2")[:3] == (0, ["tumour", "tumour"], "grade 2")
    assert embed(None, None, None, None, None)[:3] == (0, ["tumour", "tumour"], "grade 2")
    assert "keeps the labels of an earlier manifest" in caplog.text
    assert embed("label", "", "", "", "")[:3] == (2, None, None)
    fresh = embed_slides([manifest], model_folder, tmp_path / "fresh", REGIONS, device="cpu")
    with h5py.File(out / "slide0.h5") as file, h5py.File(tmp_path / "fresh/slide0.h5") as expected:
        assert fresh.done == 2 and sorted(file) == sorted(expected)


def test_what_a_folder_holds_beside_slides_is_listed_and_counted(slides, model_folder, tmp_path):
    (slides / "gone.svs").symlink_to(tmp_path / "nowhere.svs")
    (slides / "slide3.tiff").symlink_to(slides / "slide0.tiff")
    report = run(slides, model_folder, tmp_path / "out")
    assert (report.done, len(report.left_out)) == (3, 2) and "2 other files and folders left out" in str(report)
    rows = (tmp_path / "out/left_out.csv").read_text().splitlines()
    assert "gone.svs,it is a dead link to" in rows[1] and "slide3.tiff,it is" in rows[2]
    (slides / "gone.svs").unlink()
    (slides / "slide3.tiff").unlink()
    assert not run(slides, model_folder, tmp_path / "out").left_out
    assert not (tmp_path / "out/left_out.csv").exists()


def test_masks_are_given_per_slide_or_all(slides, model_folder, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    mask = np.zeros((512, 640), np.uint8)
    mask[:64, :64] = 1
    Image.fromarray(mask).save(masks / "slide0.png")
    report = run(slides, model_folder, tmp_path / "masked", tissue_mask=masks)
    assert report.done == 1 and report.tokens == 16
    assert "holds no tissue mask slide1" in report.failed[0][1]
    assert run(slides, model_folder, tmp_path / "all", tissue_mask="all").tokens > 2500
    with pytest.raises(ValueError, match=r"tissue_mask='gone\.png' does not exist"):
        run(slides, model_folder, tmp_path / "gone", tissue_mask="gone.png")
    with pytest.raises(ValueError, match="one file for 3 slides"):
        run(slides, model_folder, tmp_path / "one", tissue_mask=masks / "slide0.png")


def test_slides_of_one_name_are_refused_before_anything_is_written(slides, model_folder, tmp_path):
    write_pyramid(slides / "slide0.svs", stained_image(100, 100, []))
    with pytest.raises(ValueError, match=r"slide0\.svs and .*slide0\.tiff would both be written to slide0\.h5"):
        run(slides, model_folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_whole_slide_with_regions_is_a_contradiction(slides, model_folder, tmp_path):
    (slides / "list.csv").write_text("slide,x,y,width,height\nslide0.tiff,0,0,64,64\n")
    with pytest.raises(ValueError, match="use one of them"):
        embed_slides([slides / "list.csv"], model_folder, tmp_path / "out", EmbedSettings(whole_slide=True))


@pytest.mark.parametrize("options", [{"settings": EmbedSettings(mpp=0)}, {"slide_mpp": 20}])
def test_impossible_resolution_is_refused_before_anything_is_read(slides, model_folder, tmp_path, options):
    with pytest.raises(ValueError, match="micrometres per pixel"):
        run(slides, model_folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_full_disk_ends_the_run_and_keeps_what_is_done(slides, model_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(slides, model_folder, out)
    complete = contents(out)
    for name in ("slide1.h5", "slide2.h5"):
        (out / name).unlink()
    monkeypatch.setattr("sparsepath_vit.slides.embedder._DISK_FULL", (errno.EFBIG,))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match=r"has no space left while .*slide1.tiff was written"):
            run(slides, model_folder, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(contents(out)) == ["settings.json", "slide0.h5"]
    assert run(slides, model_folder, out).done == 2
    assert contents(out) == complete


def embed_until_killed(paths, model, out, steps):
    """Embeds, and kills itself before one of its steps on the disk; 0 steps: never."""
    torch.set_num_threads(1)  # the threads of the parent do not exist in a forked process
    counter = itertools.count(1)

    def stepping(function):
        def step(*arguments, **options):
            if next(counter) == steps:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return step

    for owner, name in ((SlideWriter, "append"), (EmbeddingStore, "record_failure"), (os, "fsync"), (os, "replace")):
        setattr(owner, name, stepping(getattr(owner, name)))
    embed_slides(paths, model, out, REGIONS, device="cpu", workers=2)


def exit_code(*arguments):
    """Of a process of its own that runs `embed_until_killed`."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=embed_until_killed, args=arguments, daemon=True)
    process.start()
    process.join()
    return process.exitcode


def test_killed_again_and_again_a_run_ends_as_if_it_had_not_been(slides, model_folder, tmp_path):
    (slides / "broken.svs").write_text("no slide")
    assert exit_code([slides], model_folder, tmp_path / "whole", 0) == 0
    # In the settings, before the failure's row, amid regions, before the sync and the renaming of each slide, ...
    for steps in (1, 3, 6, 8, 9, 13, 9, 10, 9, 1):
        assert exit_code([slides], model_folder, tmp_path / "killed", steps) == -signal.SIGKILL
    assert {"slide0.h5", "slide1.h5"} < set(contents(tmp_path / "killed"))
    assert exit_code([slides], model_folder, tmp_path / "killed", 0) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_regions_without_tissue_stay_on_record_through_kills(slides, model_folder, tmp_path):
    (slides / "list.csv").write_text(BLANK_MANIFEST)
    arguments = [slides / "list.csv", slides / "slide2.tiff"], model_folder
    assert exit_code(*arguments, tmp_path / "whole", 0) == 0
    # Before the blank regions are written, before the slide's renaming, before and between their rows, at slide 1.
    for steps in (5, 5, 4, 2, 3, 4):
        assert exit_code(*arguments, tmp_path / "killed", steps) == -signal.SIGKILL
    assert exit_code(*arguments, tmp_path / "killed", 0) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert len((tmp_path / "whole/failures.csv").read_text().splitlines()) == 3


def embed_with_others(slides, model, out):
    torch.set_num_threads(1)
    PartialState._reset_state()
    report = embed_slides([slides], model, out, REGIONS, workers=1)
    assert PartialState().num_processes == 2
    assert report.done == 3 and len(report.failed) == 1


def test_processes_share_the_slides_out(slides, model_folder, tmp_path):
    (slides / "broken.svs").write_text("no slide")
    debug_launcher(embed_with_others, (slides, model_folder, tmp_path / "out"), num_processes=2)
    assert sorted(contents(tmp_path / "out")) == [
        "failures.csv",
        "settings.json",
        "slide0.h5",
        "slide1.h5",
        "slide2.h5",
    ]


def test_memory_stays_flat_over_many_regions(model_folder, tmp_path):
    side = 1600
    write_pyramid(
        tmp_path / "large.tiff", stained_image(side, side, [(0, 0, side, side)]), factors=(), compression=None
    )
    process, resident = psutil.Process(), []
    settings = EmbedSettings(region_size=128, dense=True)
    original = embed_regions

    def watched(*arguments):
        resident.append(process.memory_info().rss)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsepath_vit.slides.embedder.embed_regions", watched)
        report = embed_slides(
            [tmp_path / "large.tiff"], model_folder, tmp_path / "out", settings, device="cpu", workers=2
        )
    assert report.regions == len(resident) == 169
    assert max(resident[50:]) < 1.05 * resident[50]


def test_report_adds_up_processes_and_prints_the_split():
    parts = [
        EmbedReport(done=2, regions=10, tokens=1000, seconds=10, model_seconds=8, reading_seconds=1, peak_bytes=2**30),
        EmbedReport(done=1, skipped=4, failed=[("a.svs", "empty")], seconds=4, model_seconds=2, peak_bytes=2**31),
    ]
    total = EmbedReport.of_processes(parts)
    assert (total.done, total.skipped, total.seconds, total.failed) == (3, 4, 10, [("a.svs", "empty")])
    text = str(total)
    assert "3 slides embedded, 4 done before, 1 failed" in text and "100 tokens/s" in text
    assert "80% in the model, 10% waiting for pixels, 10% tissue" in text and "2.00 GiB" in text


@pytest.mark.parametrize(
    ("name", "slide_mpp", "tokens"),
    [
        ("slides/CMU-1-Small-Region.svs", None, (9000, 13000)),
        ("slides/CMU-1_panda_layout.tiff", None, (9000, 13000)),
        ("slides/TCGA-CR-7395-TS1_x0-2047.svs", 0.5, (14000, 19000)),
        ("slides/OS-1-detail.ome.tif", None, (900, 1100)),
    ],
)
def test_real_slides_embed(shared_slide, model_folder, tmp_path, name, slide_mpp, tokens):
    path = shared_slide(name)
    given = {"slide_mpp": slide_mpp, "device": "cpu", "workers": 2}
    report = embed_slides([path], model_folder, tmp_path / "out", EmbedSettings(region_size=2000), **given)
    assert report.done == 1 and tokens[0] < report.tokens < tokens[1]


def test_real_slide_without_mpp_fails_by_name(shared_slide, model_folder, tmp_path):
    path = shared_slide("slides/TCGA-CR-7395-TS1_x0-2047.svs")
    ((_, reason),) = embed_slides([path], model_folder, tmp_path / "out", device="cpu").failed
    assert "does not state its resolution" in reason and "--mpp" in reason
