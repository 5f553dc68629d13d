# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The configuration: defaults, round trips, and an error that names value and remedy for every impossible one."""

import copy
import json
import pickle
import re

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from small_models import small_config

from sparsepath_vit import SparsePathViTConfig
from sparsepath_vit.model.configuration_sparsepath_vit import _FIELD_CHECKS, failure_signatures

UNI2_H = {
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "intermediate_size": 4096,
    "mlp_type": "swiglu",
    "num_register_tokens": 8,
    "patch_size": 14,
    "image_size": 224,
    "num_prefix_position_embeddings": 0,
    "use_layerscale": True,
    "qkv_bias": True,
}
METHOD = {
    "window_size": 8,
    "neighbor_radius": 1,
    "prune_after_layer": 4,
    "prune_ratio": 0.0,
    "prune_score": "attention",
}


def test_defaults_are_uni2_h_with_blocks_and_without_pruning():
    config = SparsePathViTConfig()
    assert {name: getattr(config, name) for name in UNI2_H | METHOD} == UNI2_H | METHOD
    assert (config.num_global_tokens, config.head_dim, config.prune_score) == (9, 64, "attention")


def test_pooled_size_follows_the_pooling():
    assert small_config(pooling="cls").pooled_size == 32
    assert small_config(pooling="cls_mean").pooled_size == 64


