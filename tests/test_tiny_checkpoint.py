# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The trained checkpoint inside the package: it loads anywhere, is small, and has learned where tissue is."""

import os
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import yaml
from bare_python import ABSENT_BESIDE_IMAGE_PROCESSOR, run_bare
from PIL import Image
from places import ROOT
from safetensors import safe_open
from skimage.data import immunohistochemistry
from transformers import AutoImageProcessor, AutoModel

from sparsepath_vit import SparsePathViTImageProcessor, SparsePathViTModel, copy_tiny_checkpoint, tiny_checkpoint
from sparsepath_vit.comparison import demo
from sparsepath_vit.model.configuration_sparsepath_vit import AUTO_MAP as MODEL_AUTO_MAP
from sparsepath_vit.model.image_processing_sparsepath_vit import AUTO_MAP as IMAGE_PROCESSOR_AUTO_MAP
from sparsepath_vit.model.remote_code import remote_code_files
from studies.tiny_evidence.evidence import area_under_roc, run_model, untrained_twin

RECIPE = ROOT / "configuration" / "recipes" / "pretrain_tiny.yaml"

LOAD_WITHOUT_THE_PACKAGE = """
import sys, torch, PIL.Image
from transformers import AutoImageProcessor, AutoModel
checkpoint, image, results, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # sums of another number of threads differ in their last bits
model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32).eval()
processor = AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
with torch.no_grad():
    torch.save(model(**processor(PIL.Image.open(image), return_tensors="pt")).pooler_output, results)
"""


