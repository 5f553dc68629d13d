# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import csv
import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from panda_files import small_panda
from places import SCRIPTS, SHARED_DATA
from run_script import load_script
from small_models import small_model
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, Trainer

from sparsepath_vit import SparsePathViTImageProcessor, SparsePathViTModel
from sparsepath_vit.tasks.classification.metrics import METRICS
from sparsepath_vit.tasks.classification.roi_files import load_roi_dataset
from sparsepath_vit.tasks.panda.rois import PandaSettings, prepare_panda

train_panda = load_script("train_panda")
OSTEOSARCOMA = SHARED_DATA / "classification/osteosarcoma_roi"
NEEDED = {f"eval_{name}{ending}" for name in METRICS for ending in ("", "_low", "_high")} | {"eval_confusion_matrix"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    shares = (0.4, 0.3, 0.3)
    settings = PandaSettings("radboud_pattern", roi_size=128, split_shares=shares)
    prepare_panda(small_panda(folder / "panda"), folder / "pattern", settings, allow_subset=True)
    prepare_panda(folder / "panda", folder / "isup", PandaSettings("isup", 128, split_shares=shares), allow_subset=True)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model = small_model(SparsePathViTModel, patch_size=16, image_size=64, num_hidden_layers=2, prune_after_layer=1)
    model.save_pretrained(folder)
    SparsePathViTImageProcessor(patch_size=16).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def train(run_script, model_folder, tmp_path):
    """Runs the script into `tmp_path / name` and returns what all_results.json holds."""

    def run(name, *arguments):
        common = ("--model_name_or_path", str(model_folder), "--output_dir", str(tmp_path / name))
        run_script(train_panda, *map(str, arguments), *common, "--disable_tqdm", "true")
        return json.loads((tmp_path / name / "all_results.json").read_text())

    return run


class TestLinearProbe:
    def test_a_command_from_data_set_to_metrics_and_checkpoint(self, train, data, tmp_path):
        results = train("run", "--dataset_dir", data / "pattern", "--mode", "linear_probe", "--prune_ratio", "0.5")
        assert set(results) >= NEEDED
        assert results["eval_accuracy"] > 0.8  # each class is painted with its own texture
        assert f"smoke test: {results['eval_num_groups']} independent slides or images" in results["note"]
        model = AutoModelForImageClassification.from_pretrained(tmp_path / "run", dtype=torch.float32)
        processor = AutoImageProcessor.from_pretrained(tmp_path / "run")
        assert model.config.prune_ratio == 0.5
        assert AutoModel.from_pretrained(tmp_path / "run").config.num_hidden_layers == 2
        dataset = load_roi_dataset(data / "pattern")
        images = {roi.roi_id: index for index, roi in enumerate(dataset.rois)}
        with (tmp_path / "run" / "predictions.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert sum(row["label"] == row["prediction"] for row in rows) == results["eval_accuracy"] * len(rows)
        for row in rows[:4]:
            inputs = processor(
                dataset.read(images[row["item"]]), input_data_format="channels_last", return_tensors="pt"
            )
            with torch.no_grad():
                assert model.config.id2label[model(**inputs).logits.argmax().item()] == row["prediction"]

    def test_a_second_run_reuses_the_features_and_gives_the_same_file(self, train, data, tmp_path, monkeypatch):
        train("first", "--dataset_dir", data / "pattern")
        monkeypatch.setattr(SparsePathViTModel, "forward", lambda *arguments, **kwargs: pytest.fail("computed again"))
        train("second", "--dataset_dir", data / "pattern")
        first, second = (tmp_path / name / "all_results.json" for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()

    def test_from_scratch_the_same_seed_gives_the_same_file(self, train, data, tmp_path):
        for name in ("one", "two"):
            train(name, "--dataset_dir", data / "pattern", "--cache_dir", tmp_path / f"{name}_features")
        one, two = (tmp_path / name / "all_results.json" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()

    def test_shuffled_labels_are_not_learnt(self, train, data):
        accuracies = [
            train("run", "--dataset_dir", data / "pattern", "--shuffle_labels", "--seed", seed)["eval_accuracy"]
            for seed in range(6)
        ]
        assert sum(accuracies) / 6 == pytest.approx(0.2, abs=0.14)  # 16 ROIs each: standard error 0.04

    def test_slides_are_graded_as_a_whole(self, train, data):
        results = train("run", "--dataset_dir", data / "isup", "--solver", "sgd", "--sgd_epochs", "5", "--l2", "1")
        assert results["eval_num_items"] == results["eval_num_groups"]
        assert results["eval_label_names"] == [f"ISUP {grade}" for grade in range(6)]

    def test_a_smaller_view_of_tiles(self, train, data):
        arguments = (
            "--dataset_dir",
            data / "pattern",
            "--image_size",
            "64",
            "--tile_size",
            "32",
            "--bootstrap_samples",
            "0",
        )
        results = train("run", *arguments, "--view", "pixels", "--window_size", "0")
        assert "eval_accuracy_low" not in results


class TestFinetuning:
    ARGUMENTS = ("--mode", "finetune", "--per_device_train_batch_size", "8", "--learning_rate", "3e-3")

    def test_lora_writes_metrics_and_a_whole_checkpoint(self, train, data, tmp_path):
        arguments = (
            *self.ARGUMENTS,
            "--lora_rank",
            "4",
            "--num_train_epochs",
            "2",
            "--gradient_checkpointing",
            "--bf16",
        )
        results = train("run", "--dataset_dir", data / "pattern", *arguments, "--eval_strategy", "epoch")
        assert set(results) >= NEEDED | {"eval_loss"}
        assert not [name for name in results if "runtime" in name or "per_second" in name]
        model, report = AutoModelForImageClassification.from_pretrained(tmp_path / "run", output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model.config.id2label[4] == "G5"

    def test_a_stopped_run_resumes(self, train, data, tmp_path, caplog):
        arguments = ("--dataset_dir", data / "pattern", *self.ARGUMENTS, "--num_train_epochs", "3")
        whole = train("whole", *arguments, "--save_strategy", "epoch")
        checkpoint = sorted((tmp_path / "whole").glob("checkpoint-*"))[0]
        resumed = train("resumed", *arguments, "--resume_from_checkpoint", checkpoint)
        assert resumed == whole
        state = json.loads((tmp_path / "resumed" / "trainer_state.json").read_text())
        assert state["global_step"] == 3 * state["max_steps"] // 3

    def test_an_image_folder_is_evaluated_on_its_first_fold(self, train, folder_of_images):
        arguments = ("--image_folder", folder_of_images, "--folds", "3", *self.ARGUMENTS, "--num_train_epochs", "1")
        assert train("run", *arguments)["eval_num_items"] == 4


@pytest.fixture
def folder_of_images(tmp_path):
    from slide_files import stained_image
    from tifffile import imwrite

    for label in ("tissue", "glass"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(6):
            image = stained_image(64, 48, [(0, 0, 64, 48)] if label == "tissue" else [], number)
            imwrite(tmp_path / "images" / label / f"{number}.tif", image, photometric="rgb", metadata=None)
    return tmp_path / "images"


class TestImageFolder:
    def test_it_is_cross_validated(self, train, folder_of_images, tmp_path):
        results = train("run", "--image_folder", folder_of_images, "--folds", "3")
        assert (results["split"], results["eval_num_folds"], results["eval_num_items"]) == ("3 folds", 3, 12)
        assert results["eval_accuracy"] > 0.7
        assert list((tmp_path / "run" / "_features").rglob("*.safetensors"))  # not uploaded with the checkpoint

    def test_what_cannot_be_read_is_said_and_counted(self, train, folder_of_images, caplog):
        (folder_of_images / "tissue" / "0.tif").write_bytes(b"II*\0 broken")
        results = train("run", "--image_folder", folder_of_images, "--folds", "2")
        assert results["eval_num_items"] == 11
        assert results["problems"] == {"corrupt_image": 1}
        assert "corrupt_image: tissue/0.tif" in caplog.text

    @pytest.mark.skipif(not OSTEOSARCOMA.exists(), reason="needs the shared data")
    def test_real_regions_are_a_smoke_test(self, train):
        pattern = r"^Case-\d+-(?:P\d+-)?[A-Z]\d+"
        arguments = ("--image_folder", OSTEOSARCOMA, "--group_pattern", pattern, "--image_size", "128")
        results = train("run", *arguments)
        assert results["eval_num_items"] == 33
        assert sum(map(sum, results["eval_confusion_matrix"])) == 33
        assert "smoke test: 17 independent slides or images" in results["note"]


class TestArguments:
    def test_a_recipe_is_enough_and_flags_overrule_it(self, run_script, data, model_folder, tmp_path, caplog):
        caplog.set_level(logging.INFO)
        recipe = {"dataset_dir": str(data / "pattern"), "model_name_or_path": str(model_folder), "seed": 3}
        recipe |= {"output_dir": str(tmp_path / "run"), "learning_rate": "1e-4", "bootstrap_samples": 10}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        run_script(train_panda, str(tmp_path / "recipe.yaml"))
        assert json.loads((tmp_path / "run" / "all_results.json").read_text())["seed"] == 3
        assert "balanced_accuracy" in caplog.text
        run_script(train_panda, str(tmp_path / "recipe.yaml"), "--seed", "4")
        assert json.loads((tmp_path / "run" / "all_results.json").read_text())["seed"] == 4

    @pytest.mark.parametrize("recipe", sorted((SCRIPTS.parent / "configuration/recipes").glob("panda_*.yaml")))
    def test_the_recipes_that_come_with_it_are_understood(self, recipe):
        _, arguments, training = train_panda.parse([str(recipe), "--model_name_or_path", "somewhere"])
        assert arguments.prune_ratio == 0.6
        assert training.bf16
        assert training.remove_unused_columns is False

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ([], "pass either --dataset_dir or --image_folder"),
            (["--dataset_dir", "a", "--image_folder", "b"], "pass either --dataset_dir or --image_folder"),
            (["--dataset_dir", "nowhere"], r"nowhere holds no prepared data set"),
            (["--dataset_dir", "a", "--lora_rank", "4"], "--lora_rank 4 needs --mode finetune"),
            (["--dataset_dir", "a", "--mode", "finetune", "--tile_size", "64"], "--tile_size averages frozen features"),
        ],
    )
    def test_errors_are_one_line(self, train, arguments, message):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            train("run", *arguments)

    def test_an_unknown_setting_of_a_recipe_is_named(self, run_script, tmp_path):
        (tmp_path / "recipe.yaml").write_text("dataset_dir: a\nlearning: 3\n")
        with pytest.raises(SystemExit, match=r"unknown settings: \['learning'\]"):
            run_script(train_panda, str(tmp_path / "recipe.yaml"))
        with pytest.raises(SystemExit, match=r"gone\.yaml cannot be read"):
            run_script(train_panda, str(tmp_path / "gone.yaml"))

    def test_a_word_that_is_no_recipe_is_named(self, run_script):
        with pytest.raises(SystemExit, match=r"error: 'notes.txt' is no recipe, which ends in \.yaml or \.yml"):
            run_script(train_panda, "notes.txt", "--output_dir", "x")

    def test_a_model_is_needed(self, run_script):
        with pytest.raises(SystemExit, match="--model_name_or_path is missing"):
            run_script(train_panda, "--dataset_dir", "a")


def test_a_run_is_pushed_to_the_hub_when_all_of_it_is_there(train, data, monkeypatch):
    pushed = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda trainer, **kwargs: setattr(trainer, "hub_model_id", "me/probe"))

    def push(trainer, **kwargs):
        trainer.save_model(_internal_call=True)  # as the real one does first
        pushed.append({path.name for path in Path(trainer.args.output_dir).iterdir()})

    monkeypatch.setattr(Trainer, "push_to_hub", push)
    train("run", "--dataset_dir", data / "pattern", "--push_to_hub")
    (names,) = pushed
    assert {"model.safetensors", "preprocessor_config.json", "all_results.json", "modeling_sparsepath_vit.py"} <= names
