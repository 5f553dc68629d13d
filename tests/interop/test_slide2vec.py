# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""slide2vec 7.1. It asks for transformers below 5: its environment overrules that (tests/interop/overrides.txt)."""

import os
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

pytest.importorskip("slide2vec", reason="slide2vec is not installed: make interop tries its adapter")

from slide2vec import list_models
from slide2vec.api import (
    DenseOptions,
    ExecutionOptions,
    Model,
    Pipeline,
    PreprocessingConfig,
    SlideRegions,
    SlideSpec,
    TilingConfig,
)
from slide2vec.encoders import list_encoder_provider_diagnostics

from sparsepath_vit import copy_tiny_checkpoint, tiny_checkpoint
from sparsepath_vit.plugins import FeatureExtractor
from sparsepath_vit.plugins.slide2vec_encoders import CHECKPOINTS_VARIABLE, register_slide2vec_encoders
from sparsepath_vit.slides import EmbedSettings, Slide, embed_slides

TILE = 224
TILING = TilingConfig(
    requested_spacing_um=0.5, requested_tile_size_px=TILE, tolerance=0.05, overlap=0.0, backend="openslide"
)
EXECUTION = {"batch_size": 4, "num_workers_per_gpu": 0, "num_preprocessing_workers": 1, "precision": "fp32"}


def test_the_entry_point_brings_the_tiny_checkpoint():
    assert "sparsepath-tiny" in list_models() and list_encoder_provider_diagnostics() == ()


def test_features_are_those_of_our_own_reader(tissue_slide, own_features, assert_agree):
    slide = Model.from_preset("sparsepath-tiny", device="cpu").embed_slide(
        tissue_slide,
        preprocessing=PreprocessingConfig(tiling=TILING),
        execution=ExecutionOptions(**EXECUTION),
        spacing_at_level_0=0.5,
    )
    (slide,) = slide if isinstance(slide, list) else [slide]
    corners = np.stack([slide.x, slide.y], axis=1)
    inside = (corners + TILE <= [1024, 900]).all(axis=1)  # what lies beyond the edge it fills in another way
    assert inside.sum() >= 6 and slide.tile_size_lv0 == TILE
    expected = own_features(tissue_slide, corners[inside].tolist(), TILE, tiny_checkpoint())
    assert_agree(slide.tile_embeddings[inside], expected)


def test_its_coordinates_are_read(tissue_slide, tmp_path):
    pipeline = Pipeline(
        Model.from_preset("sparsepath-tiny", device="cpu"),
        PreprocessingConfig(tiling=TILING),
        execution=ExecutionOptions(output_dir=tmp_path / "slide2vec", **EXECUTION),
    )
    pipeline.run(slides=[SlideSpec(sample_id="tissue", image_path=tissue_slide, spacing_at_level_0=0.5)])
    (coordinates,) = (tmp_path / "slide2vec").rglob("*.coordinates.npz")
    with np.load(coordinates) as arrays:
        corners = np.stack([arrays["x"], arrays["y"]], axis=1)
    options = {"regions": coordinates.parent, "tissue_mask": "all", "device": "cpu"}
    report = embed_slides([tissue_slide], tiny_checkpoint(), tmp_path / "own", EmbedSettings(mpp=0.5), **options)
    assert report.failed == []
    with h5py.File(tmp_path / "own/tissue.h5") as file:
        assert (file["coords"][:] == corners).all() and file["coords"].attrs["patch_size"] == TILE


@pytest.mark.parametrize("side", [224, 448])
def test_dense_maps_are_the_tokens_of_each_region(tissue_slide, tmp_path, side):
    corners = [(64, 96), (200, 300)]
    regions = Model.from_preset("sparsepath-tiny", device="cpu").embed_regions_dense(
        [SlideRegions(sample_id="tissue", image_path=tissue_slide, coordinates=corners, spacing_at_level_0=0.5)],
        dense=DenseOptions(spacing_um=0.5, target_size=side, backend="openslide"),
        execution=ExecutionOptions(output_dir=tmp_path, **EXECUTION),
    )
    extractor = FeatureExtractor(tiny_checkpoint())
    assert [(region.x, region.y) for region in regions] == corners
    for region, (x, y) in zip(regions, corners, strict=True):
        with Slide(tissue_slide) as slide:
            pixels = extractor.transform(slide.read_region(x, y, side, side, 0.5))
        with torch.inference_mode():
            expected = extractor.tokens(pixels[None])[1][0]
        found = torch.load(region.path, weights_only=True)
        assert found.shape == expected.shape == (192, side // 14, side // 14)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_folder_of_checkpoints_brings_a_name_for_each(tmp_path):
    """In a process of its own: slide2vec looks for encoders once."""
    copy_tiny_checkpoint(tmp_path / "mine")
    program = "from slide2vec import list_models; print([n for n in list_models() if n.startswith('sparsepath')])"
    environment = {**os.environ, CHECKPOINTS_VARIABLE: str(tmp_path)}
    names = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert names.stdout.strip() == "['sparsepath-mine', 'sparsepath-tiny']"


def test_a_folder_that_is_none_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv(CHECKPOINTS_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ValueError, match="is no folder"):
        register_slide2vec_encoders()


def test_the_snippet_of_the_page_runs(run_snippet):
    run_snippet("slide2vec")
