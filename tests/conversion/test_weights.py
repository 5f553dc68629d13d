# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsepath_vit.conversion.weights import SAFETENSORS_TYPES, StackedTensor, write_safetensors

TYPES = list(SAFETENSORS_TYPES)


def as_parts(tensor):
    """A tensor cut into up to three stacked parts, one of them not contiguous."""
    parts = [part.clone() for part in tensor.tensor_split(3)] if len(tensor) >= 3 else [tensor]
    parts[0] = parts[0].mT.contiguous().mT if parts[0].ndim > 1 else parts[0]
    return StackedTensor(tuple(parts), tensor.dtype)


@pytest.mark.parametrize("dtypes", [TYPES[:1], TYPES[1:2], TYPES, TYPES[::-1]])
@pytest.mark.parametrize("name", ["a", "norm.weight", "a name that makes the header one byte longer"])
def test_the_file_is_byte_for_byte_the_librarys(tmp_path, dtypes, name):
    shapes = [(3, 5), (7,), (6, 3, 2, 2), (1, 1, 4)]
    tensors = {
        f"{name}.{index}": torch.randn(shape).to(dtypes[index % len(dtypes)]) for index, shape in enumerate(shapes)
    }
    save_file(tensors, tmp_path / "wanted", metadata={"format": "pt"})
    write_safetensors(tmp_path / "found", {key: as_parts(tensor) for key, tensor in tensors.items()})
    assert (tmp_path / "found").read_bytes() == (tmp_path / "wanted").read_bytes()


def test_parts_are_converted_to_the_type_of_the_whole(tmp_path):
    parts = (torch.randn(2, 3), torch.randn(4, 3).double())
    write_safetensors(tmp_path / "file", {"a": StackedTensor(parts, torch.bfloat16)})
    assert torch.equal(load_file(tmp_path / "file")["a"], torch.cat(parts).bfloat16())


def test_parameters_that_want_a_gradient_are_written(tmp_path):
    """Files of whole `nn.Parameter`s are read as such."""
    write_safetensors(tmp_path / "file", {"a": StackedTensor((torch.nn.Parameter(torch.ones(2)),), torch.float32)})
    assert torch.equal(load_file(tmp_path / "file")["a"], torch.ones(2))
