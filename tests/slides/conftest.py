# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
from pathlib import Path

import pytest
from slide_files import stained_image, write_pyramid

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