@pytest.fixture(scope="module")
def model():
    return SparsePathViTModel.from_pretrained(tiny_checkpoint(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return SparsePathViTImageProcessor.from_pretrained(tiny_checkpoint())


@pytest.fixture(scope="module")
def half_glass():
    """Stained tissue on the left, empty slide on the right: (280, 280, 3)."""
    pixels = immunohistochemistry()[:280, :280].copy()
    noise = np.random.default_rng(0).normal(0, 1.5, pixels.shape)
    pixels[:, 140:] = (236 + noise)[:, 140:].round().astype(np.uint8)
    return pixels


def test_it_is_the_recipes_model_in_bfloat16(model):
    fields = yaml.safe_load(RECIPE.read_text())["model"]
    assert {name: getattr(model.config, name) for name in fields} == fields
    assert 5.3e6 < model.num_parameters() < 5.7e6
    with safe_open(tiny_checkpoint() / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    assert sum(file.stat().st_size for file in tiny_checkpoint().iterdir()) < 12 * 2**20


def test_auto_classes_load_it_offline(model, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = AutoModel.from_pretrained(tiny_checkpoint(), dtype=torch.float32)
    assert type(loaded) is SparsePathViTModel
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in loaded.state_dict().items())
    assert isinstance(AutoImageProcessor.from_pretrained(tiny_checkpoint()), SparsePathViTImageProcessor)


@torch.no_grad()
def test_a_copy_loads_as_remote_code_without_the_package(tmp_path, model):
    copy = copy_tiny_checkpoint(tmp_path / "copy")
    needed = remote_code_files({**MODEL_AUTO_MAP, **IMAGE_PROCESSOR_AUTO_MAP})
    assert sorted(file.name for file in copy.glob("*.py")) == [file.name for file in needed]
    for file in needed:
        assert (copy / file.name).read_bytes() == file.read_bytes()
    Image.fromarray(immunohistochemistry()[:100, :120]).save(tmp_path / "region.png")
    arguments = [copy, tmp_path / "region.png", tmp_path / "results.pt", torch.get_num_threads()]
    run_bare(LOAD_WITHOUT_THE_PACKAGE, arguments, tmp_path, ABSENT_BESIDE_IMAGE_PROCESSOR)
    inputs = AutoImageProcessor.from_pretrained(tiny_checkpoint(), backend="pil")(
        Image.open(tmp_path / "region.png"), return_tensors="pt"
    )
    assert torch.equal(torch.load(tmp_path / "results.pt"), model(**inputs).pooler_output)


LOAD_BY_PATH = """
import sys, torch
from transformers import AutoImageProcessor, AutoModel
checkpoint, results, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
assert "sparsepath_vit" not in sys.modules
model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32).eval()
AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=True)
pixels = torch.linspace(-1, 1, 3 * 112 * 112).view(1, 3, 112, 112)
with torch.no_grad():
    torch.save((type(model).__module__, model(pixels).pooler_output), results)
"""


@torch.no_grad()
def test_the_installed_folder_loads_without_importing_the_package_first(tmp_path, model):
    """Regression: no code lay beside it. What lies there now takes the package itself, no copy of it."""
    variables = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [str(tiny_checkpoint()), str(tmp_path / "results.pt"), str(torch.get_num_threads())]
    command = [sys.executable, "-c", LOAD_BY_PATH, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-4000:]
    module, pooled = torch.load(tmp_path / "results.pt")
    assert module == SparsePathViTModel.__module__
    pixels = torch.linspace(-1, 1, 3 * 112 * 112).view(1, 3, 112, 112)
    assert torch.equal(pooled, model(pixels).pooler_output)


BUILD_WHEEL = """
import os, sys
from setuptools.build_meta import build_wheel
os.chdir(sys.argv[1])
print(build_wheel(sys.argv[2]))
"""


def test_the_wheel_holds_it_and_stays_small(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("modeling", "configuration"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "-c", BUILD_WHEEL, str(tmp_path), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (wheel,) = (tmp_path / "out").glob("*.whl")
    assert wheel.stat().st_size < 20e6
    with zipfile.ZipFile(wheel) as archive:
        installed = {name.rsplit("/", 1)[1] for name in archive.namelist() if "/checkpoints/tiny/" in name}
        modes = {entry.external_attr >> 16 & 0o444 for entry in archive.infolist()}
    assert {file.name for file in tiny_checkpoint().iterdir()} == installed
    assert modes == {0o444}  # readable for everybody, also where an administrator installs it


def test_the_demo_runs_it_by_default(model, monkeypatch):
    monkeypatch.setattr(demo, "faster_dtype", lambda device: torch.float32)
    loaded, processor, name = demo._load(None, "cpu")
    assert all(torch.equal(weight, model.state_dict()[key]) for key, weight in loaded.state_dict().items())
    assert processor.patch_size == model.config.patch_size
    assert "trained" in name
    assert "untrained" not in name


def test_a_copy_replaces_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"exists: name a folder that does not"):
        copy_tiny_checkpoint(tmp_path)


def test_its_prune_score_finds_tissue_and_that_of_random_weights_does_not(model, processor, half_glass):
    is_tissue = np.tile(np.arange(20) < 10, (20, 1)).ravel()
    trained = run_model(model, processor, half_glass, prune_ratio=0.5)
    assert area_under_roc(trained.prune_scores[0].numpy(), is_tissue) > 0.85
    kept_columns = trained.patch_positions[0, :, 1]
    assert (kept_columns < 10).float().mean() > 0.8
    untrained = run_model(untrained_twin(model.config), processor, half_glass, prune_ratio=0.5)
    contrasts = [
        float(outputs.prune_scores[0, is_tissue].mean() / outputs.prune_scores[0, ~is_tissue].mean())
        for outputs in (trained, untrained)
    ]
    assert contrasts[0] > 1.5
    assert 0.8 < contrasts[1] < 1.2


def test_its_features_tell_images_apart(model, processor):
    """A collapsed model gives every image the same features."""
    pixels = immunohistochemistry()
    corners = [pixels[row : row + 224, column : column + 224] for row in (0, 288) for column in (0, 288)]
    features = torch.cat([run_model(model, processor, corner).pooler_output for corner in corners])
    cosines = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
    assert cosines.fill_diagonal_(0).max() < 0.999


def test_the_card_says_what_it_is_not_and_credits_the_data():
    card = (tiny_checkpoint() / "README.md").read_text()
    assert "not a foundation model" in card
    for credit in ("CC BY 4.0", "CC0", "CC BY 3.0", "BSD-3-Clause", "OpenSlide", "TCGA Research Network"):
        assert credit in card, credit
