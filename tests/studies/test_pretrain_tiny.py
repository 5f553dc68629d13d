# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Self-supervised training of the tiny checkpoint, on an image that comes with scikit-image."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from places import ROOT, SHARED_DATA
from run_script import load_study
from skimage.data import immunohistochemistry

from sparsepath_vit import SparsePathViTImageProcessor, SparsePathViTModel
from studies.tiny_pretraining.crops import find_images, read_held_out
from studies.tiny_pretraining.run import PretrainingRecipe, PretrainingRun

pretrain_tiny = load_study("tiny_pretraining")
RECIPES = ROOT / "configuration" / "recipes"
STORED = Path(__file__).with_name("pretrain_tiny_losses.json")
SHARED = SHARED_DATA
LOSSES = ("loss", "patches", "region", "views", "attention")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    tissue = Image.fromarray(immunohistochemistry())
    for number, left in enumerate((0, 170, 340)):
        tissue.crop((left, 0, left + 170, 500)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def recipe_file(tmp_path):
    """The real recipe with small batches of the bundled image, in float32."""

    def write(**changes):
        values = yaml.safe_load((RECIPES / "pretrain_tiny.yaml").read_text())
        values |= {"mixed_precision": "no", "images": ["*.png"], "held_out": "held_out.txt", "steps": 20}
        values |= {"view_sizes": [{"side": 4, "visible": 10, "pairs": 3}], "warmup_steps": 2, "save_every": 2}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        (tmp_path / "held_out.txt").write_text("# comment\n2.png\n")
        return path

    return write


def machine():
    return {"torch": torch.__version__, "instructions": torch.backends.cpu.get_cpu_capability()}


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_twenty_steps_from_the_seed_repeat_the_stored_losses(tmp_path, images, recipe_file, run_script):
    torch.set_num_threads(1)  # sums of another number of threads differ in their last bits
    run_script(
        pretrain_tiny,
        *("--data_dir", str(images), "--recipe", str(recipe_file()), "--output_dir", str(tmp_path / "run")),
    )
    entries = log_of(tmp_path / "run")
    stored = json.loads(STORED.read_text())
    assert [entry["step"] for entry in entries] == list(range(1, 21))
    if stored["machine"] == machine():
        assert [{name: entry[name] for name in LOSSES} for entry in entries] == stored["losses"]
    elif stored["machine"]["torch"].split("+")[0] == torch.__version__.split("+")[0]:
        # A processor with other vector instructions rounds differently.
        for entry, wanted in zip(entries, stored["losses"], strict=True):
            assert [entry[name] for name in LOSSES] == pytest.approx([wanted[name] for name in LOSSES], rel=0.02)
    # Another torch draws other initial weights from the same seed: only that the training works is left to compare.
    assert entries[-1]["attention"] < 0.7 * entries[0]["attention"]
    assert (tmp_path / "run" / "losses.png").stat().st_size > 5000
    model = SparsePathViTModel.from_pretrained(tmp_path / "run" / "model")
    assert model.dtype == torch.bfloat16
    assert (model.config.window_size, model.config.prune_ratio) == (8, 0.0)
    assert SparsePathViTImageProcessor.from_pretrained(tmp_path / "run" / "model").patch_size == 14


def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(tmp_path, images, recipe_file):
    recipe = PretrainingRecipe.from_file(recipe_file(steps=5))
    whole = PretrainingRun(recipe, images, tmp_path / "whole")
    whole.train()

    killed = PretrainingRun(recipe, images, tmp_path / "killed")
    draw = killed.sampler.views

    def draw_until_step_3(step, *arguments):
        if step == 3:
            raise KeyboardInterrupt
        return draw(step, *arguments)

    killed.sampler.views = draw_until_step_3
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    assert len(log_of(tmp_path / "killed")) == 3  # one step more than the checkpoint knows

    resumed = PretrainingRun(recipe, images, tmp_path / "killed")
    assert resumed.step == 2
    resumed.train()
    assert log_of(tmp_path / "killed") == log_of(tmp_path / "whole")
    for name, weight in whole.encoder.state_dict().items():
        assert torch.equal(weight, resumed.encoder.state_dict()[name]), name


def test_a_folder_of_another_recipe_is_refused(tmp_path, images, recipe_file, run_script):
    arguments = ("--data_dir", str(images), "--output_dir", str(tmp_path / "run"), "--steps", "1")
    run_script(pretrain_tiny, *arguments, "--recipe", str(recipe_file()))
    with pytest.raises(SystemExit, match="holds a run of another recipe"):
        run_script(pretrain_tiny, *arguments, "--recipe", str(recipe_file(learning_rate=0.5)))
    assert PretrainingRun(PretrainingRecipe.from_file(recipe_file(steps=30)), images, tmp_path / "run").step == 1


def test_held_out_images_are_not_trained_on(images):
    assert [path.name for path in find_images(images, ["*.png"], ["1.png"])] == ["0.png", "2.png"]
    assert find_images(images.parent, ["images/*.png"], ["images/"]) == []
    with pytest.raises(ValueError, match=r"the pattern '\*.tif' matches no file"):
        find_images(images, ["*.tif"], [])
    with pytest.raises(ValueError, match="is no folder"):
        find_images(images / "missing", ["*.png"], [])


def test_a_recipe_with_a_misspelt_field_is_refused(recipe_file):
    with pytest.raises(ValueError, match=r"unknown fields \['lerning_rate'\]"):
        PretrainingRecipe.from_file(recipe_file(lerning_rate=1.0))


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")
def test_what_the_evidence_is_measured_on_is_held_out():
    recipe = PretrainingRecipe.from_file(RECIPES / "pretrain_tiny.yaml")
    held_out = read_held_out(recipe.held_out)
    assert [entry for entry in held_out if not (SHARED / entry).exists()] == []
    files = find_images(SHARED, recipe.images, held_out)
    assert len(files) > 80
    assert not [path for path in files if "osteosarcoma" in str(path) or "cmu" in path.name.lower()]
