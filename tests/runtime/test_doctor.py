# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import importlib.util

import pytest
import torch

from sparsepath_vit.runtime import doctor


@pytest.fixture
def by_subject():
    return lambda: {finding.subject: finding for finding in doctor.examine()}


def test_the_doctor_names_versions_and_the_backend_with_its_reason(by_subject):
    found = by_subject()
    assert found["torch"].state == torch.__version__.split("+")[0] or found["torch"].state == torch.__version__
    assert ": " in found["block_sparse on cpu"].state
    assert found["GPU"].state


def test_a_missing_package_comes_with_the_command_that_installs_it(by_subject, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "h5py" else find_spec(name, *rest)
    )
    missing = by_subject()["h5py"]
    assert not missing.is_well
    assert missing.remedy == 'pip install "sparsepath-vit[slides]"'


def test_without_a_login_the_doctor_says_how_to_get_gated_weights(by_subject, monkeypatch):
    monkeypatch.setattr(doctor, "get_token", lambda: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert "hf auth login" in by_subject()["gated weights"].remedy
    monkeypatch.setattr(doctor, "get_token", lambda: "a token")
    assert by_subject()["gated weights"].is_well


def test_no_unmet_need_is_without_a_remedy():
    assert all(finding.is_well or finding.remedy for finding in doctor.examine())
