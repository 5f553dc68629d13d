# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import re

import pytest
import torch

from sparsepath_vit import tiny_checkpoint
from sparsepath_vit.runtime.compute import describe_dtypes, faster_dtype, torch_device, weight_dtype
from sparsepath_vit.runtime.load_model import load_model


def test_defaults_follow_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert torch_device(None) == torch.device("cpu") and weight_dtype(None, torch.device("cpu")) == torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch_device(None) == torch.device("cuda") and weight_dtype(None, torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize(
    "bfloat16_seconds, chosen, said",
    [
        (0.25, torch.bfloat16, "bfloat16: .* 4.0 times as fast"),
        (6.0, torch.float32, "float32: .* 6.0 times as slow"),
    ],
)
def test_a_cpu_takes_the_type_it_is_faster_in(monkeypatch, bfloat16_seconds, chosen, said):
    seconds = {torch.float32: 1.0, torch.bfloat16: bfloat16_seconds}
    monkeypatch.setattr("sparsepath_vit.runtime.compute._matrix_seconds", seconds.get)
    assert weight_dtype(None, torch.device("cpu")) == faster_dtype("cpu") == chosen
    assert re.search(said, describe_dtypes("cpu"))


def test_a_loaded_model_has_the_same_numbers_on_any_cpu(monkeypatch):
    monkeypatch.setattr("sparsepath_vit.runtime.compute._matrix_seconds", {torch.float32: 1.0, torch.bfloat16: 0.1}.get)
    model, _ = load_model(tiny_checkpoint(), "cpu")
    assert model.dtype == torch.float32


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
