# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""How much memory is free, and a warning where a dense attention implementation will need more."""

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)


def warn_if_memory_is_short(
    implementation: str,
    batch: int,
    tokens: int,
    num_heads: int,
    dtype: torch.dtype,
    is_masked: bool,
    device: torch.device,
) -> None:
    """Warns once where a dense implementation will need more memory than there is."""
    if torch.compiler.is_compiling():
        return
    pairs = batch * tokens * tokens
    needed = pairs * 4 if is_masked else 0  # the pattern and its int32 intermediates
    if implementation == "eager":
        needed += pairs * num_heads * (dtype.itemsize + 4)  # logits, and their float32 softmax
    available = available_memory(device)
    if available is not None and needed > available:
        logger.warning_once(
            f"attn_implementation={implementation!r} needs about {needed / 2**30:.1f} GiB for {tokens} x {tokens} "
            f"attention, {available / 2**30:.1f} GiB are free on {device}. Use "
            'model.set_attn_implementation("block_sparse"), a smaller image, or window_size=8.'
        )


def available_memory(device: torch.device) -> int | None:
    """Free bytes on a CUDA device or of this machine; `None` where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:  # counts the page cache, which sysconf's free pages do not
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
