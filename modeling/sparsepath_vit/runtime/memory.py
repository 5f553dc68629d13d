# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a forward pass needs in memory, about, before it is run; and how running out of it is recognised."""

import math

import torch

from ..model.configuration_sparsepath_vit import SparsePathViTConfig
from ..model.device_memory import available_memory

# Tensors of (tokens, hidden_size) at the peak of a layer that runs as a whole: residual stream, norm, fused qkv, its
# three parts laid out anew, attended tokens, projection, and the output in raster order. In strips it needs far less.
_TOKEN_TENSORS = 14


def forward_bytes(config: SparsePathViTConfig, size: tuple[int, int], dtype: torch.dtype, batch_size: int = 1) -> int:
    """Memory of a forward pass beside the weights, about. Pruning does not lower the peak, which is before it.

    Args:
        config: of the model; its attention implementation decides whether attention is materialised.
        size: (height, width) of an image in pixels.
        dtype: of the weights.
        batch_size: images.
    """
    from ..model.streamed_layers import tokens_per_strip  # imports the model: not for who asks what is free

    patches = math.prod(math.ceil(side / config.patch_size) for side in size)
    tokens = patches + config.num_global_tokens
    pixels = 2 * 4 * config.num_channels * math.prod(size)  # the image, and its patches
    states = _TOKEN_TENSORS * tokens * config.hidden_size * dtype.itemsize
    in_strips = tokens_per_strip(config, torch.device("cpu")) or tokens
    wide = 3 * min(tokens, in_strips) * config.intermediate_size * dtype.itemsize
    per_pair = 0
    if config._attn_implementation == "eager":
        per_pair = config.num_attention_heads * (dtype.itemsize + 4)  # logits, and their float32 softmax
    if config._attn_implementation != "block_sparse" and config.window_size is not None:
        per_pair += 4  # the pattern and its int32 intermediates
    return batch_size * (pixels + states + wide + per_pair * tokens**2)


def free_bytes(device: torch.device, limit: int | None = None) -> int | None:
    """What is free on a device, and no more than `limit`; None where neither is known."""
    known = [number for number in (available_memory(device), limit) if number is not None]
    return min(known, default=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in the CPU's allocator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory")
    )
