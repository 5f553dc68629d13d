# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Each adapter against the toolkit itself. `make interop` runs these files, each in an environment of its own."""

import re

import numpy as np
import pytest
import torch
from places import ROOT

from sparsepath_vit.plugins import FeatureExtractor
from sparsepath_vit.slides import Slide


@pytest.fixture
def tissue_slide(tmp_path):
    """1024 x 900 pixels at 0.5 mpp with one piece of tissue."""
    from slide_files import stained_image, write_pyramid

    return write_pyramid(tmp_path / "tissue.tiff", stained_image(1024, 900, [(64, 96, 800, 700)]))


@pytest.fixture
def own_features():
    """(tiles, width) of the same pixels through our own reader and the extractor."""

    def features(slide_path, corners, size, source, mpp=0.5, **arguments):
        extractor = FeatureExtractor(source, **arguments)
        with Slide(slide_path) as slide:
            tiles = [slide.read_region(x, y, size, size, mpp) for x, y in corners]
        return extractor(torch.stack([extractor.transform(tile) for tile in tiles])).numpy()

    return features


@pytest.fixture
def assert_agree():
    """Two sets of features differ by at most a share of the largest."""

    def check(found, expected, tolerance=1e-5):
        found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()

    return check


@pytest.fixture
def run_snippet(tissue_slide, tmp_path, monkeypatch):
    """Runs the block of docs/interop.md that needs a toolkit, in a folder that holds `slide.tiff`."""

    def run(toolkit):
        page = (ROOT / "docs/interop.md").read_text(encoding="utf-8")
        (code,) = re.findall(rf"<!-- not run: needs {toolkit}, [^\n]*-->\n```python\n(.*?)```", page, re.DOTALL)
        tissue_slide.rename(tmp_path / "slide.tiff")
        monkeypatch.chdir(tmp_path)
        exec(compile(code, "docs/interop.md", "exec"), {"__name__": "reader"})

    return run
