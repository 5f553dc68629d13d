# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""LazySlide 0.13 with lazyslide-models 0.1."""

import numpy as np
import pytest

pytest.importorskip("lazyslide", reason="LazySlide is not installed: make interop tries its adapter")

import lazyslide as zs
from lazyslide_models import ImageModelProtocol, ViTModelProtocol
from wsidata import open_wsi

from sparsepath_vit.plugins import SparsePathViTImageModel

TILE = 250  # no multiple of 16: 15 whole tokens and one that holds 10 of 16 pixels


@pytest.fixture
def tiled(tissue_slide):
    wsi = open_wsi(tissue_slide)
    zs.pp.find_tissues(wsi)
    zs.pp.tile_tissues(wsi, TILE, mpp=0.5)
    corners = wsi.shapes["tiles"].bounds[["minx", "miny"]].to_numpy().astype(int).tolist()
    assert len(corners) >= 6
    return wsi, corners


def test_features_are_those_of_our_own_reader(tiled, tissue_slide, model_folder, own_features, assert_agree):
    wsi, corners = tiled
    model = SparsePathViTImageModel(model_folder)
    assert isinstance(model, ImageModelProtocol) and isinstance(model, ViTModelProtocol)
    zs.tl.feature_extraction(wsi, model, device="cpu", batch_size=4)
    found = wsi.fetch.features_anndata(model.name).X
    assert_agree(found, own_features(tissue_slide, corners, TILE, model_folder))


def test_a_model_is_found_by_name(tiled, tissue_slide, model_folder, own_features, assert_agree):
    wsi, corners = tiled
    zs.tl.feature_extraction(wsi, "sparsepath-vit", model_path=model_folder, device="cpu")
    assert_agree(wsi["sparsepath-vit_tiles"].X, own_features(tissue_slide, corners, TILE, model_folder))


def test_dense_features_are_the_tokens_of_each_tile(tiled, model_folder):
    wsi, corners = tiled
    model = SparsePathViTImageModel(model_folder, tile_size=TILE, prune_ratio=0.0)
    assert model.grid_size == (16, 16)
    zs.tl.feature_extraction(wsi, model, device="cpu", dense=True, key_added="dense")
    tokens = wsi["dense_dense"].X
    assert tokens.shape == (len(corners) * 16 * 16, 32)
    read = wsi.reader.get_region(*corners[0], TILE, TILE, level=0)
    maps = model.model.tokens(model.get_transform()(np.asarray(read))[None])[1][0]
    assert np.abs(tokens[: 16 * 16] - maps.flatten(1).T.numpy()).max() < 1e-4 * maps.abs().max()


def test_dense_features_of_a_checkpoint_that_prunes_are_refused(tiled, model_folder):
    with pytest.raises(ValueError, match=r"prune_ratio=0\.5 leaves holes"):
        zs.tl.feature_extraction(tiled[0], SparsePathViTImageModel(model_folder), device="cpu", dense=True)


def test_two_checkpoints_are_told_apart(model_folder):
    from sparsepath_vit import tiny_checkpoint

    names = {SparsePathViTImageModel(source).name for source in (model_folder, tiny_checkpoint())}
    assert len(names) == 2


@pytest.mark.parametrize("table_format", ["anndata", "zarr"])
def test_our_tables_lie_on_its_tiles(tissue_slide, model_folder, tmp_path, table_format):
    import anndata
    from wsidata import TileSpec
    from wsidata.io import add_tiles

    from sparsepath_vit.slides import EmbedSettings, embed_slides

    settings = EmbedSettings(mpp=0.5, tile_size=224, region_size=448)
    embed_slides(tissue_slide, model_folder, tmp_path / "out", settings, device="cpu", table_format=table_format)
    read = {"anndata": anndata.read_h5ad, "zarr": anndata.read_zarr}[table_format]
    (path,) = (path for path in (tmp_path / "out").iterdir() if path.suffix in (".h5ad", ".zarr"))
    table = read(path)
    wsi = open_wsi(tissue_slide)
    corners = table.obsm["spatial"]
    specification = TileSpec.from_wsidata(wsi, tile_px=224, mpp=0.5)
    add_tiles(wsi, "tiles", corners, specification, np.zeros(len(corners), dtype=int))
    wsi.tables["ours_tiles"] = table
    found = wsi.fetch.features_anndata("ours", tile_graph=False)
    assert np.array_equal(found.X, table.X) and np.array_equal(found.obsm["spatial"], corners)


def test_the_snippet_of_the_page_runs(run_snippet):
    run_snippet("lazyslide")
