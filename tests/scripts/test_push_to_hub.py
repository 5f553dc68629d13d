# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json
import logging
import types

import pytest
from run_script import load_script
from small_models import small_config, small_model
from small_segmentation import SMALL_ADAPTER, segmentation_model

from sparsepath_vit import (
    SparsePathViTAdapterBackbone,
    SparsePathViTAdapterConfig,
    SparsePathViTBackbone,
    SparsePathViTForImageClassification,
    SparsePathViTImageProcessor,
    SparsePathViTModel,
)
from sparsepath_vit.model.remote_code import remote_code_files

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

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            assert sorted(allow_patterns) == sorted(path.name for path in folder_path.iterdir())
            calls.append(("upload", repo_id, (folder_path / "model.safetensors").is_file()))

    monkeypatch.setattr(push_to_hub, "HfApi", Api)
    arguments = ("--output_dir", str(tmp_path / "hub"), "--repo_id", "me/x", "--push", "--licence", "apache-2.0")
    run_script(push_to_hub, str(checkpoint), *arguments)
    assert calls == [("create", "me/x", False), ("upload", "me/x", True)]


def adapter_model():
    config = SparsePathViTAdapterConfig.from_vit_config(small_config(), **SMALL_ADAPTER)
    return SparsePathViTAdapterBackbone(config)


# How each is made, and how its card says to load and use it.
KINDS = {
    "encoder": (lambda: small_model(SparsePathViTModel), "AutoModel", "pooler_output"),
    "classifier": (
        lambda: small_model(SparsePathViTForImageClassification, num_labels=3),
        "AutoModelForImageClassification",
        "softmax",
    ),
    "backbone": (lambda: small_model(SparsePathViTBackbone), "AutoBackbone", "feature_maps"),
    "adapter": (adapter_model, "AutoBackbone", "feature_maps"),
    "mask2former": (lambda: segmentation_model("mask2former"), "AutoModelForUniversalSegmentation", "post_process"),
    "queries": (lambda: segmentation_model("queries"), "AutoModelForUniversalSegmentation", "post_process"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_model_is_staged_with_the_code_that_it_needs_and_no_more(kind, tmp_path, run_script):
    """Regression: segmentation models were refused, and an adapter's auto_map was that of the plain encoder."""
    make, auto_class, use = KINDS[kind]
    model, folder, out = make(), tmp_path / "checkpoint", tmp_path / "hub"
    model.save_pretrained(folder)
    for name in ("optimizer.pt", "training_args.bin", "trainer_state.json", "notes.py", "patient.png", "figure.png"):
        (folder / name).write_text("")
    run_script(push_to_hub, str(folder), "--output_dir", str(out))
    code = {file.name for file in remote_code_files(model.config.own_auto_map)}
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "README.md"} | code
    assert json.loads((out / "config.json").read_text())["auto_map"] == dict(model.config.own_auto_map)
    card = (out / "README.md").read_text()
    assert f"model = {auto_class}.from_pretrained(" in card
    assert use in card
    assert "$" not in card
    assert "AutoImageProcessor" not in card


def test_images_that_the_card_shows_go_along(tmp_path, checkpoint, run_script):
    (checkpoint / "README.md").write_text("# Model\n![map](map.png)\n")
    for name in ("map.png", "patient.png"):
        (checkpoint / name).write_text(name)
    run_script(push_to_hub, str(checkpoint), "--output_dir", str(tmp_path / "hub"))
    assert [path.name for path in (tmp_path / "hub").glob("*.png")] == ["map.png"]


def test_what_would_be_uploaded_is_listed_with_its_size(tmp_path, checkpoint, caplog):
    arguments = types.SimpleNamespace(
        kernel=False, checkpoint=checkpoint, output_dir=tmp_path / "hub", repo_id=None, licence=None, push=False
    )
    with caplog.at_level(logging.INFO, "push_to_hub"):
        push_to_hub.run(arguments)
    lines = caplog.text.splitlines()
    for path in (tmp_path / "hub").iterdir():
        assert any(line.split() == [f"{path.stat().st_size:,}", "bytes", path.name] for line in lines), path.name
    assert "nothing was uploaded" in caplog.text


def test_sharded_weights_go_along_with_their_index(tmp_path, run_script):
    model = small_model(SparsePathViTModel)
    model.save_pretrained(tmp_path / "checkpoint", max_shard_size="20KB")
    shards = {path.name for path in (tmp_path / "checkpoint").glob("model*.safetensors*")}
    assert len(shards) > 2
    run_script(push_to_hub, str(tmp_path / "checkpoint"), "--output_dir", str(tmp_path / "hub"))
    assert {path.name for path in (tmp_path / "hub").glob("model*.safetensors*")} == shards


def test_an_earlier_preparation_is_replaced_and_anything_else_is_not(tmp_path, checkpoint, run_script):
    out = tmp_path / "hub"
    for _ in range(2):
        run_script(push_to_hub, str(checkpoint), "--output_dir", str(out))
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match=r"holds thesis\.tex, so it is no earlier preparation"):
        run_script(push_to_hub, str(checkpoint), "--output_dir", str(out))
    assert (out / "thesis.tex").read_text() == "years of work"
    with pytest.raises(SystemExit, match="holds the checkpoint"):
        run_script(push_to_hub, str(checkpoint), "--output_dir", str(tmp_path))
    assert (checkpoint / "model.safetensors").is_file()


def test_a_model_of_another_kind_is_named(tmp_path, checkpoint, run_script):
    (checkpoint / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(SystemExit, match="holds a 'vit' model: convert it first"):
        run_script(push_to_hub, str(checkpoint), "--output_dir", str(tmp_path / "hub"))
