# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The models against a network written out from the definition, and what they promise about their outputs."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_vit import plain_forward
from small_models import random_mask, random_pixels, small_model
from torch import nn

from sparsepath_vit import SparsePathViTBackbone, SparsePathViTForImageClassification, SparsePathViTModel
from sparsepath_vit.model import encoder_sparsepath_vit as encoder
from sparsepath_vit.model import token_pruning

MODELS = [SparsePathViTModel, SparsePathViTForImageClassification, SparsePathViTBackbone]
IMPLEMENTATIONS = ("eager", "sdpa", "block_sparse")


def assert_close(actual, expected, tolerance=2e-6):
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max()
    assert error <= tolerance * expected.abs().max(), f"error {error:.1e}"


def positions_of(outputs, image):
    return [tuple(position) for position in outputs.patch_positions[image].tolist() if position[0] >= 0]


def check_image(outputs, image, plain, config):
    """All outputs of one image of a batch, padding included."""

    def check_tokens(tokens, expected):
        assert_close(tokens[image, : len(expected)], expected, 1e-10)
        assert not tokens[image, len(expected) :].any()

    check_tokens(outputs.last_hidden_state, plain.last_hidden_state)
    assert_close(outputs.pooler_output[image], plain.pooler_output)  # the mean runs in float32
    assert positions_of(outputs, image) == plain.positions
    assert (outputs.patch_positions[image, len(plain.positions) :] == -1).all()
    assert len(outputs.hidden_states) == config.num_hidden_layers + 1
    for tokens, expected in zip(outputs.hidden_states, plain.hidden_states, strict=True):
        check_tokens(tokens, expected)
    for weights, expected in zip(outputs.attentions, plain.attentions, strict=True):
        tokens = expected.shape[-1]
        assert_close(weights[image, :, :tokens, :tokens], expected, 1e-10)
        assert not weights[image, :, tokens:].any() and not weights[image, :, :, tokens:].any()
    if plain.prune_scores is None:
        assert outputs.prune_scores is None
        return
    rows, columns = outputs.grid_sizes.amax(dim=0).tolist()
    scores = torch.zeros(rows, columns, dtype=torch.float64)
    for token, score in plain.prune_scores.items():
        scores[token] = score
    assert_close(outputs.prune_scores[image].view(rows, columns), scores)


SETTINGS = {
    "mlp_type": st.sampled_from(["gelu", "swiglu"]),
    "qkv_bias": st.booleans(),
    "use_layerscale": st.booleans(),
    "num_register_tokens": st.sampled_from([0, 2]),
    "pooling": st.sampled_from(["cls", "cls_mean"]),
    "window_size": st.sampled_from([None, 2, 3, 4]),
    "neighbor_radius": st.sampled_from([0, 1]),
    "prune_after_layer": st.sampled_from([1, 2, 3]),
    "prune_ratio": st.sampled_from([0.0, 0.3, 0.6]),
    "prune_score": st.sampled_from(["attention", "cls_attention", "attention_value"]),
}


@st.composite
def configurations(draw):
    drawn = draw(st.fixed_dictionaries(SETTINGS))
    prefixes = [0, 1, 1 + drawn["num_register_tokens"]]
    return {**drawn, "num_prefix_position_embeddings": draw(st.sampled_from(prefixes)), "num_hidden_layers": 3}


@torch.no_grad()
@settings(max_examples=50)
@given(
    configurations(),
    st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=3),
    st.sampled_from([None, 0.3, 0.7]),
    st.integers(0, 99),
)
def test_every_output_follows_the_definition(configuration, sizes, share, seed):
    """Images of different sizes and masks in one batch, each equal to the written-out network on it alone."""
    model = small_model(SparsePathViTModel, seed=seed, **configuration).double()
    rows, columns = max(row for row, _ in sizes), max(column for _, column in sizes)
    pixels = random_pixels(len(sizes), rows, columns, seed).double()
    mask = None if share is None else random_mask(len(sizes), rows, columns, share, seed)
    if mask is not None:
        mask[:, 0, 0] = True  # in every image, however small
    image_sizes = [(4 * row, 4 * column) for row, column in sizes]
    model.set_attn_implementation("eager")
    outputs = model(pixels, mask, image_sizes, output_hidden_states=True, output_attentions=True)
    assert outputs.grid_sizes.tolist() == [list(size) for size in sizes]
    for image, (row, column) in enumerate(sizes):
        image_mask = None if mask is None else mask[image, :row, :column]
        plain = plain_forward(model, pixels[image, :, : 4 * row, : 4 * column], image_mask)
        check_image(outputs, image, plain, model.config)
    model.set_attn_implementation("block_sparse")
    sparse = model(pixels, mask, image_sizes)
    assert_close(sparse.last_hidden_state, outputs.last_hidden_state, 1e-9)
    assert torch.equal(sparse.patch_positions, outputs.patch_positions)


