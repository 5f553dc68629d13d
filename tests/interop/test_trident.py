# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""TRIDENT 0.3, which is not on the package index and asks for transformers below 5 (see docs/interop.md)."""

import h5py
import numpy as np
import pytest

pytest.importorskip(
    "trident.patch_encoder_models", reason="TRIDENT is not installed: scripts/interop_tests.py --trident tries it"
)

from trident import load_wsi
from trident.IO import coords_to_h5, read_coords

from sparsepath_vit.plugins import trident_encoder
from sparsepath_vit.slides import EmbedSettings, embed_slides

TILE = 250


@pytest.fixture
def wsi(tissue_slide):
    return load_wsi(str(tissue_slide), mpp=0.5)


def test_features_at_its_own_coordinates(wsi, tissue_slide, model_folder, tmp_path, own_features, assert_agree):
    corners = [[64, 96], [314, 346], [564, 346]]
    coordinates = tmp_path / "tissue_patches.h5"
    coords_to_h5(corners, coordinates, TILE, 20, 20, str(tmp_path), wsi.width, wsi.height, wsi.name, 0)
    encoder = trident_encoder(model_folder)
    path = wsi.extract_patch_features(encoder, str(coordinates), str(tmp_path / "features"), device="cpu")
    with h5py.File(path) as file:
        assert file["features"].attrs["encoder"] == encoder.enc_name
        expected = own_features(tissue_slide, corners, TILE, model_folder)
        assert_agree(file["features"][:], expected)
    # And our own command takes the same file of coordinates. Nothing is masked then.
    options = {"regions": coordinates, "tissue_mask": "all", "device": "cpu"}
    embed_slides([tissue_slide], model_folder, tmp_path / "own", EmbedSettings(mpp=0.5), **options)
    with h5py.File(tmp_path / "own/tissue.h5") as file:
        assert_agree(file["features"][:], expected)


def test_it_reads_our_tiles_as_coordinates_and_as_features(wsi, tissue_slide, model_folder, tmp_path):
    settings = EmbedSettings(mpp=0.5, tile_size=224, minimum_tissue=0.1, region_size=448)
    embed_slides([tissue_slide], model_folder, tmp_path / "own", settings, device="cpu")
    path = str(tmp_path / "own/tissue.h5")
    attributes, coords = read_coords(path)
    assert (attributes["patch_size"], attributes["patch_size_level0"]) == (224, 224) and len(coords) >= 6
    features = wsi.extract_patch_features(trident_encoder(model_folder), path, str(tmp_path / "again"), device="cpu")
    with h5py.File(features) as file, h5py.File(path) as own:
        assert (file["coords"][:] == own["coords"][:]).all() and file["features"].shape == own["features"].shape

    import torch

    class Mean(torch.nn.Module):
        precision = torch.float32

        def forward(self, batch, device):
            return batch["features"].mean(dim=1)

    pooled = wsi.extract_slide_features(path, Mean(), str(tmp_path / "slides"), device="cpu")
    with h5py.File(pooled) as file, h5py.File(path) as own:
        assert np.allclose(file["features"][:], own["features"][:].mean(axis=0), atol=1e-5)


def test_the_snippet_of_the_page_runs(run_snippet):
    run_snippet("trident")
