# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from sparsepath_vit.runtime.compute import torch_device, weight_dtype


def test_defaults_follow_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch_device(None) == torch.device("cpu") and weight_dtype(None, torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_device(None) == torch.device("cuda") and weight_dtype(None, torch.device("cuda")) == torch.bfloat16


def test_what_is_named_is_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert torch_device("cpu") == torch.device("cpu") and torch_device("cuda:1") == torch.device("cuda:1")
    assert weight_dtype("float16", torch.device("cpu")) == torch.float16


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"device='cuda:1' is not there: torch finds 1 CUDA devices"):
        torch_device("cuda:1")
    with pytest.raises(ValueError, match=r"device='gpu' is unknown: it takes cpu, cuda"):
        torch_device("gpu")


def test_types_that_are_unknown():
    with pytest.raises(ValueError, match=r"dtype='fp16' is unknown: it takes float32, bfloat16, float16"):
        weight_dtype("fp16", torch.device("cpu"))
