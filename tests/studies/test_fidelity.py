# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import dataclasses

import pytest
import torch
from small_models import random_pixels, small_model

from sparsepath_vit import SparsePathViTForImageClassification, SparsePathViTModel
from sparsepath_vit.model.attention_specification import attention_pattern
from sparsepath_vit.model.token_grid import TokenGrid
from studies.fidelity import comparison as fidelity
from studies.fidelity.comparison import DenseDoesNotFit, compare_to_dense
from studies.figures import plot_fidelity

ROWS, COLUMNS = 9, 12


@pytest.fixture(scope="module")
def model():
    return small_model(SparsePathViTModel)


@pytest.fixture(scope="module")
def inputs():
    return {"pixel_values": random_pixels(1, ROWS, COLUMNS)}


def masses_from_the_definition(model, pixel_values, window_size, is_kept):
    """Attention probabilities of the dense model ("eager"), summed over the specification's pattern."""
    model.set_attn_implementation("eager")
    model.config.window_size = None
    attentions = model(pixel_values, output_attentions=True).attentions
    model.config.window_size = 4
    model.set_attn_implementation("block_sparse")
    grid = TokenGrid.create([(ROWS, COLUMNS)], num_global_tokens=3, window_size=window_size)
    order = grid.raster_permutation()
    seen = attention_pattern(grid)[0][order][:, order]
    masses = []
    for layer, weights in enumerate(attentions, start=1):
        present = torch.cat([torch.ones(3, dtype=torch.bool), is_kept | (layer <= 2)])
        inside = (weights[0].mean(dim=0) * (seen & present)).sum(dim=1)
        masses.append(inside[3:][present[3:]].mean().item())
    return masses


@pytest.mark.parametrize("prune_ratio", [0.0, 0.5])
def test_the_attention_mass_is_that_of_the_specification(model, inputs, prune_ratio):
    (result,) = compare_to_dense(model, inputs, [{"window_size": 2, "prune_ratio": prune_ratio}])
    model.config.window_size, model.config.prune_ratio = 2, prune_ratio
    kept = model(**inputs).patch_positions[0]
    model.config.window_size, model.config.prune_ratio = 4, 0.0
    is_kept = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    is_kept[kept[:, 0], kept[:, 1]] = True
    expected = masses_from_the_definition(model, inputs["pixel_values"], 2, is_kept.reshape(-1))
    assert result.attention_mass == pytest.approx(expected, abs=1e-5)
    assert result.kept_tokens == ROWS * COLUMNS * (1 - prune_ratio)
    assert max(expected) < 0.95  # else the comparison says little


def test_cosines_are_those_of_the_outputs(model, inputs):
    (result,) = compare_to_dense(model, inputs, [{"window_size": 2, "prune_ratio": 0.25}])
    model.config.window_size = None
    dense = model(**inputs)
    model.config.window_size, model.config.prune_ratio = 2, 0.25
    sparse = model(**inputs)
    model.config.window_size, model.config.prune_ratio = 4, 0.0
    dense_map = dense.to_dense_map()[0]
    places = sparse.patch_positions[0]
    dense_patches = dense_map[:, places[:, 0], places[:, 1]].T
    expected = torch.nn.functional.cosine_similarity(dense_patches, sparse.last_hidden_state[0, 3:], dim=-1)
    assert result.patch_cosine == pytest.approx(expected.mean().item(), abs=1e-5)
    assert result.patch_cosine_p5 == pytest.approx(expected.quantile(0.05).item(), abs=1e-5)
    cls = torch.nn.functional.cosine_similarity(dense.pooler_output, sparse.pooler_output)
    assert result.cls_cosine == pytest.approx(cls.item(), abs=1e-5)
    assert result.cls_cosine < 0.999


