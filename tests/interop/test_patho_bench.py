# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Patho-Bench 0.0.1 and TRIDENT, from checkouts: our files as its patch and pooled embeddings, and its linear probe."""

import h5py
import numpy as np
import pytest

pytest.importorskip("patho_bench", reason="Patho-Bench is not installed: scripts/interop_tests.py --patho-bench")

import pandas as pd
from patho_bench.datasets.DataSplit import DataSplit
from patho_bench.datasets.PatchEmbeddingsDataset import PatchEmbeddingsDataset
from patho_bench.ExperimentFactory import ExperimentFactory
from patho_bench.Pooler import Pooler
from slide_files import stained_image, write_pyramid
from trident.slide_encoder_models.load import encoder_factory

from sparsepath_vit.slides import EmbedSettings, embed_slides

TASK = """
task_col: tumor
extra_cols: []
sample_col: case_id
label_dict: {0: normal, 1: tumor}
metrics: [macro-ovr-auc]
"""


def test_our_files_are_its_patch_embeddings(model_folder, tmp_path):
    names = [f"slide{number}" for number in range(12)]
    for number, name in enumerate(names):
        tissue = (0, 0, 448, 448) if number % 2 else (48, 48, 150 + number, 160)
        write_pyramid(tmp_path / f"{name}.tiff", stained_image(448, 448, [tissue]))
    settings = EmbedSettings(mpp=0.5, tile_size=112, region_size=448)
    report = embed_slides(tmp_path, model_folder, tmp_path / "tiles", settings, device="cpu")
    assert report.failed == [] and report.done == len(names)
    table = pd.DataFrame({"case_id": names, "slide_id": names, "tumor": [0, 1] * 6})
    table["fold_0"] = ["train"] * 8 + ["test"] * 4
    table.to_csv(tmp_path / "split.tsv", sep="\t", index=False)
    (tmp_path / "task.yaml").write_text(TASK)

    split = DataSplit(str(tmp_path / "split.tsv"), "case_id", ["slide_id"], ["tumor"])
    data = PatchEmbeddingsDataset(split, str(tmp_path / "tiles"), combine_slides_per_patient=True)
    encoder = encoder_factory("mean-uni_v2")  # its mean of tiles; the name says a length that it does not use
    for name in names:
        batch = Pooler.prepare_slide_encoder_input_batch(data.collate_fn([data[name]]))
        assert int(batch["attributes"]["patch_size_level0"]) == 112
        with h5py.File(tmp_path / f"tiles/{name}.h5") as file:
            expected = file["features"][:].mean(axis=0)
        assert np.allclose(Pooler.pool(encoder, batch, "cpu").squeeze().numpy(), expected, atol=1e-6)

    # A slide in one forward is one vector: our files are its pooled embeddings as they are.
    embed_slides(tmp_path, model_folder, tmp_path / "pooled", EmbedSettings(mpp=0.5, whole_slide=True), device="cpu")
    experiment = ExperimentFactory.linprobe(
        split=str(tmp_path / "split.tsv"),
        task_config=str(tmp_path / "task.yaml"),
        pooled_embeddings_dir=str(tmp_path / "pooled"),
        saveto=str(tmp_path / "results"),
        combine_slides_per_patient=False,
        num_bootstraps=2,
    )
    experiment.train()
    experiment.test()
    assert 0 <= experiment.report_results(metric="macro-f1") <= 1
