# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""From raw pixels to the numbers a network takes: one definition for the image processor and the models."""

from collections.abc import Sequence

import torch


def gain_and_offset(
    scale: float, mean: float | Sequence[float], std: float | Sequence[float], like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What pixels are multiplied by and what is added then, (3, 1, 1) each, of the dtype and device of `like`.

    Args:
        scale: of the pixels; 1 / 255 brings 0..255 to 0..1.
        mean, std: of the channels after scaling, or of all of them.
        like: a tensor.
    """
    mean, std = (torch.tensor(value, dtype=torch.float64).expand(3)[:, None, None] for value in (mean, std))
    return (scale / std).to(like), (-mean / std).to(like)


def normalised(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(..., 3, height, width) uint8 pixels as float32, with the numbers that the image processor gives."""
    values = pixels.float()
    gain, offset = gain_and_offset(1 / 255, mean, std, values)
    return values.mul_(gain).add_(offset)
