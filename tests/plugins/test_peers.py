# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import importlib.metadata

import pytest

from sparsepath_vit import plugins
from sparsepath_vit.plugins.peers import import_peer


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("eva_backbone", "kaiko-eva is not installed, and this adapter is for kaiko-eva>=0.4.5"),
        ("SparsePathViTImageModel", "lazyslide-models is not installed, .* lazyslide-models>=0.1.0"),
        ("trident_encoder", "trident is not installed, .* trident>=0.3"),
        ("register_slide2vec_encoders", "slide2vec is not installed, .* slide2vec>=7.1"),
    ],
)
def test_a_toolkit_that_is_missing_is_named_with_the_version_it_takes(name, words, model_folder, monkeypatch):
    def missing(distribution):
        raise importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr("sparsepath_vit.plugins.peers.version", missing)
    with pytest.raises(ImportError, match=words):
        adapter = getattr(plugins, name)
        adapter(model_folder) if name == "trident_encoder" else adapter()


def test_a_toolkit_that_is_too_old_or_of_another_kind_is_named():
    assert import_peer("numpy", "1.0", "numpy.linalg").norm
    with pytest.raises(ImportError, match=r"numpy .* is installed, and this adapter takes numpy>=99"):
        import_peer("numpy", "99", "numpy")
    with pytest.raises(
        ImportError, match=r"numpy .* is installed, and numpy\.pathology, which this adapter was written for"
    ):
        import_peer("numpy", "1.0", "numpy.pathology")
