# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import pytest
from safetensors.torch import save_file
from source_networks import SMALL_TIMM, randomize, timm_network


@pytest.fixture(scope="session")
def small_network():
    """A small timm network in UNI2-h's form, with large random weights."""
    return randomize(timm_network("uni2-h", **SMALL_TIMM))


@pytest.fixture
def small_state(small_network):
    return dict(small_network.state_dict())


@pytest.fixture
def small_file(small_state, tmp_path):
    """Its state dict as the only file of a folder."""
    path = tmp_path / "source" / "model.safetensors"
    path.parent.mkdir()
    save_file(small_state, path)
    return path