class TestExactness:
    @torch.no_grad()
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_blocks_of_8_at_224_px_are_dense_attention(self, implementation):
        settings = {"patch_size": 14, "image_size": 224, "num_register_tokens": 8}
        sparse = small_model(SparsePathViTModel, window_size=8, **settings)
        dense = small_model(SparsePathViTModel, window_size=None, **settings)
        sparse.set_attn_implementation(implementation)
        dense.set_attn_implementation("sdpa")
        pixels = random_pixels(1, 16, 16, patch_size=14)
        assert_close(sparse(pixels).last_hidden_state, dense(pixels).last_hidden_state, 2e-6)
        larger = random_pixels(1, 17, 16, patch_size=14)  # three block rows: no longer
        assert (sparse(larger)[0] - dense(larger)[0]).abs().max() > 1e-2

    @torch.no_grad()
    def test_without_pruning_nothing_is_gathered(self, monkeypatch):
        def refuse(*arguments, **keywords):
            raise AssertionError("tokens were scored or gathered")

        monkeypatch.setattr(encoder, "prune_scores", refuse)
        for name in ("kept_tokens", "select_tokens"):
            monkeypatch.setattr(token_pruning, name, refuse)
        outputs = small_model(SparsePathViTModel, prune_ratio=0.0)(random_pixels(2, 9, 7))
        assert outputs.prune_scores is None
        assert outputs.patch_positions[1].tolist() == [[row, column] for row in range(9) for column in range(7)]
        with pytest.raises(AssertionError, match="tokens were scored"):
            small_model(SparsePathViTModel, prune_ratio=0.1)(random_pixels(2, 9, 7))

    @torch.no_grad()
    def test_a_ratio_that_removes_no_whole_token_changes_nothing(self):
        pixels = random_pixels(2, 5, 5)
        pruned = small_model(SparsePathViTModel, prune_ratio=0.03)(pixels)  # floor(0.03 * 25) = 0
        full = small_model(SparsePathViTModel, prune_ratio=0.0)(pixels)
        assert torch.equal(pruned.last_hidden_state, full.last_hidden_state)


class TestAbsentTokens:
    @torch.no_grad()
    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("prune_ratio", [0.0, 0.5])
    def test_pixels_of_absent_patches_change_nothing(self, implementation, prune_ratio):
        model = small_model(SparsePathViTModel, prune_ratio=prune_ratio, pooling="cls_mean")
        model.set_attn_implementation(implementation)
        pixels, mask = random_pixels(2, 9, 7), random_mask(2, 9, 7, 0.6)
        is_absent = ~mask.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)[:, None]
        changed = torch.where(is_absent, 100 * random_pixels(2, 9, 7, seed=1), pixels)
        outputs, other = model(pixels, mask), model(changed, mask)
        for name in ("last_hidden_state", "pooler_output", "patch_positions"):
            assert torch.equal(outputs[name], other[name])
        assert (model(changed)[0] - model(pixels)[0]).abs().max() > 1e-2

    @torch.no_grad()
    def test_pixels_outside_an_image_change_nothing(self):
        model = small_model(SparsePathViTModel, prune_ratio=0.5)
        pixels, sizes = random_pixels(2, 9, 7), torch.tensor([(36, 28), (20, 16)])
        changed = pixels.clone()
        changed[1, :, 20:] = 50.0
        changed[1, :, :, 16:] = -50.0
        assert torch.equal(model(pixels, image_sizes=sizes)[0], model(changed, image_sizes=sizes)[0])


class TestDenseMap:
    @torch.no_grad()
    @pytest.mark.parametrize("fill", [0.0, -3.0])
    def test_kept_tokens_lie_at_their_positions_and_fill_elsewhere(self, fill):
        model = small_model(SparsePathViTModel, prune_ratio=0.4)
        outputs = model(random_pixels(2, 6, 7), random_mask(2, 6, 7, 0.5), [(24, 28), (20, 12)])
        dense_map = outputs.to_dense_map(fill)
        expected = torch.full((2, 32, 6, 7), fill)
        for image in range(2):
            for index, (row, column) in enumerate(positions_of(outputs, image)):
                expected[image, :, row, column] = outputs.last_hidden_state[image, 3 + index]
        assert torch.equal(dense_map, expected)

    def test_gradients_flow_back(self):
        model = small_model(SparsePathViTModel, prune_ratio=0.4)
        model(random_pixels(1, 4, 4)).to_dense_map().square().sum().backward()
        assert model.embeddings.patch_embeddings.projection.weight.grad.abs().sum() > 0


