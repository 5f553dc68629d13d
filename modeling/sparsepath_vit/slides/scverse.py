# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A slide's features as an AnnData table, laid out as LazySlide and SpatialData lay theirs out (extra `scverse`)."""

import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runtime.atomic_files import atomic_folder, atomic_path
from ..runtime.extras import require

if TYPE_CHECKING:
    import pandas
    from anndata import AnnData

TABLE_SUFFIXES = {"anndata": ".h5ad", "zarr": ".zarr"}
_TILES = "tiles"  # LazySlide's name for the shapes that the rows belong to


def to_anndata(file: str | os.PathLike[str]) -> "AnnData":
    """The features in a slide's file, a row for each tile or region.

    Args:
        file: HDF5 file written by `sparsepath embed`.

    Returns:
        `X` (rows, width) float32; in `obs` `tile_id`, `library_id`, `x`, `y`, and `tissue` and `label` where they are
        known; in `obsm["spatial"]` the top left corners. All coordinates are level-0 pixels from the corner of level 0.

    Raises:
        OSError: the file cannot be read.
        ImportError: anndata is missing.

    Example:
    ```python
    >>> from sparsepath_vit.slides import to_anndata

    >>> table = to_anndata("tiles/CMU-1.h5")
    >>> table.obsm["spatial"].shape
    ```
    """
    anndata, pandas = require("anndata", "scverse"), require("pandas", "scverse")
    with require("h5py").File(file, "r") as stored:
        features, coords = stored["features"][:], stored["coords"][:]
        attributes = {name: np.asarray(value).tolist() for name, value in stored["coords"].attrs.items()}
        columns = _columns(stored)
        settings = stored.attrs.get("settings", "{}")
        label = stored["features"].attrs.get("label")
    corners = coords + np.asarray(attributes.get("origin_level0", (0, 0)))
    tile_ids = np.arange(len(features))
    table = {"tile_id": tile_ids, "library_id": _categorical([_TILES] * len(features))}
    table |= {"x": corners[:, 0], "y": corners[:, 1], **columns}
    if label is not None:
        table["slide_label"] = _categorical([label] * len(features))
    if "label" in table:
        table["label"] = _categorical(table["label"])
    obs = pandas.DataFrame(table, index=_index(map(str, tile_ids)))
    var = pandas.DataFrame(index=_index(map(str, range(features.shape[1]))))
    uns = _metadata(attributes, settings)
    return anndata.AnnData(X=features, obs=obs, var=var, obsm={"spatial": corners}, uns=uns)


def write_table(file: Path, kind: str) -> Path:
    """Writes the features of a slide's file beside it as AnnData, in HDF5 or Zarr, unless that is there and newer.

    Args:
        file: HDF5 file written by `sparsepath embed`.
        kind: "anndata" or "zarr".

    Returns:
        The path written, NAME.h5ad or NAME.zarr.
    """
    path = file.with_suffix(TABLE_SUFFIXES[kind])
    if path.exists() and path.stat().st_mtime_ns >= file.stat().st_mtime_ns:
        return path
    table = to_anndata(file)
    if kind == "zarr":
        with atomic_folder(path) as temporary:
            table.write_zarr(temporary)
    else:
        content = io.BytesIO()  # HDF5 would lock the temporary file, which is locked already
        with require("h5py").File(content, "w") as stored:
            require("anndata", "scverse").io.write_elem(stored, "/", table)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content.getbuffer())
    return path


def _index(names: Iterable[str]) -> "pandas.Index":
    """Of objects: not every version of anndata writes the strings that newer versions of pandas make."""
    return require("pandas", "scverse").Index(list(names), dtype=object)


def _categorical(names: Sequence[str]) -> "pandas.Categorical":
    return require("pandas", "scverse").Categorical(names, categories=_index(sorted(set(names))))


def _columns(stored: Any) -> dict[str, Any]:
    """What is known of each row beside its place."""
    columns: dict[str, Any] = {}
    if "tile_tissue" in stored:
        columns["tissue"] = stored["tile_tissue"][:]
    if "labels" in stored:
        labels = stored["labels"].asstr()[:]
        columns["label"] = np.repeat(labels, stored["tile_counts"][:]) if "tile_counts" in stored else labels
    return columns


def _metadata(attributes: dict[str, Any], settings: str) -> dict[str, Any]:
    size, size_level0 = int(attributes["patch_size"]), int(attributes["patch_size_level0"])
    return {
        "spatialdata_attrs": {"region": _TILES, "region_key": "library_id", "instance_key": "tile_id"},
        "slide_properties": {
            "shape": [int(attributes["level0_height"]), int(attributes["level0_width"])],
            "mpp": float(attributes["level0_mpp"]),
            "name": attributes["name"],
        },
        "tile_spec": {
            **dict.fromkeys(("height", "width", "stride_height", "stride_width"), size),
            "mpp": float(attributes["mpp"]),
            "base_level": 0,
            "base_height": size_level0,
            "base_width": size_level0,
            "tissue_name": "tissues",
        },
        "sparsepath_settings": json.dumps(json.loads(settings), sort_keys=True),
    }