class TestRoundTrip:
    CHANGED = {
        "window_size": None,
        "prune_ratio": 0.6,
        "prune_after_layer": 3,
        "prune_score": "attention_value",
        "pooling": "cls_mean",
        "mlp_type": "gelu",
        "num_prefix_position_embeddings": 3,
        "out_indices": [1, 4],
        "num_labels": 7,
        "problem_type": "regression",
    }

    def test_saved_and_loaded_it_is_the_same(self, tmp_path):
        config = small_config(**self.CHANGED)
        config.save_pretrained(tmp_path)
        loaded = SparsePathViTConfig.from_pretrained(tmp_path)
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
        assert loaded.out_features == ["stage1", "stage4"]
        assert (loaded.window_size, loaded.prune_ratio, loaded.num_labels) == (None, 0.6, 7)

    def test_the_file_holds_plain_fields_and_the_full_auto_map(self, tmp_path):
        small_config().save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "config.json").read_text())
        assert not [name for name in stored if name.startswith("_")]
        assert stored["model_type"] == "sparsepath_vit"
        assert set(stored["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoBackbone"}
        assert stored["prune_ratio"] == 0.0  # defaults are written out: later defaults must not change old checkpoints

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
    def test_copies_are_equal_and_independent(self, duplicate):
        config = small_config(**self.CHANGED)
        other = duplicate(config)
        assert other.to_dict() == config.to_dict()
        other.window_size = 2
        assert config.window_size is None
        with pytest.raises(ValueError, match="window_size=0"):
            other.window_size = 0

    def test_overrides_are_checked_together(self, tmp_path):
        """Regression: prune_ratio=0.5 was refused because of the stored prune_after_layer, whatever came with it."""
        small_config(prune_after_layer=9).save_pretrained(tmp_path)
        loaded = SparsePathViTConfig.from_pretrained(tmp_path, prune_ratio=0.5, prune_after_layer=2)
        assert (loaded.prune_ratio, loaded.prune_after_layer) == (0.5, 2)
        with pytest.raises(ValueError, match="prune_after_layer=9 lies outside"):
            SparsePathViTConfig.from_pretrained(tmp_path, prune_ratio=0.5)

    def test_overriding_the_depth_renames_the_stages(self, tmp_path):
        """Regression: a backbone cut to its first layers still listed the stages of the whole network."""
        small_config().save_pretrained(tmp_path)
        loaded = SparsePathViTConfig.from_pretrained(tmp_path, num_hidden_layers=2)
        assert loaded.stage_names == ["stem", "stage1", "stage2"]
        assert loaded.out_features == ["stage2"]
        small_config(out_features=["stage1", "stage2"]).save_pretrained(tmp_path)
        loaded = SparsePathViTConfig.from_pretrained(tmp_path, num_hidden_layers=3)
        assert loaded.out_features == ["stage1", "stage2"]

    def test_unknown_arguments_are_returned_when_asked_for(self, tmp_path):
        small_config().save_pretrained(tmp_path)
        config, unused = SparsePathViTConfig.from_pretrained(
            tmp_path, window_size=2, something=1, return_unused_kwargs=True
        )
        assert (config.window_size, unused) == (2, {"something": 1})


class TestBackbone:
    @pytest.mark.parametrize(
        "given, features, indices",
        [
            ({}, ["stage4"], [4]),
            ({"out_features": ["stem", "stage2"]}, ["stem", "stage2"], [0, 2]),
            ({"out_indices": [1, -1]}, ["stage1", "stage4"], [1, -1]),
            ({"out_features": ["stage3"], "out_indices": [3]}, ["stage3"], [3]),
        ],
    )
    def test_features_and_indices_follow_each_other(self, given, features, indices):
        config = small_config(**given)
        assert config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
        assert (config.out_features, config.out_indices) == (features, indices)

    @pytest.mark.parametrize(
        "given", [{"out_features": ["stage5"]}, {"out_indices": [5]}, {"out_features": ["stage1"], "out_indices": [2]}]
    )
    def test_stages_that_do_not_exist_or_contradict(self, given):
        with pytest.raises(ValueError, match=r"out_features|out_indices"):
            small_config(**given)


IMPOSSIBLE = [
    ("window_size", 0, "window_size=0 is not possible.*Use 8.*None for dense"),
    ("window_size", -8, "window_size=-8 is not possible.*Use 8"),
    ("prune_ratio", 1.0, r"prune_ratio=1.0 is not possible.*\[0, 1\).*Use 0.6"),
    ("prune_ratio", -0.1, r"prune_ratio=-0.1 is not possible.*0.0 to keep every token"),
    ("prune_after_layer", 0, "prune_after_layer=0 is not possible.*count from 1"),
    ("num_context_tokens", -1, r"num_context_tokens=-1 is not possible.*is the pattern of the paper"),
    (
        "num_representatives",
        -1,
        r"num_representatives=-1 is not possible.*is the pruning of the paper",
    ),
    ("image_std", [0.2, 0.0, 0.2], r"image_std=\[0.2, 0.0, 0.2\] is not possible.*divided by it"),
    ("neighbor_radius", -1, "neighbor_radius=-1 is not possible.*0 is the own block"),
    ("num_register_tokens", -1, "num_register_tokens=-1.*Use 0"),
    ("hidden_size", 0, "hidden_size=0.*at least 1"),
    ("num_hidden_layers", 0, "num_hidden_layers=0.*at least 1"),
    ("num_attention_heads", 0, "num_attention_heads=0.*at least 1"),
    ("num_attention_heads", 3, "hidden_size=32 is not divisible by num_attention_heads=3"),
    ("intermediate_size", 0, "intermediate_size=0.*at least 1"),
    ("num_prefix_position_embeddings", -1, "num_prefix_position_embeddings=-1.*Use 0"),
    ("num_prefix_position_embeddings", 2, r"num_prefix_position_embeddings=2 does not fit.*0 .*1 .*or 3"),
    ("patch_size", 0, "patch_size=0.*8, 14 or 16"),
    ("image_size", 0, "image_size=0.*at least 1"),
    ("image_size", 3, "image_size=3 is smaller than patch_size=4"),
    ("num_channels", 0, "num_channels=0.*RGB"),
    ("tokens_per_strip", -1, "tokens_per_strip=-1.*0 runs"),
    ("mlp_type", "relu", "mlp_type='relu' is unknown: choose one of 'gelu', 'swiglu'"),
    ("pooling", "mean", "pooling='mean' is unknown: choose one of 'cls', 'cls_mean'"),
    ("unprune", "gather", "unprune='gather' is unknown: use 'scatter', or None"),
    ("prune_score", "norm", "prune_score='norm' is unknown: choose one of 'attention', 'cls_attention'"),
    ("position_interpolation_offset", 1.0, r"position_interpolation_offset=1.0 is not possible.*Use 0.1.*0.0"),
    ("position_interpolation_offset", -0.1, r"position_interpolation_offset=-0.1 is not possible.*\[0, 1\)"),
    ("hidden_dropout", 1.0, "hidden_dropout=1.0 is not possible"),
    ("attention_dropout", -0.1, "attention_dropout=-0.1 is not possible"),
    ("drop_path_rate", 1.5, "drop_path_rate=1.5 is not possible"),
]


class TestBadInput:
    def test_every_checked_field_is_tested(self):
        assert {name for name, _, _ in IMPOSSIBLE} == set(_FIELD_CHECKS)

    @pytest.mark.parametrize("name, value, message", IMPOSSIBLE)
    def test_impossible_values_are_refused_at_construction_and_later(self, name, value, message):
        with pytest.raises(ValueError, match=message):
            small_config(**{name: value})
        config = small_config()
        before = getattr(config, name)
        with pytest.raises(ValueError, match=message):
            setattr(config, name, value)
        assert getattr(config, name) == before

    def test_pruning_after_a_layer_that_does_not_exist(self):
        message = r"prune_after_layer=5 lies outside the network: it has num_hidden_layers=4.*Choose 1\.\.4"
        with pytest.raises(ValueError, match=message):
            small_config(prune_ratio=0.5, prune_after_layer=5)
        config = small_config(prune_after_layer=5)  # as long as nothing is pruned, it does not matter
        with pytest.raises(ValueError, match=message):
            config.prune_ratio = 0.5
        assert config.prune_ratio == 0.0
        config.prune_after_layer = 4
        config.prune_ratio = 0.5

    @pytest.mark.parametrize(
        "name, value", [("window_size", 8.5), ("window_size", "8"), ("prune_ratio", "0.6"), ("mlp_type", None)]
    )
    def test_wrong_types_are_refused(self, name, value):
        with pytest.raises((StrictDataclassFieldValidationError, TypeError, ValueError), match=name):
            small_config(**{name: value})


class TestFailureSignatures:
    @pytest.mark.parametrize(
        "settings, sentence",
        [
            ({"prune_ratio": 0.85}, r"prune_ratio=0.85: beyond 0.8 .* accuracy was observed to collapse. 0.6"),
            ({"prune_ratio": 0.5, "prune_after_layer": 1}, r"prune_after_layer=1: .* accuracy was observed .* 4 is"),
            ({"window_size": 3}, r"window_size=3: .* observed to fragment .* 8 is recommended"),
        ],
    )
    def test_known_failures_say_what_was_observed(self, settings, sentence):
        (said,) = failure_signatures(small_config(**settings))
        assert re.match(sentence, said)

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"prune_ratio": 0.8},
            {"prune_after_layer": 1},
            {"prune_ratio": 0.6, "prune_after_layer": 2},
            {"window_size": 4},
            {"window_size": None},
        ],
    )
    def test_recommended_and_borderline_settings_are_silent(self, settings):
        assert failure_signatures(small_config(**settings)) == []


class TestMisspeltFields:
    def test_a_name_that_is_almost_a_field_is_warned_of(self, warnings_said):
        said = warnings_said(lambda: SparsePathViTConfig(prune_ration=0.5))
        assert said == ["prune_ration is no field of SparsePathViTConfig and does nothing: is prune_ratio meant?"]

    def test_names_of_transformers_and_of_others_are_not(self, warnings_said):
        names = {
            "transformers_version": "5.17.0",
            "architectures": ["A"],
            "hospital": "Basel",
            "torch_dtype": "float32",
        }
        assert warnings_said(lambda: SparsePathViTConfig(**names)) == []
