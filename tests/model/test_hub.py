# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint folder as it lies on the Hub: every Auto class loads it without this package, with the same numbers."""

import json
import shutil
import types

import PIL.Image
import pytest
import torch
from bare_python import ABSENT_BESIDE_IMAGE_PROCESSOR, run_bare
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from small_models import large_weights_, random_pixels, small_config, small_model
from small_segmentation import SMALL_ADAPTER, segmentation_model
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    image_processing_base,
    modeling_utils,
)
from transformers.utils import hub as hub_utilities

from sparsepath_vit import (
    SparsePathViTAdapterBackbone,
    SparsePathViTAdapterConfig,
    SparsePathViTBackbone,
    SparsePathViTConfig,
    SparsePathViTForImageClassification,
    SparsePathViTImageProcessorPil,
    SparsePathViTModel,
)

SETTINGS = {"prune_ratio": 0.5, "num_labels": 3, "out_features": ["stage1", "stage4"], "pooling": "cls_mean"}

LOAD_EVERYTHING = """
import sys, torch, PIL.Image
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
checkpoint, image, results, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # sums of another number of threads differ in their last bits
for package in ("sparsepath_vit", "triton"):
    try:
        __import__(package)
    except ImportError:
        continue
    raise AssertionError(f"{package} can be imported")

config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=True)
model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
classifier = AutoModelForImageClassification.from_pretrained(checkpoint, trust_remote_code=True)
backbone = AutoBackbone.from_config(config, trust_remote_code=True).eval()
backbone.load_state_dict(model.state_dict())
for one in (config, processor, model, classifier, backbone):
    assert type(one).__module__.startswith("transformers_modules."), type(one)
assert model.config._attn_implementation == "block_sparse"
inputs = processor(PIL.Image.open(image), return_tensors="pt")
with torch.no_grad():
    outputs = classifier(**inputs)
    torch.save({
        "pixel_values": inputs["pixel_values"],
        "pooler_output": model(**inputs).pooler_output,
        "logits": outputs.logits,
        "patch_positions": outputs.patch_positions,
        "feature_map": backbone(**inputs).feature_maps[0],
    }, results)
classifier.save_pretrained("saved_again")
AutoModelForImageClassification.from_pretrained("saved_again", trust_remote_code=True)
"""


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    model = small_model(SparsePathViTForImageClassification, **SETTINGS)
    model.save_pretrained(folder)
    SparsePathViTImageProcessorPil(patch_size=4).save_pretrained(folder)
    return folder


@torch.no_grad()
def test_every_auto_class_loads_it_without_the_package_and_gives_bitwise_the_same(checkpoint, tmp_path):
    pixels = torch.randint(256, (50, 71, 3), dtype=torch.uint8)
    PIL.Image.fromarray(pixels.numpy()).save(tmp_path / "region.png")
    arguments = [checkpoint, tmp_path / "region.png", tmp_path / "results.pt", torch.get_num_threads()]
    run_bare(LOAD_EVERYTHING, arguments, tmp_path, ABSENT_BESIDE_IMAGE_PROCESSOR)
    results = torch.load(tmp_path / "results.pt")

    inputs = SparsePathViTImageProcessorPil(patch_size=4)(tmp_path / "region.png", return_tensors="pt")
    classifier = SparsePathViTForImageClassification.from_pretrained(checkpoint)
    backbone = SparsePathViTBackbone.from_pretrained(checkpoint)
    outputs = classifier(**inputs)
    expected = {
        "pixel_values": inputs["pixel_values"],
        "pooler_output": classifier.sparsepath_vit(**inputs).pooler_output,
        "logits": outputs.logits,
        "patch_positions": outputs.patch_positions,
        "feature_map": backbone(**inputs).feature_maps[0],
    }
    assert results.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


@torch.no_grad()
def test_the_installed_package_goes_before_the_code_in_the_folder(checkpoint):
    """Nobody is asked to trust remote code where the package is installed, and no copy of it is executed."""
    for file in checkpoint.glob("*.py"):
        file.write_text("raise AssertionError('remote code was executed')\n")
    config = AutoConfig.from_pretrained(checkpoint)
    model = AutoModelForImageClassification.from_pretrained(checkpoint)
    processor = AutoImageProcessor.from_pretrained(checkpoint, backend="pil")
    assert (type(config), type(model)) == (SparsePathViTConfig, SparsePathViTForImageClassification)
    assert type(processor) is SparsePathViTImageProcessorPil
    expected = small_model(SparsePathViTForImageClassification, **SETTINGS)
    pixels = random_pixels(1, 5, 6)
    assert torch.equal(model(pixels).logits, expected(pixels).logits)


# Every way to save, each loaded by the Auto class a Hub user would take.
LOADED_BY = {
    "encoder": "AutoModel",
    "classifier": "AutoModelForImageClassification",
    "encoder of the classifier": "AutoModel",
    "backbone": "AutoBackbone",
    "adapter": "AutoBackbone",
    "mask2former": "AutoModelForUniversalSegmentation",
    "queries": "AutoModelForUniversalSegmentation",
    "merged": "AutoModelForImageClassification",
    "trainer": "AutoModelForImageClassification",
    "sharded": "AutoModelForImageClassification",
    "pushed": "AutoModelForImageClassification",
}