class TestClassifier:
    @torch.no_grad()
    @pytest.mark.parametrize("pooling", ["cls", "cls_mean"])
    def test_logits_are_a_linear_map_of_the_pooled_features(self, pooling):
        model = small_model(SparsePathViTForImageClassification, num_labels=5, pooling=pooling, prune_ratio=0.5)
        pixels, mask = random_pixels(2, 5, 6), random_mask(2, 5, 6, 0.7)
        outputs, features = model(pixels, patch_mask=mask), model.sparsepath_vit(pixels, mask)
        expected = features.pooler_output @ model.classifier.weight.T + model.classifier.bias
        assert_close(outputs.logits, expected)
        for name in ("patch_positions", "grid_sizes", "prune_scores"):
            assert torch.equal(outputs[name], features[name])

    LOSSES = [
        ("single_label_classification", torch.tensor([0, 2]), nn.functional.cross_entropy),
        ("multi_label_classification", torch.tensor([[0.0, 1, 1], [1, 0, 1]]), nn.BCEWithLogitsLoss()),
        ("regression", torch.tensor([[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]]), nn.functional.mse_loss),
    ]

    @torch.no_grad()
    @pytest.mark.parametrize("problem_type, labels, loss", LOSSES)
    def test_the_loss_is_that_of_the_problem_type(self, problem_type, labels, loss):
        model = small_model(SparsePathViTForImageClassification, num_labels=3, problem_type=problem_type)
        outputs = model(random_pixels(2, 3, 3), labels=labels)
        torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))
        assert model(random_pixels(2, 3, 3)).loss is None

    @torch.no_grad()
    @pytest.mark.parametrize("problem_type, labels, loss", LOSSES[:2])
    def test_the_problem_type_is_inferred_from_the_labels(self, problem_type, labels, loss):
        model = small_model(SparsePathViTForImageClassification, num_labels=3)
        outputs = model(random_pixels(2, 3, 3), labels=labels)
        torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))
        assert model.config.problem_type == problem_type

    @torch.no_grad()
    def test_without_labels_in_the_config_the_logits_are_the_pooled_features(self):
        model = small_model(SparsePathViTForImageClassification, num_labels=0)
        pixels = random_pixels(1, 3, 3)
        assert torch.equal(model(pixels).logits, model.sparsepath_vit(pixels).pooler_output)


