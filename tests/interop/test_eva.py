# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""kaiko-eva 0.4.5."""

import os
import subprocess
import sys

import pytest
import torch
from places import ROOT
from slide_files import stained_image, write_pyramid

pytest.importorskip("eva", reason="eva is not installed: make interop tries its adapter")

from eva.core.models.wrappers import ModelFromFunction
from eva.vision.models.wrappers import ModelFromRegistry

from sparsepath_vit.plugins import FeatureExtractor, eva_backbone


@pytest.mark.parametrize("side", [224, 250])
def test_pooled_features_from_a_function_and_by_name(model_folder, side, assert_agree):
    pixels = torch.randn(2, 3, side, side)
    expected = FeatureExtractor(model_folder)(pixels)
    arguments = {"source": str(model_folder)}
    assert_agree(ModelFromFunction(path=eva_backbone, arguments=arguments)(pixels), expected)
    assert_agree(ModelFromRegistry("pathology/sparsepath_vit", arguments)(pixels), expected)


def test_maps_of_layers_for_segmentation(model_folder, assert_agree):
    pixels = torch.randn(2, 3, 224, 224)
    arguments = {"source": str(model_folder), "arguments": {"prune_ratio": 0.0}}
    last_two = ModelFromRegistry("pathology/sparsepath_vit", {**arguments, "out_indices": 2})(pixels)
    assert [tuple(feature_map.shape) for feature_map in last_two] == [(2, 32, 14, 14)] * 2
    chosen = ModelFromRegistry("pathology/sparsepath_vit", {**arguments, "out_indices": (0, 3)})(pixels)
    assert_agree(chosen[1], last_two[1])
    assert_agree(last_two[1], FeatureExtractor(model_folder, prune_ratio=0.0).tokens(pixels)[1])


@pytest.mark.timeout(600)
def test_its_own_offline_evaluation_of_a_folder_of_slides(model_folder, tmp_path, own_features, assert_agree):
    """`eva predict_fit` with the configuration that lies in examples/, in one process, since each takes its time."""
    rows = ["path,target,split"]
    for number in range(4):
        tissue = (0, 0, 500, 470) if number % 2 else (40, 40, 420, 420)
        write_pyramid(tmp_path / f"{number}.tiff", stained_image(500, 470, [tissue]))
        rows.append(f"{number}.tiff,{number % 2},{'train' if number < 2 else 'val'}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    configuration = (ROOT / "examples/eva_offline.yaml").read_text()
    workers = "num_workers: ${oc.env:NUM_WORKERS, 4}"
    assert workers in configuration
    alone = "num_workers: 0\n        prefetch_factor: null\n        persistent_workers: false"
    (tmp_path / "eva.yaml").write_text(configuration.replace(workers, alone))
    settings = {
        **{"CHECKPOINT": str(model_folder), "IN_FEATURES": "32", "DATA_ROOT": str(tmp_path), "NUM_CLASSES": "2"},
        **{"N_RUNS": "1", "MAX_EPOCHS": "2", "REGION_SIZE": "224", "OUTPUT_ROOT": str(tmp_path / "out")},
        **{"ACCELERATOR": "cpu", "PREDICT_BATCH_SIZE": "4", "OMP_NUM_THREADS": "1"},
    }
    command = [sys.executable, "-m", "eva", "predict_fit", "--config", "eva.yaml"]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, **settings}, check=True)
    corners = [(x, y) for x in (0, 224) for y in (0, 224)]
    expected = own_features(tmp_path / "1.tiff", corners, 224, model_folder)
    found = torch.stack(torch.load(tmp_path / "out/embeddings/1.pt", weights_only=True)).numpy()
    assert_agree(found[found[:, 0].argsort()], expected[expected[:, 0].argsort()])
    (results,) = (tmp_path / "out").glob("*/results.json")
    assert "val/MulticlassAccuracy" in results.read_text()


def test_the_snippet_of_the_page_runs(run_snippet):
    run_snippet("eva")