LOAD_EACH = """
import json, sys, torch, transformers
from pathlib import Path
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor
root, threads = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)  # sums of another number of threads differ in their last bits
pixels = torch.load(root / "pixels.pt")

def load(folder, auto_class):
    if auto_class != "AutoBackbone":
        return getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    # AutoBackbone.from_pretrained takes no local folder
    return type(AutoBackbone.from_config(config, trust_remote_code=True)).from_pretrained(folder)

def outputs_of(model):
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert getattr(model, "backbone", model).config._attn_implementation == "block_sparse"
    with torch.no_grad():
        outputs = model.eval()(pixels)
    names = ("last_hidden_state", "logits", "masks_queries_logits", "feature_maps")
    found = next(getattr(outputs, name) for name in names if getattr(outputs, name, None) is not None)
    return torch.cat([one.flatten() for one in found]) if isinstance(found, tuple) else found

for name, auto_class in json.loads((root / "loaded_by.json").read_text()).items():
    folder = root / name
    model = load(folder, auto_class)
    results = outputs_of(model)
    torch.save(results, root / f"{name}.pt")
    again = root / f"{name} again"
    model.save_pretrained(again)
    if (folder / "preprocessor_config.json").is_file():
        AutoImageProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
    assert torch.equal(outputs_of(load(again, auto_class)), results), name
    if name == "classifier":  # its encoder is of a class that no Auto class has loaded
        inner = model.sparsepath_vit
        inner.save_pretrained(root / "inner")
        assert torch.equal(outputs_of(load(root / "inner", "AutoModel")), outputs_of(inner))
"""


class FakeHub:
    """Takes the place of HfApi: keeps what is uploaded in a folder."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()

    def create_repo(self, repo_id, **kwargs):
        return types.SimpleNamespace(repo_id=repo_id)

    def create_commit(self, repo_id, operations, **kwargs):
        for operation in operations:
            shutil.copyfile(operation.path_or_fileobj, self.folder / operation.path_in_repo)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "pushed")
    for module in (hub_utilities, image_processing_base, modeling_utils):
        monkeypatch.setattr(module, "hf_api", lambda: fake)
        if hasattr(module, "create_and_tag_model_card"):
            monkeypatch.setattr(module, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("# Card"))
    return fake


def save_in_every_way(folder):
    """Saves models into folders named as in `LOADED_BY`; returns them with their images."""
    classifier = small_model(SparsePathViTForImageClassification, **SETTINGS)
    models = {
        "encoder": small_model(SparsePathViTModel, **SETTINGS),
        "classifier": classifier,
        "backbone": small_model(SparsePathViTBackbone, **SETTINGS),
        "adapter": large_weights_(SparsePathViTAdapterBackbone(adapter_config())).eval(),
        "mask2former": segmentation_model("mask2former"),
        "queries": segmentation_model("queries"),
        "merged": merged_model(),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    SparsePathViTImageProcessorPil(patch_size=4).save_pretrained(folder / "classifier")
    shutil.copytree(folder / "classifier", folder / "encoder of the classifier")
    models["encoder of the classifier"] = classifier.sparsepath_vit

    processor = SparsePathViTImageProcessorPil(patch_size=4)
    arguments = TrainingArguments(folder / "trainer", report_to=[], use_cpu=True)
    Trainer(classifier, arguments, processing_class=processor).save_model()
    state_dict = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    classifier.save_pretrained(folder / "sharded", state_dict=state_dict, max_shard_size="20KB")
    classifier.push_to_hub("me/pushed")
    processor.push_to_hub("me/pushed")
    return {**models, "trainer": classifier, "sharded": classifier, "pushed": classifier}


def adapter_config():
    return SparsePathViTAdapterConfig.from_vit_config(small_config(), **SMALL_ADAPTER)


def merged_model():
    lora = LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["classifier"], init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(small_model(SparsePathViTForImageClassification, **SETTINGS), lora).merge_and_unload()


def auto_map_of(folder):
    return json.loads((folder / "config.json").read_text())["auto_map"]


def saved_output(model, pixels):
    outputs = model.eval()(pixels)
    names = ("last_hidden_state", "logits", "masks_queries_logits", "feature_maps")
    found = next(getattr(outputs, name) for name in names if getattr(outputs, name, None) is not None)
    return torch.cat([one.flatten() for one in found]) if isinstance(found, tuple) else found


@torch.no_grad()
def test_every_saved_folder_loads_without_the_package_and_gives_bitwise_the_same(hub, tmp_path):
    """Regression: a fine-tuned model could be loaded by nobody else, for saving wrote no code."""
    pixels = random_pixels(1, 9, 12)
    torch.save(pixels, tmp_path / "pixels.pt")
    models = save_in_every_way(tmp_path)
    assert models.keys() == LOADED_BY.keys()
    (tmp_path / "loaded_by.json").write_text(json.dumps(LOADED_BY))
    run_bare(LOAD_EACH, [tmp_path, torch.get_num_threads()], tmp_path, ABSENT_BESIDE_IMAGE_PROCESSOR)
    for name, model in models.items():
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), saved_output(model, pixels)), name
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for name in LOADED_BY:  # what remote code saves is what it was loaded from
        first, second = (sorted((tmp_path / folder).glob("*.py")) for folder in (name, f"{name} again"))
        assert [file.name for file in first] == [file.name for file in second]
        assert all(one.read_bytes() == other.read_bytes() for one, other in zip(first, second, strict=True))
        assert auto_map_of(tmp_path / name) == auto_map_of(tmp_path / f"{name} again")
