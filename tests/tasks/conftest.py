# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
from panda_files import small_panda
from PIL import Image
from small_models import small_model

from sparsepath_vit import SparsePathViTImageProcessor, SparsePathViTModel


@pytest.fixture(scope="session")
def panda_folder(tmp_path_factory):
    """12 Radboud and 6 Karolinska slides of 256 px; not to be changed."""
    return small_panda(tmp_path_factory.mktemp("panda"))


@pytest.fixture
def model():
    return small_model(
        SparsePathViTModel, patch_size=16, image_size=64, num_hidden_layers=2, prune_after_layer=1, prune_ratio=0.5
    )


@pytest.fixture
def processor():
    return SparsePathViTImageProcessor(patch_size=16)


@pytest.fixture
def image_folder(tmp_path):
    """Two classes of 8 noise images of 64 x 48 px, dark and bright; of 4 patients per class, by their names."""
    generator = np.random.default_rng(0)
    for name, level in (("dark", 60), ("bright", 180)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(8):
            pixels = generator.integers(level - 40, level + 40, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{name[0]}{number // 2}_{number}.png")
    return tmp_path / "images"
