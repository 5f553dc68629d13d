# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import h5py
import numpy as np
import pytest
from slide_files import stained_image, write_leica, write_pyramid

from sparsepath_vit.slides import EmbedSettings, embed_slides, to_anndata

anndata = pytest.importorskip("anndata", reason="the extra scverse is not installed")


@pytest.mark.parametrize(("table_format", "read"), [("anndata", "read_h5ad"), ("zarr", "read_zarr")])
def test_tables_beside_the_files_hold_the_same_features(small_slide, model_folder, tmp_path, table_format, read):
    settings = EmbedSettings(tile_size=64, region_size=256)
    options = {"device": "cpu", "table_format": table_format}
    embed_slides(small_slide, model_folder, tmp_path / "out", settings, **options)
    (path,) = (path for path in (tmp_path / "out").iterdir() if path.suffix in (".h5ad", ".zarr"))
    table = getattr(anndata, read)(path)
    with h5py.File(tmp_path / "out/small.h5") as file:
        assert np.array_equal(table.X, file["features"][:]) and np.array_equal(table.obsm["spatial"], file["coords"][:])
        assert np.array_equal(table.obs["tissue"], file["tile_tissue"][:])
    assert table.obs["tile_id"].tolist() == list(range(len(table))) and set(table.obs["library_id"]) == {"tiles"}
    assert table.uns["spatialdata_attrs"]["instance_key"] == "tile_id"
    assert (table.uns["tile_spec"]["height"], table.uns["tile_spec"]["mpp"]) == (64, 0.5)
    before = path.stat().st_mtime_ns
    assert embed_slides(small_slide, model_folder, tmp_path / "out", settings, **options).skipped == 1
    assert path.stat().st_mtime_ns == before


def test_labels_of_regions_reach_their_tiles(model_folder, tmp_path):
    write_pyramid(tmp_path / "slide.tiff", stained_image(640, 512, [(0, 0, 640, 512)]))
    (tmp_path / "list.csv").write_text(
        "slide,x,y,width,height,label\nslide.tiff,0,0,128,128,a\nslide.tiff,256,0,128,64,b\n"
    )
    embed_slides(tmp_path / "list.csv", model_folder, tmp_path / "out", EmbedSettings(tile_size=64), device="cpu")
    assert to_anndata(tmp_path / "out/slide.h5").obs["label"].tolist() == ["a"] * 4 + ["b"] * 2


def test_coordinates_count_from_the_corner_of_level_0(model_folder, tmp_path):
    path = write_leica(tmp_path / "slide.scn", stained_image(640, 512, [(0, 0, 640, 512)]), corner=(300, 200))
    embed_slides(path, model_folder, tmp_path / "out", EmbedSettings(region_size=256), device="cpu", tissue_mask="all")
    with h5py.File(tmp_path / "out/slide.h5") as file:
        assert file["coords"].attrs["origin_level0"].tolist() == [300, 200]
        corners = file["coords"][:] + np.array([300, 200])
    assert (to_anndata(tmp_path / "out/slide.h5").obsm["spatial"] == corners).all()


def test_an_unknown_format_is_refused_at_once(small_slide, model_folder, tmp_path):
    with pytest.raises(ValueError, match="table_format='csv' is unknown: choose one of anndata, zarr"):
        embed_slides(small_slide, model_folder, tmp_path / "out", table_format="csv")
