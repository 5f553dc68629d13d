# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import csv

import numpy as np
import pytest
import torch
from test_against_tiles import small_data

from sparsepath_vit import SparsePathViTConfig, SparsePathViTImageProcessor, SparsePathViTModel
from sparsepath_vit.runtime.configured import configured
from sparsepath_vit.runtime.pixels import prepare
from studies.against_tiles.datasets import TokenImage
from studies.prune_layers import __main__ as prune_layers
from studies.prune_layers import scores
from studies.prune_layers.targets import tumour_cells


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    config = SparsePathViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48, window_size=2, image_size=56,
        prune_after_layer=1, initializer_range=0.3, layerscale_value=1.0,
    )  # fmt: skip
    return SparsePathViTModel(config).eval(), SparsePathViTImageProcessor()


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (76, 104, 3), dtype=np.uint8)  # a last row of patches too thin


@pytest.mark.parametrize("kind", ["attention", "cls_attention", "attention_value"])
def test_the_scores_are_those_the_model_prunes_by(encoder, image, kind):
    model, processor = encoder
    found = {(layer, score): values for layer, score, values in scores.scores_of_layers(model, processor, image)}
    inputs = prepare(processor, [image])
    for layer in (1, 2, 3):
        with torch.no_grad(), configured(model, prune_after_layer=layer, prune_ratio=0.5, prune_score=kind):
            outputs = model(**inputs)
        expected = outputs.prune_scores[0].view(*outputs.grid_sizes[0].tolist())
        present = inputs["patch_mask"][0].numpy()
        np.testing.assert_allclose(found[layer, kind][present], expected.numpy()[present], rtol=1e-5)
        assert np.isnan(found[layer, kind][~present]).all() and not present.all()


def test_a_value_that_all_tokens_share_counts_for_nothing_once_centred(encoder, image):
    model, processor = encoder
    before = {(layer, score): values for layer, score, values in scores.scores_of_layers(model, processor, image)}
    with torch.no_grad():
        model.encoder.layers[0].attention.qkv.bias[64:] += 5.0  # of the values
    after = {(layer, score): values for layer, score, values in scores.scores_of_layers(model, processor, image)}
    np.testing.assert_allclose(after[1, scores.CENTRED], before[1, scores.CENTRED], rtol=1e-3)
    assert np.nanmin(after[1, "attention_value"] / before[1, "attention_value"]) > 1.5


def test_saturation_by_hand():
    image = np.zeros((28, 30, 3), dtype=np.uint8)
    image[:14, :14] = (200, 100, 150)
    image[:14, 14:28] = 77
    image[14:, :, 0] = 9
    expected = [[0.5, 0.0, 0.0], [1.0, 1.0, 1.0]]
    np.testing.assert_allclose(scores.saturation(image, 14), expected)


def test_areas_are_those_of_the_labelled_tokens(encoder, image):
    values = scores.saturation(image, 14)[:4, :4]
    order = values.ravel().argsort()
    rows, columns = np.unravel_index(order, values.shape)
    labels = (np.arange(16) >= 8).astype(np.int64)  # the more saturated half
    areas = scores.areas_of_image(*encoder, TokenImage("a", image, rows, columns, labels))
    assert areas[0, "saturation"] == 1.0 and len(areas) == 1 + 3 * len(scores.SCORES)
    assert all(0 <= area <= 1 for area in areas.values())


def test_cells_of_two_kinds(tmp_path):
    image = next(tumour_cells(small_data(tmp_path), 14))
    places = zip(image.rows.tolist(), image.columns.tolist(), image.labels.tolist(), strict=True)
    assert sorted(places) == [(1, 1, 0), (3, 3, 1), (4, 4, 0)]


def test_each_layer_and_score_has_its_row(encoder, tmp_path, run_script):
    model, processor = encoder
    for one in (model, processor):
        one.save_pretrained(tmp_path / "model")
    given = {"--data-dir": small_data(tmp_path / "data"), "--model-name-or-path": tmp_path / "model"}
    given |= {"--targets": "nuclei,tumour cells", "--out": tmp_path / "out"}
    run_script(prune_layers, *(str(text) for option in given.items() for text in option))
    with (tmp_path / "out/prune_layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (1 + 3 * len(scores.SCORES)) and all(row["images"] == "6" and row["commit"] for row in rows)
    with pytest.raises(SystemExit, match="--targets glands unknown"):
        run_script(prune_layers, "--data-dir", str(tmp_path), "--targets", "glands")
