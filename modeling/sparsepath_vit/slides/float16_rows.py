# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Features in float16, as they are stored, without a second copy of those of a whole slide."""

import numpy as np
import torch

_ROWS_AT_ONCE = 4096  # 25 MB of float32 at 1536 channels


def float16_rows(features: torch.Tensor, may_overwrite: bool = False) -> np.ndarray:
    """The features as float16, made piece by piece.

    Args:
        features: (tokens, channels), contiguous.
        may_overwrite: whether nobody needs them afterwards: on a CPU the result then takes their place in memory.

    Returns:
        (tokens, channels) on the CPU.
    """
    if may_overwrite and features.device.type == "cpu":
        place = features.view(-1).view(torch.float16)[: features.numel()].view(features.shape)
    else:
        place = torch.empty(features.shape, dtype=torch.float16)
    for start in range(0, len(features), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        place[rows] = features[rows].half()  # being no wider, they end before those that are read next
    return place.numpy()