class TestBackbone:
    @torch.no_grad()
    @pytest.mark.parametrize("apply_layernorm", [True, False])
    @pytest.mark.parametrize("stages", [["stem"], ["stage4"], ["stage1", "stage2", "stage3"], ["stem", "stage4"]])
    def test_feature_maps_are_the_hidden_states_of_their_layers(self, stages, apply_layernorm):
        backbone = small_model(SparsePathViTBackbone, out_features=stages, apply_layernorm=apply_layernorm)
        outputs = backbone(random_pixels(2, 9, 7), output_hidden_states=True)
        assert backbone.channels == [32] * len(stages)
        for stage, feature_map in zip(stages, outputs.feature_maps, strict=True):
            tokens = outputs.hidden_states[backbone.stage_names.index(stage)]
            tokens = backbone.norm(tokens) if apply_layernorm else tokens
            assert torch.equal(feature_map, tokens[:, 3:].transpose(1, 2).reshape(2, 32, 9, 7))

    @torch.no_grad()
    def test_its_hidden_states_are_the_models(self):
        backbone, model = small_model(SparsePathViTBackbone), small_model(SparsePathViTModel)
        pixels = random_pixels(1, 5, 6)
        outputs = backbone(pixels, output_hidden_states=True)
        expected = model(pixels, output_hidden_states=True)
        assert len(outputs.hidden_states) == 5
        for states, wanted in zip(outputs.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(states, wanted)
        assert torch.equal(outputs.feature_maps[0], expected.to_dense_map())
        assert backbone(pixels).hidden_states is None

    @torch.no_grad()
    def test_with_pruning_removed_tokens_keep_their_last_features(self):
        stages = ["stage1", "stage2", "stage3", "stage4"]
        backbone = small_model(SparsePathViTBackbone, out_features=stages, prune_ratio=0.5)
        model = small_model(SparsePathViTModel, prune_ratio=0.5)
        pixels, mask = random_pixels(2, 6, 5), random_mask(2, 6, 5, 0.7)
        outputs = model(pixels, mask, output_hidden_states=True)
        feature_maps = backbone(pixels, mask).feature_maps
        for image in range(2):
            present = [tuple(token) for token in mask[image].nonzero().tolist()]
            kept = positions_of(outputs, image)
            for stage, feature_map in enumerate(feature_maps, start=1):
                expected = torch.zeros(6, 5, 32)
                for layer, tokens in [(min(stage, 2), present)] + [(stage, kept)] * (stage > 2):
                    for index, token in enumerate(tokens):
                        expected[token] = model.norm(outputs.hidden_states[layer][image, 3 + index])
                assert_close(feature_map[image], expected.permute(2, 0, 1))

    @torch.no_grad()
    def test_negative_indices_and_attentions(self):
        backbone = small_model(SparsePathViTBackbone, out_indices=[-2, -1])
        backbone.set_attn_implementation("eager")
        outputs = backbone(random_pixels(1, 3, 3), output_attentions=True)
        assert backbone.out_features == ["stage3", "stage4"]
        assert len(outputs.feature_maps) == 2 and len(outputs.attentions) == 4


class TestBoundedMemory:
    @torch.no_grad()
    def test_an_image_embedded_in_strips_gives_the_same_features(self, monkeypatch):
        model = small_model(SparsePathViTModel, prune_ratio=0.3)
        pixels = random_pixels(1, 40, 6)  # more than one strip of 32 token rows
        in_strips = model(pixels)
        monkeypatch.setattr("sparsepath_vit.model.embeddings.ROWS_PER_STRIP", 40)
        at_once = model(pixels)
        assert torch.equal(in_strips.patch_positions, at_once.patch_positions)
        assert_close(in_strips.last_hidden_state, at_once.last_hidden_state, 1e-5)

    @torch.no_grad()
    def test_removed_tokens_leave_memory(self):
        """Regression: the tokens before pruning were kept until the end, beside those that were left."""
        layers, alive = (model := small_model(SparsePathViTModel, prune_ratio=0.5)).encoder.layers, []
        layers[1].register_forward_hook(lambda module, arguments, outputs: alive.append(weakref.ref(outputs[0])))
        layers[3].register_forward_pre_hook(lambda module, arguments: alive.append(alive[0]() is not None))
        model(random_pixels(1, 6, 6))
        assert alive[1:] == [False]


class TestWarnings:
    FAILING = {"prune_ratio": 0.85, "prune_after_layer": 1, "window_size": 2}

    def test_known_failures_are_warned_of_once(self, warnings_said):
        model = small_model(SparsePathViTModel, **self.FAILING)
        said = warnings_said(lambda: [model(random_pixels(1, 5, 5)) for _ in range(3)])
        assert len(said) == 3
        for name, value in self.FAILING.items():
            assert sum(f"{name}={value}: " in sentence and "observed" in sentence for sentence in said) == 1

    def test_ordinary_settings_are_silent(self, warnings_said):
        model = small_model(SparsePathViTModel, prune_ratio=0.6)
        assert not warnings_said(lambda: model(random_pixels(1, 9, 9)))

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_a_dense_implementation_that_needs_too_much_memory(self, implementation, monkeypatch, warnings_said):
        monkeypatch.setattr("sparsepath_vit.model.device_memory.available_memory", lambda device: 2**10)
        model = small_model(SparsePathViTModel)
        assert not warnings_said(lambda: model(random_pixels(1, 13, 13)))
        model.set_attn_implementation(implementation)
        (said,) = warnings_said(lambda: model(random_pixels(1, 13, 13)))
        assert f"attn_implementation={implementation!r} needs about" in said and "GiB are free" in said
        assert "block_sparse" in said and "window_size=8" in said


class TestBadInput:
    def test_attentions_need_the_eager_implementation(self):
        model = small_model(SparsePathViTModel)
        message = r"output_attentions=True needs .*'block_sparse', call model.set_attn_implementation\(\"eager\"\)"
        with pytest.raises(ValueError, match=message):
            model(random_pixels(1, 3, 3), output_attentions=True)

    @pytest.mark.parametrize(
        "model_class", [SparsePathViTModel, SparsePathViTForImageClassification, SparsePathViTBackbone]
    )
    def test_every_model_refuses_bad_pixels_masks_and_sizes(self, model_class):
        model = small_model(model_class)
        pixels = random_pixels(2, 3, 3)
        for message, arguments in [
            ("smaller than one patch", {"pixel_values": pixels[..., :3]}),
            ("no multiple of patch_size=4", {"pixel_values": pixels[..., :9]}),
            ("NaN", {"pixel_values": pixels.log()}),
            ("without a present patch token", {"patch_mask": torch.zeros(2, 3, 3, dtype=torch.bool)}),
            ("image_sizes is", {"image_sizes": [(12, 12), (13, 12)]}),
        ]:
            with pytest.raises(ValueError, match=message):
                model(**{"pixel_values": pixels, **arguments})
