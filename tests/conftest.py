# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import logging
import os
import sys
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings
from packaging.version import Version
from places import SHARED_DATA

# Triton 3.6, which torch 2.11 requires, reads loop bounds in its interpreter in a way NumPy 2.4 refuses.
interpreter_works = find_spec("triton") and (
    Version(version("triton")) >= Version("3.7") or Version(version("numpy")) < Version("2.4")
)
# Without a GPU the Triton kernels run interpreted. Triton asks for this once, when it is imported.
if interpreter_works and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run: a failure in CI is a failure on every machine.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def same_start():
    # Threads of small operations wait for each other, on a busy machine for longer than they compute.
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_numbers_on_any_cpu(monkeypatch):
    """By default commands take the type that this CPU is faster in: here float32, as on a CPU where both are alike."""
    monkeypatch.setattr("sparsepath_vit.runtime.compute._matrix_seconds", lambda dtype: 1.0)


@pytest.fixture
def warnings_said(caplog):
    """Calls a function and returns the warnings it logged, as if nothing had been warned of before."""

    def said_by(function):
        logging.Logger.warning_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            function()
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    yield said_by
    logging.Logger.warning_once.cache_clear()


@pytest.fixture
def block_attention_backend():
    """Sets the backend of block_sparse attention for one test."""
    from sparsepath_vit import set_block_attention_backend

    yield set_block_attention_backend
    set_block_attention_backend("auto")


@pytest.fixture
def run_script(monkeypatch):
    """Runs a loaded script's `main` with command-line arguments."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
        script.main()

    return run


@pytest.fixture
def shared_slide():
    """Path of a real slide by its name; skips where the shared data is absent."""

    def find(name):
        path = SHARED_DATA / name
        if not path.exists():
            pytest.skip(f"needs the shared data ({name})")
        return path

    return find


@pytest.fixture
def small_image():
    """640 x 512 pixels with one piece of tissue."""
    from slide_files import stained_image

    return stained_image(640, 512, [(64, 96, 384, 256)])


@pytest.fixture
def small_slide(tmp_path, small_image):
    """`small_image` at 0.5 mpp with levels 1/1 and 1/4."""
    from slide_files import write_pyramid

    return write_pyramid(tmp_path / "small.tiff", small_image)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A small model with large random weights (patch size 16, pruning half its tokens) and its processor, saved."""
    from small_models import small_model

    from sparsepath_vit import SparsePathViTModel
    from sparsepath_vit.model.image_processing_sparsepath_vit import SparsePathViTImageProcessor

    folder = tmp_path_factory.mktemp("model")
    model = small_model(SparsePathViTModel, patch_size=16, image_size=96, window_size=8, prune_ratio=0.5)
    model.save_pretrained(folder)
    SparsePathViTImageProcessor(patch_size=16).save_pretrained(folder)
    return folder


@pytest.fixture
def model_and_processor(model_folder):
    """What `model_folder` holds."""
    import torch

    from sparsepath_vit.runtime.load_model import load_model

    return load_model(model_folder, torch.device("cpu"))
