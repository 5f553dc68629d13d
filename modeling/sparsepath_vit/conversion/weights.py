# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Writes parameters to a safetensors file one tensor at a time: memory holds one of them, however large the model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

# safetensors' names of the types that weights may have, in the order of its files: wider types come first.
SAFETENSORS_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class StackedTensor:
    """A tensor given by the parts that are stacked along its rows, so that the whole need not exist in memory.

    Args:
        parts: tensors that are alike but for their number of rows.
        dtype: type of the whole; each part is converted when it is written.
    """

    parts: tuple[torch.Tensor, ...]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole."""
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def num_elements(self) -> int:
        """Number of elements of the whole."""
        return sum(part.numel() for part in self.parts)


def write_safetensors(path: Path, tensors: Mapping[str, StackedTensor]) -> None:
    """Writes the very bytes of `safetensors.torch.save_file(..., metadata={"format": "pt"})`, which needs all at once.

    The format: the header's length in 8 bytes, a JSON header padded with spaces to a multiple of 8 bytes, and the
    tensors' bytes one after another, little endian.

    Args:
        path: the file to write.
        tensors: name -> tensor of one of `SAFETENSORS_TYPES`.

    Raises:
        ValueError: a tensor holds NaN or infinite numbers, of itself or in the type wanted.
    """
    order = list(SAFETENSORS_TYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.num_elements * tensor.dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_TYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in tqdm(names, desc="converting", unit="tensor", leave=False):
            for part in tensors[name].parts:
                part = part.detach().to(tensors[name].dtype).contiguous()
                if not torch.stack(part.aminmax()).isfinite().all():  # NaN is passed on; no second tensor is needed
                    raise ValueError(
                        f"{name} holds NaN or infinite numbers as {str(part.dtype).removeprefix('torch.')}: the "
                        "checkpoint is damaged, or its numbers are too large for float16 (bfloat16 takes them)."
                    )
                file.write(part.view(-1).view(torch.uint8).numpy())
