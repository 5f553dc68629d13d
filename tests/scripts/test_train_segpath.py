# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json
import shutil

import numpy as np
import pytest
import torch
from places import ROOT
from run_script import load_script
from safetensors.torch import load_file
from segpath_files import BOTH, small_pairs, small_segpath, two_tissues, write_pair
from small_models import small_config
from transformers import AutoModelForUniversalSegmentation

from sparsepath_vit import SparsePathViTImageProcessor, SparsePathViTModel
from sparsepath_vit.tasks.segmentation.metrics import METRICS

train_segpath = load_script("train_segpath")
SMALL_MASK2FORMER = {
    "hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_layers": 1, "decoder_layers": 2,
    "num_attention_heads": 2, "dim_feedforward": 32, "encoder_feedforward_dim": 32, "train_num_points": 256,
}  # fmt: skip
SMALL_HEADS = {
    "queries": ["--model_kwargs", '{"query_feature_dim": 32, "train_num_points": 256}', "--num_query_layers", "2"],
    "mask2former": [
        "--model_kwargs", json.dumps(SMALL_MASK2FORMER), "--adapter_dim", "32",
        "--backbone_kwargs", '{"adapter_stem_dim": 16, "adapter_norm": "group", "adapter_num_heads": 2}',
    ],
}  # fmt: skip
COMMON = ["--num_queries", "4", "--save_strategy", "no", "--disable_tqdm", "true", "--bootstrap_samples", "50"]


