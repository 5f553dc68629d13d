# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from sparsepath_vit.slides import EmbeddedSlide, SlideError
from sparsepath_vit.slides.token_probabilities import TokenProbe


def saved(path, weight, bias, names=None):
    metadata = None if names is None else {"names": json.dumps(names)}
    save_file({"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}, path, metadata)
    return path


def test_probabilities_are_the_softmax_of_the_classifier(embedded, tmp_path):
    with h5py.File(embedded[1]) as file:
        features = file["patch_features"][:].astype(float)
    generator = np.random.default_rng(0)
    weight, bias = generator.normal(size=(3, features.shape[1])), generator.normal(size=3)
    probe = TokenProbe.load(saved(tmp_path / "probe.safetensors", weight, bias, ["tumour", "stroma", "other"]))
    found = probe.probabilities(EmbeddedSlide(embedded[1]))
    logits = features @ weight.T + bias
    expected = np.exp(logits - logits.max(axis=1, keepdims=True))
    assert np.allclose(found, expected / expected.sum(axis=1, keepdims=True), atol=1e-4)
    values = probe.values(EmbeddedSlide(embedded[1]), 1)
    assert values.name == "probability_stroma" and values.limits == (0, 1) and np.allclose(values.values, found[:, 1])


def test_what_is_no_classifier_of_these_tokens_is_refused(embedded, tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(SlideError, match="cannot be read as a linear classifier"):
        TokenProbe.load(tmp_path / "text.safetensors")
    with pytest.raises(SlideError, match="a bias of shape"):
        TokenProbe.load(saved(tmp_path / "bias.safetensors", np.zeros((3, 8)), np.zeros(2)))
    with pytest.raises(SlideError, match="and 1 names"):
        TokenProbe.load(saved(tmp_path / "names.safetensors", np.zeros((3, 8)), np.zeros(3), ["one"]))
    probe = TokenProbe.load(saved(tmp_path / "other.safetensors", np.zeros((2, 8)), np.zeros(2)))
    assert probe.names == ("class 0", "class 1")
    with pytest.raises(SlideError, match="takes features of 8 channels"):
        probe.probabilities(EmbeddedSlide(embedded[1]))
