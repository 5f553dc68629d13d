# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import os
import subprocess
import sys

import pytest
import torch

from sparsepath_vit import SparsePathViTConfig, SparsePathViTModel
from sparsepath_vit.model import remote_code
from sparsepath_vit.model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
from sparsepath_vit.model.remote_code import export_remote_code, remote_code_files

LOADS_WITHOUT_THE_PACKAGE = """
import sys
sys.modules["sparsepath_vit"] = None  # importing it fails, as where it is not installed
import numpy, torch
from transformers import AutoImageProcessor, AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
image = numpy.arange(3 * 56 * 70).reshape(56, 70, 3).astype(numpy.uint8)
with torch.inference_mode():
    torch.save(model(**processor(image, return_tensors="pt")).last_hidden_state, sys.argv[2])
assert "transformers_modules" in type(model).__module__
"""


def test_files_are_the_flat_model_files():
    names = {file.name for file in remote_code_files()}
    assert {
        "configuration_sparsepath_vit.py",
        "modeling_sparsepath_vit.py",
        "image_processing_sparsepath_vit.py",
        "token_grid.py",
        "embeddings.py",
        "attention_operator.py",
        "attention_specification.py",
        "attention_sdpa_tiles.py",
        "token_pruning.py",
    } <= names
    assert not names & {"__init__.py", "cli.py", "remote_code.py", "version.py"}


def test_export_needs_an_existing_folder(tmp_path):
    with pytest.raises(ValueError, match="output_dir='missing' is no folder"):
        export_remote_code(tmp_path / "missing")


def test_imports_from_outside_the_flat_folder_are_refused(monkeypatch, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner.py").write_text("")
    (tmp_path / "modeling_sparsepath_vit.py").write_text("from .folder.inner import something\n")
    monkeypatch.setattr(remote_code, "__file__", str(tmp_path / "remote_code.py"))
    with pytest.raises(ValueError, match=r"a model file imports folder.inner, which does not lie in it"):
        remote_code_files()


@torch.inference_mode()
def test_checkpoint_loads_where_the_package_is_not_installed(tmp_path):
    config = SparsePathViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, prune_after_layer=1,
        prune_ratio=0.5, window_size=2, image_size=56, initializer_range=0.5, layerscale_value=1.0,
    )  # fmt: skip
    model = SparsePathViTModel(config).eval()
    model.save_pretrained(tmp_path / "checkpoint")
    processor = SparsePathViTImageProcessor()
    processor.save_pretrained(tmp_path / "checkpoint")
    copies = export_remote_code(tmp_path / "checkpoint")
    assert [copy.name for copy in copies] == [file.name for file in remote_code_files()]

    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    arguments = [str(tmp_path / "checkpoint"), str(tmp_path / "output.pt")]
    run = subprocess.run(
        [sys.executable, "-c", LOADS_WITHOUT_THE_PACKAGE, *arguments], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    image = torch.arange(3 * 56 * 70).view(56, 70, 3).to(torch.uint8).numpy()
    wanted = model(**processor(image, return_tensors="pt")).last_hidden_state
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), wanted, rtol=1e-5, atol=1e-5)
