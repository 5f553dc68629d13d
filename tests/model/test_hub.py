# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint folder as it lies on the Hub: every Auto class loads it without this package, with the same numbers."""

import PIL.Image
import pytest
import torch
from bare_python import ABSENT_BESIDE_IMAGE_PROCESSOR, run_bare
from small_models import random_pixels, small_model
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from sparsepath_vit import (
    SparsePathViTBackbone,
    SparsePathViTConfig,
    SparsePathViTForImageClassification,
    SparsePathViTImageProcessorPil,
)
from sparsepath_vit.model.remote_code import export_remote_code

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
    export_remote_code(folder)
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
