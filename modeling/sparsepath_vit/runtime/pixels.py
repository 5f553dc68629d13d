# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Pixels for a model as they are: whoever read them has chosen the resolution already."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import BatchFeature

    from ..model.image_processing_sparsepath_vit import SparsePathViTImageProcessor


def prepare(
    processor: "SparsePathViTImageProcessor",
    images: "Sequence[np.ndarray | torch.Tensor]",
    device: torch.device | None = None,
    *,
    mask_background: bool = False,
    **settings: Any,
) -> "BatchFeature":
    """Normalised pixels, not resampled whatever the processor's own resolution is.

    Args:
        processor: the model's image processor.
        images: (height, width, 3) uint8 each, of any sizes.
        device: where the results go; where the images are by default.
        mask_background: whether white patches are left out; the processor's own setting does not count.
        **settings: other settings of the processor, for this call only.

    Returns:
        `pixel_values`, `patch_mask` and `image_sizes`, see the processor.

    Raises:
        ValueError: an image smaller than one patch, or without tissue where background is left out.
    """
    place = {} if device is None else {"device": device}
    settings = {"input_data_format": "channels_last", "return_tensors": "pt", **place, **settings}
    return processor(list(images), do_resize=False, mask_background=mask_background, **settings)
