# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""kaiko-eva 0.4.5."""

import pytest
import torch

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


def test_the_snippet_of_the_page_runs(run_snippet):
    run_snippet("eva")
