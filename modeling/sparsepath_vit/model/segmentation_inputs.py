# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What the segmentation models do with pixels and configurations before the ViT sees them."""

import torch
from torch import nn
from transformers.utils import logging

from .configuration_segmentation_sparsepath_vit import STRIDES
from .configuration_sparsepath_vit import SparsePathViTConfig
from .patch_embeddings import SparsePathViTPatchEmbeddings

logger = logging.get_logger(__name__)


def pad_to_patches(pixel_values: torch.Tensor, patch_embeddings: SparsePathViTPatchEmbeddings) -> torch.Tensor:
    """Repeats the last rows and columns of pixels until both sides are multiples of the patch size.

    Raises:
        ValueError: pixels that the patch embeddings refuse, such as those of an image smaller than a patch.
    """
    patch_size = patch_embeddings.patch_size
    is_image = pixel_values.ndim == 4 and pixel_values.shape[1] == patch_embeddings.num_channels
    if is_image and pixel_values.is_floating_point() and min(pixel_values.shape[-2:]) >= patch_size:
        height, width = pixel_values.shape[-2:]
        padding = (0, -width % patch_size, 0, -height % patch_size)
        pixel_values = nn.functional.pad(pixel_values, padding, mode="replicate") if any(padding) else pixel_values
    patch_embeddings.check(pixel_values)
    return pixel_values


def check_group_norm(pixel_values: torch.Tensor) -> None:
    """Refuses images whose coarsest map is a single cell, which a GroupNorm would make all zeros.

    Raises:
        ValueError: names the size and the remedy.
    """
    height, width = pixel_values.shape[-2:]
    if max(height, width) <= STRIDES[-1]:
        raise ValueError(
            f"pixel_values is {height} x {width} px: normalising in groups needs more than {STRIDES[-1]} px on one "
            "side. Use a larger region."
        )


def allows_pruning(config: SparsePathViTConfig, is_training: bool) -> bool:
    """Whether a model that needs features at every place may prune: only where removed tokens come back.

    Raises:
        ValueError: pruning is on, removed tokens do not come back, and the model is being trained.
    """
    if not config.prunes or config.unprune is not None:
        return True
    message = (
        f"prune_ratio={config.prune_ratio} removes patch tokens, but segmentation needs features at every place. Set "
        'prune_ratio=0.0, or accept coarser features at the removed ones with unprune="scatter"'
    )
    if is_training:
        raise ValueError(f"{message}.")
    logger.warning_once(f"{message}; pruning is switched off.")
    return False