@pytest.fixture(scope="module")
def backbone_dir(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("backbone")
    SparsePathViTModel(small_config(prune_ratio=0.0)).save_pretrained(folder)
    SparsePathViTImageProcessor(patch_size=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def segpath_dir(tmp_path_factory):
    return small_segpath(tmp_path_factory.mktemp("segpath"))


@pytest.fixture
def common(backbone_dir):
    return ["--model_name_or_path", str(backbone_dir), *COMMON]


def results_of(folder):
    return json.loads((folder / "all_results.json").read_text())


@pytest.mark.parametrize("head", SMALL_HEADS)
def test_several_antigens(run_script, segpath_dir, common, tmp_path, head):
    arguments = ["--segpath_dir", str(segpath_dir), "--antigens", ", ".join(BOTH), "--head", head, *SMALL_HEADS[head]]
    run_script(train_segpath, *arguments, *common, "--output_dir", str(tmp_path), "--max_steps", "2", "--eval_on_start")
    results = results_of(tmp_path)
    for metric in METRICS:
        for ending in ("", *(f"_{antigen}" for antigen in BOTH)):
            assert 0 <= results[f"eval_{metric}{ending}"] <= 1
            low, high = (results[f"eval_{metric}{ending}_{end}"] for end in ("low", "high"))
            assert 0 <= low <= high <= 1
    assert (results["eval_num_images"], results["eval_num_groups"], results["head"]) == (6, 3, head)
    assert results["eval_num_images_ERG_Endothelium"] == 3 and "smoke test" in results["note"]
    assert (tmp_path / "examples.png").exists()
    model = AutoModelForUniversalSegmentation.from_pretrained(tmp_path)
    assert model.config.id2label == dict(enumerate(BOTH)) and model.config.head == head
    assert (tmp_path / "preprocessor_config.json").exists() and (tmp_path / "segmentation_sparsepath_vit.py").exists()


@pytest.mark.parametrize("head", SMALL_HEADS)
def test_one_pair_is_learnt_by_heart(run_script, common, tmp_path, head):
    """Loss, matching, upsampling and metrics together: the same pair is trained on and evaluated."""
    image, masks = two_tissues(0, 48)
    for name in ("learnt", "asked"):
        write_pair(tmp_path / "pairs", name, image, masks[BOTH[0]])
    arguments = ["--pairs_dir", str(tmp_path / "pairs"), "--eval_images", "asked", "--no_freeze_vit", "--no_augment"]
    arguments += ["--head", head, *SMALL_HEADS[head], "--max_steps", "50", "--learning_rate", "4e-3"]
    arguments += ["--max_grad_norm", "1", "--warmup_steps", "5", "--per_device_train_batch_size", "1"]
    run_script(train_segpath, *arguments, *common, "--output_dir", str(tmp_path / "run"))
    assert results_of(tmp_path / "run")["eval_dice_pooled"] > 0.9


def test_resumed_training_ends_at_the_same_weights(run_script, segpath_dir, common, tmp_path):
    # without augmentation: the next batch is fetched, and its crops are drawn, before a checkpoint is written
    arguments = ["--segpath_dir", str(segpath_dir), "--antigens", BOTH[0], *SMALL_HEADS["queries"], *common]
    arguments += ["--output_dir", str(tmp_path / "run"), "--max_steps", "4", "--no_augment"]
    arguments += ["--per_device_train_batch_size", "2", "--save_strategy", "steps", "--save_steps", "2"]
    run_script(train_segpath, *arguments)
    without_break = load_file(tmp_path / "run" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    (tmp_path / "run" / "model.safetensors").unlink()
    run_script(train_segpath, *arguments, "--resume_from_checkpoint", "True")
    resumed = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(resumed[name], weight) for name, weight in without_break.items())
    first = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert any(not torch.equal(resumed[name], weight) for name, weight in first.items())


def test_a_recipe_a_baseline_and_a_trained_model(run_script, common, tmp_path):
    small_pairs(tmp_path / "pairs", 4)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"pairs_dir: {tmp_path / 'pairs'}\nlabel_name: gland\neval_images: [case1_2, case1_3]\nbaselines: true\n"
        "num_query_layers: 1\nmodel_kwargs: {query_feature_dim: 16, train_num_points: 64}\nmax_steps: 1\n"
        "crop_size: 16\neval_crop_size: 16\ndo_train: true\n"
    )
    run_script(train_segpath, str(recipe), *common, "--output_dir", str(tmp_path / "first"))
    results = results_of(tmp_path / "first")
    assert results["eval_images"] == ["case1_2", "case1_3"] and results["train_images"] == ["case0_0", "case0_1"]
    assert results["eval_num_images"] == 2 * 9
    assert results["baselines"]["all_background"]["dice_pooled_gland"] == 0
    assert 0 < results["baselines"]["haematoxylin_fitted"]["dice_mean"] <= 1
    # only evaluated, the model gives the same numbers again
    again = [str(recipe), *COMMON, "--model_name_or_path", str(tmp_path / "first"), "--do_train", "false"]
    run_script(train_segpath, *again, "--output_dir", str(tmp_path / "second"))
    second = results_of(tmp_path / "second")
    assert all(second[f"eval_{metric}"] == pytest.approx(results[f"eval_{metric}"]) for metric in METRICS)
    with pytest.raises(SystemExit, match="segments gland, the data have foreground: start anew"):
        run_script(train_segpath, *again, "--label_name", "foreground", "--output_dir", str(tmp_path / "third"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "pass either --segpath_dir or --pairs_dir"),
        (["--segpath_dir", "SEGPATH"], "--antigens is missing"),
        (
            ["--segpath_dir", "SEGPATH", "--antigens", "panCK"],
            "unknown: panCK. Known are panCK_Epithelium, aSMA",
        ),
        (
            ["--segpath_dir", "SEGPATH", "--antigens", BOTH[0], "--crop_size", "40"],
            "smaller than the 40 px",
        ),
        (["--pairs_dir", "PAIRS"], r"_mask.png is 8 x 9 px, its image .*_HE.png 8 x 8"),
        (
            ["--segpath_dir", "SEGPATH", "--antigens", BOTH[0], "--resume_from_checkpoint", "True"],
            "holds no checkpoint-N to go on from",
        ),
        (["--segpath_dir", "SEGPATH", "--antigens", BOTH[0], "--model_kwargs", "{"], "is not JSON"),
        (["--segpath_dir", "SEGPATH", "--antigens", BOTH[0], "--backbone_kwargs", '{"windows": 2}'], "windows"),
        (["--segpath_dir", "SEGPATH", "--antigens", BOTH[0], "--window_size", "-3"], "window_size"),
        (["--pairs_dir", "PAIRS", "--no_check_data", "--load_best_model_at_end"], "on the images that are reported"),
    ],
)
def test_what_is_wrong_is_said_before_training(run_script, segpath_dir, common, tmp_path, flags, message):
    for name in ("odd", "even"):
        write_pair(tmp_path, name, np.zeros((8, 8, 3), np.uint8), np.ones((9, 8)))
    flags = [{"SEGPATH": str(segpath_dir), "PAIRS": str(tmp_path)}.get(flag, flag) for flag in flags]
    flags += ["--eval_images", "even"]
    with pytest.raises(SystemExit, match=message):
        run_script(train_segpath, *flags, *common, "--output_dir", str(tmp_path / "run"))


def test_a_recipe_with_unknown_settings_is_refused(run_script, tmp_path):
    (tmp_path / "recipe.yaml").write_text("antigen: panCK_Epithelium\n")
    with pytest.raises(SystemExit, match=r"unknown settings: \['antigen'\]"):
        run_script(train_segpath, str(tmp_path / "recipe.yaml"))


def test_recipes_are_known_to_the_script(backbone_dir, tmp_path):
    recipes = sorted((ROOT / "configuration" / "recipes").glob("segpath_*.yaml"))
    assert recipes
    for recipe in recipes:
        data = [] if "segpath_dir" in recipe.read_text() else ["--pairs_dir", "pairs"]
        arguments = [str(recipe), "--model_name_or_path", str(backbone_dir), "--output_dir", str(tmp_path), *data]
        _, model, training = train_segpath.parse([*arguments, "--bf16", "false"])
        assert model.head in SMALL_HEADS and training.learning_rate > 0
