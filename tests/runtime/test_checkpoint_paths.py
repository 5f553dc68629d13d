# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
from pathlib import Path

import pytest
from small_models import small_config
from small_segmentation import segmentation_config
from transformers import ViTConfig

from sparsepath_vit.runtime.checkpoint_paths import checkpoint_config, existing_source
from sparsepath_vit.runtime.load_model import load_model


@pytest.mark.parametrize("source", ["./uni2-h", "../models/uni2-h", "~/uni2-h", "a/b/c", "uni2-h/", Path("uni2-h")])
def test_a_path_that_is_not_there_is_called_so(source, tmp_path, monkeypatch):
    """The Hub called it a malformed repository id."""
    monkeypatch.chdir(tmp_path)
    for take in (existing_source, load_model):
        with pytest.raises(FileNotFoundError, match="does not exist") as failure:
            take(source)
        assert str(tmp_path) in str(failure.value) and str(source) in str(failure.value)


def test_hub_ids_are_left_as_they_are():
    assert existing_source("MahmoodLab/UNI2-h") == "MahmoodLab/UNI2-h"


CONVERTED_FIRST = r"`sparsepath models` .* `sparsepath convert {} FOLDER`"


@pytest.mark.parametrize("take", [existing_source, checkpoint_config, load_model])
def test_the_name_of_a_foundation_model_is_no_checkpoint(take):
    """Regression: it was taken for a Hub id, and the network was blamed, though `sparsepath estimate` knows it."""
    with pytest.raises(FileNotFoundError, match=r"'uni2-h' is no folder here .*" + CONVERTED_FIRST.format("uni2-h")):
        take("uni2-h")


@pytest.mark.parametrize("take", [existing_source, checkpoint_config, load_model])
def test_a_file_is_no_checkpoint(take, tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(NotADirectoryError, match=r"model='.*model.safetensors' is a file: give the folder"):
        take(tmp_path / "model.safetensors")


class TestOthersCheckpoints:
    """What a user has who did not convert: the publisher's folder or Hub id."""

    @pytest.mark.parametrize("take", [checkpoint_config, load_model])
    def test_of_transformers(self, take, tmp_path):
        """Regression: AttributeError, 'ViTImageProcessor' object has no attribute 'patch_size'."""
        ViTConfig(hidden_size=32).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="of the kind 'vit', none of ours.*" + CONVERTED_FIRST.format(tmp_path)):
            take(tmp_path)

    @pytest.mark.parametrize("take", [checkpoint_config, load_model])
    @pytest.mark.parametrize("config", ['{"architecture": "vit_giant_patch14_224"}', "{", None])
    def test_of_timm_or_none(self, take, config, tmp_path):
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        with pytest.raises((OSError, ValueError), match=r"model='.*' holds no checkpoint of ours: .*converted first"):
            take(tmp_path)

    def test_on_the_hub(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(OSError, match="encoder='owner/name' was taken for a Hub id and cannot be loaded"):
            checkpoint_config("owner/name", "encoder")


def test_our_checkpoints_are_told_by_their_configuration(tmp_path):
    for config in (small_config(), segmentation_config("queries")):
        config.save_pretrained(tmp_path)
        assert type(checkpoint_config(tmp_path)) is type(config)


def test_what_is_there_is_taken_with_the_home_folder_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert existing_source("~/owner/name") == str(tmp_path / "owner/name")
    assert existing_source("owner/name") == "owner/name"
