# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
from run_script import load_script
from small_models import small_model

from sparsepath_vit import SparsePathViTForImageClassification, SparsePathViTImageProcessor

push_to_hub = load_script("push_to_hub")


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    small_model(SparsePathViTForImageClassification, num_labels=3).save_pretrained(folder)
    SparsePathViTImageProcessor(patch_size=4).save_pretrained(folder)
    return folder


def test_a_dry_run_prepares_everything_a_hub_user_needs(tmp_path, checkpoint, run_script):
    out = tmp_path / "hub"
    run_script(push_to_hub, str(checkpoint), "--output_dir", str(out))
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= names
    assert {"modeling_sparsepath_vit.py", "token_grid.py", "attention_sdpa_tiles.py"} <= names
    auto_map = json.loads((out / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoBackbone"} <= set(auto_map)
    card = (out / "README.md").read_text()
    assert "LABEL_2" in card
    assert "$" not in card


def test_a_folder_without_weights_is_refused(tmp_path, run_script):
    with pytest.raises(SystemExit, match=r"no config\.json with model\*\.safetensors"):
        run_script(push_to_hub, str(tmp_path), "--output_dir", str(tmp_path / "hub"))
    assert not (tmp_path / "hub").exists()


def test_weights_of_a_closed_licence_are_not_pushed_to_a_public_repository(
    tmp_path, checkpoint, run_script, monkeypatch
):
    monkeypatch.setattr(push_to_hub, "HfApi", lambda: pytest.fail("it must not be reached"))
    (checkpoint / "README.md").write_text("---\nlicense: cc-by-nc-nd-4.0\n---\n# UNI2-h, converted\n")
    with pytest.raises(SystemExit, match=r"cc-by-nc-nd-4\.0.*--private"):
        run_script(push_to_hub, str(checkpoint), "--output_dir", str(tmp_path / "hub"), "--repo_id", "me/x", "--push")


def test_an_open_licence_is_uploaded(tmp_path, checkpoint, run_script, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, repo_id, **kwargs):
            calls.append(("create", repo_id, kwargs["private"]))

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, (folder_path / "model.safetensors").is_file()))

    monkeypatch.setattr(push_to_hub, "HfApi", Api)
    arguments = ("--output_dir", str(tmp_path / "hub"), "--repo_id", "me/x", "--push", "--licence", "apache-2.0")
    run_script(push_to_hub, str(checkpoint), *arguments)
    assert calls == [("create", "me/x", False), ("upload", "me/x", True)]
