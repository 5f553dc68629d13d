# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
from panda_files import PandaFolder

from sparsepath_vit.tasks.panda import label_mask
from sparsepath_vit.tasks.panda.label_mask import LabelMask, LabelMaskError, LabelOutsideTable

NAMES = ("background", "stroma", "benign", "G3", "G4", "G5")


@pytest.fixture
def labels():
    return np.random.default_rng(0).integers(0, 6, (160, 208), dtype=np.uint8)


@pytest.fixture
def path(tmp_path, labels):
    panda = PandaFolder(tmp_path)
    panda.write_mask("a", labels)
    return panda.mask_path("a")


def test_labels_are_read_and_counted_as_they_are(path, labels, monkeypatch):
    monkeypatch.setattr(label_mask, "_BAND_PIXELS", 1000)  # several bands
    with LabelMask(path, NAMES) as mask:
        assert mask.levels == ((208, 160), (52, 40), (13, 10))
        assert np.array_equal(mask.read(30, 20, 70, 90), labels[20:110, 30:100])
        expected = np.bincount(labels[20:110, 30:100].ravel(), minlength=6)
        assert np.array_equal(mask.areas(30, 20, 70, 90), expected)
        assert np.array_equal(mask.coarse(), labels[::16, ::16])
        assert np.array_equal(mask.coarse(4), labels[::4, ::4])


def test_a_label_outside_the_table_is_named(path):
    with LabelMask(path, NAMES[:4]) as mask, pytest.raises(LabelOutsideTable, match=r"labels \[4, 5\].*3 G3"):
        mask.areas(0, 0, 208, 160)


def test_a_damaged_mask_is_named(path):
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(LabelMaskError, match="a_mask"), LabelMask(path, NAMES) as mask:
        mask.areas(0, 0, 208, 160)