def test_where_the_neighbourhood_covers_the_image_sparse_is_dense(model, inputs):
    (result,) = compare_to_dense(model, inputs, [{"window_size": 6}])
    assert result.cls_cosine == pytest.approx(1, abs=1e-5)
    assert result.patch_cosine_p5 == pytest.approx(1, abs=1e-5)
    assert result.attention_mass == pytest.approx([1] * 4, abs=1e-5)
    assert result.same_prediction is None


def test_masked_patches_take_no_part(model, inputs):
    mask = torch.ones(1, ROWS, COLUMNS, dtype=torch.bool)
    mask[0, :, 5:] = False
    (masked,) = compare_to_dense(model, {**inputs, "patch_mask": mask}, [{"window_size": 2}])
    cropped = {"pixel_values": inputs["pixel_values"], "image_sizes": [(ROWS * 4, COLUMNS * 4)], "patch_mask": mask}
    (same,) = compare_to_dense(model, cropped, [{"window_size": 2}])
    assert masked.tokens == 45
    assert masked == same


def test_fewer_queries_estimate_the_same_mass(model, inputs):
    (every,) = compare_to_dense(model, inputs, [{"window_size": 2}])
    (some,) = compare_to_dense(model, inputs, [{"window_size": 2}], max_queries=40)
    assert some.attention_mass != every.attention_mass
    assert some.attention_mass == pytest.approx(every.attention_mass, abs=0.1)


def test_predictions_are_compared_and_the_model_is_left_as_it_was(inputs):
    classifier = small_model(SparsePathViTForImageClassification, num_labels=5, unprune="scatter", prune_ratio=0.5)
    before = classifier.config.to_dict()
    results = compare_to_dense(classifier, inputs, [{"window_size": None, "prune_ratio": 0.0}, {"window_size": 1}])
    assert results[0].same_prediction is True
    assert results[1].kept_tokens == ROWS * COLUMNS / 2
    assert classifier.config.to_dict() == before
    assert not any(layer.attention._forward_pre_hooks for layer in classifier.sparsepath_vit.encoder.layers)
    classifier.classifier.weight.data.zero_()
    classifier.classifier.bias.data.zero_()
    sparse_cls = classifier(**inputs).logits  # all equal: the first class, for both
    assert sparse_cls.abs().max() == 0
    assert compare_to_dense(classifier, inputs)[0].same_prediction is True


def test_dense_is_refused_where_it_does_not_fit_and_the_size_named_does_fit(model, monkeypatch):
    monkeypatch.setattr(fidelity, "free_bytes", lambda device: 2**30)
    model.set_attn_implementation("eager")
    try:
        with pytest.raises(DenseDoesNotFit, match=r"largest square that fits is (\d+) x") as refusal:
            compare_to_dense(model, {"pixel_values": torch.zeros(1, 3, 1200, 1200)})
        side = int(str(refusal.value).split("fits is ")[1].split(" x")[0])
        fidelity.check_dense_fits(model.config, (side, side), model.dtype, model.device)
        with pytest.raises(DenseDoesNotFit):
            fidelity.check_dense_fits(model.config, (side + 4, side + 4), model.dtype, model.device)
    finally:
        model.set_attn_implementation("block_sparse")
    fidelity.check_dense_fits(model.config, (1200, 1200), model.dtype, model.device)  # not materialised: linear


def test_several_images_are_refused(model):
    with pytest.raises(ValueError, match="one at a time"):
        compare_to_dense(model, {"pixel_values": random_pixels(2, 4, 4)})


def test_the_plot_shows_every_variant(model, inputs, tmp_path):
    results = compare_to_dense(model, inputs, [{"window_size": 2}, {"window_size": 2, "prune_ratio": 0.5}])
    larger = [dataclasses.replace(result, size=(80, 80)) for result in results]
    plot_fidelity(results + larger, tmp_path / "fidelity.png")
    assert [path.name for path in tmp_path.iterdir()] == ["fidelity.png"]
    assert (tmp_path / "fidelity.png").stat().st_size > 10_000
