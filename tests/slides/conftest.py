# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import sys
from pathlib import Path

import pytest
from slide_files import stained_image, write_pyramid

sys.path.append(str(Path(__file__).parents[1]))  # small_models

SHARED_DATA = Path(__file__).parents[2] / "../shared/data"


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
    return stained_image(640, 512, [(64, 96, 384, 256)])


@pytest.fixture
def small_slide(tmp_path, small_image):
    """`small_image` at 0.5 mpp with levels 1/1 and 1/4."""
    return write_pyramid(tmp_path / "small.tiff", small_image)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A small model with large random weights (patch size 16, pruning half its tokens) and its processor, saved."""
    from small_models import small_model

    from sparsepath_vit import SparsePathViTModel
    from sparsepath_vit.image_processing_sparsepath_vit import SparsePathViTImageProcessor

    folder = tmp_path_factory.mktemp("model")
    model = small_model(SparsePathViTModel, patch_size=16, image_size=96, window_size=8, prune_ratio=0.5)
    model.save_pretrained(folder)
    SparsePathViTImageProcessor(patch_size=16).save_pretrained(folder)
    return folder


@pytest.fixture
def model_and_processor(model_folder):
    """What `model_folder` holds."""
    import torch

    from sparsepath_vit.slides.embed import load_model

    return load_model(model_folder, torch.device("cpu"))
