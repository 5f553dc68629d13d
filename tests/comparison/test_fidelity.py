# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import dataclasses

import pytest
import torch
from small_models import random_pixels, small_model

from sparsepath_vit import SparsePathViTForImageClassification, SparsePathViTModel
from sparsepath_vit.comparison import fidelity
from sparsepath_vit.comparison.fidelity import DenseDoesNotFit, compare_to_dense, other_draws, usual_variants
from sparsepath_vit.runtime.configured import configured
from studies.figures import plot_fidelity

ROWS, COLUMNS = 9, 12


@pytest.fixture(scope="module")
def model():
    return small_model(SparsePathViTModel)


@pytest.fixture(scope="module")
def inputs():
    return {"pixel_values": random_pixels(1, ROWS, COLUMNS)}


def test_cosines_are_those_of_the_outputs(model, inputs):
    _, result = compare_to_dense(model, inputs, [{"window_size": 2, "prune_ratio": 0.25}])
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
    _, result = compare_to_dense(model, inputs, [{"window_size": 6}])
    assert result.cls_cosine == pytest.approx(1, abs=1e-5)
    assert result.patch_cosine_p5 == pytest.approx(1, abs=1e-5)
    assert result.same_prediction is None


def test_masked_patches_take_no_part(model, inputs):
    mask = torch.ones(1, ROWS, COLUMNS, dtype=torch.bool)
    mask[0, :, 5:] = False
    _, masked = compare_to_dense(model, {**inputs, "patch_mask": mask}, [{"window_size": 2}])
    cropped = {"pixel_values": inputs["pixel_values"], "image_sizes": [(ROWS * 4, COLUMNS * 4)], "patch_mask": mask}
    _, same = compare_to_dense(model, cropped, [{"window_size": 2}])
    assert masked.tokens == 45
    costs = {"seconds": 0.0, "peak_bytes": 0}
    assert dataclasses.replace(masked, **costs) == dataclasses.replace(same, **costs)


def test_predictions_are_compared_and_the_model_is_left_as_it_was(inputs):
    classifier = small_model(SparsePathViTForImageClassification, num_labels=5, unprune="scatter", prune_ratio=0.5)
    before = classifier.config.to_dict()
    _, *results = compare_to_dense(classifier, inputs, [{"window_size": None, "prune_ratio": 0.0}, {"window_size": 1}])
    assert results[0].same_prediction is True
    assert results[1].kept_tokens == ROWS * COLUMNS / 2
    assert classifier.config.to_dict() == before
    assert [layer.attention.draw for layer in classifier.sparsepath_vit.encoder.layers] == [0, 1, 2, 3]
    classifier.classifier.weight.data.zero_()
    classifier.classifier.bias.data.zero_()
    sparse_cls = classifier(**inputs).logits  # all equal: the first class, for both
    assert sparse_cls.abs().max() == 0
    assert compare_to_dense(classifier, inputs)[1].same_prediction is True


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
    rows = [{name: str(value) for name, value in one.row().items()} for one in results + larger]
    plot_fidelity(rows, tmp_path / "fidelity.png")
    assert [path.name for path in tmp_path.iterdir()] == ["fidelity.png"]
    assert (tmp_path / "fidelity.png").stat().st_size > 10_000


def test_usual_variants_come_with_cost_and_centred_cosines_and_a_name(model, inputs):
    model.config.num_context_tokens = 60
    try:
        rows = compare_to_dense(model, inputs, usual_variants(model.config), estimates_error=True)
    finally:
        model.config.num_context_tokens = 0
    dense, local, stratified, pruned, both = rows
    assert [row.variant for row in rows] == [
        "dense",
        "w = 4",
        "w = 4, 60 context tokens",
        "w = 4, 60% pruned",
        "w = 4, 60 context tokens, 60% pruned, 1,024 representatives",
    ]
    assert dense.cls_cosine == pytest.approx(1) and dense.centred_patch_cosine_p5 == pytest.approx(1)
    assert local.cls_cosine < stratified.cls_cosine and local.centred_patch_cosine < stratified.centred_patch_cosine
    assert local.keys_per_query < stratified.keys_per_query < dense.keys_per_query + 20
    assert (local.kept_tokens, pruned.kept_tokens) == (108, 44) and both.kept_tokens > 44
    assert all(row.seconds > 0 and row.peak_bytes > 0 for row in rows)
    assert [row.estimated_cls_error is None for row in rows] == [True, True, False, True, False]


def test_self_similarity_is_the_mean_over_pairs_of_tokens(model, inputs):
    _, result = compare_to_dense(model, inputs)
    patches = torch.nn.functional.normalize(model(**inputs).last_hidden_state[0, 3:].double(), dim=1)
    cosines = patches @ patches.T
    expected = (cosines.sum() - cosines.trace()) / (len(patches) * (len(patches) - 1))
    assert result.self_similarity == pytest.approx(expected.item(), abs=1e-6)


@torch.no_grad()
def test_the_estimated_error_is_half_of_what_two_draws_differ_by(model, inputs):
    settings = {"window_size": 2, "num_context_tokens": 40}
    _, result = compare_to_dense(model, inputs, [settings], estimates_error=True)
    with configured(model, **settings):
        first = model(**inputs).last_hidden_state[:, 0]
        with other_draws(model):
            second = model(**inputs).last_hidden_state[:, 0]
        assert torch.equal(model(**inputs).last_hidden_state[:, 0], first)
    between = torch.nn.functional.cosine_similarity(first, second).item()
    assert result.estimated_cls_error == pytest.approx((1 - between) / 2, abs=1e-6)
    assert result.estimated_cls_error > 1e-4
