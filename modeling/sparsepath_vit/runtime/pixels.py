# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Pixels for a model as they are: whoever read them has chosen the resolution already."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from transformers import BatchFeature

    from ..model.configuration_sparsepath_vit import SparsePathViTConfig
    from ..model.image_processing_sparsepath_vit import SparsePathViTImageProcessor


def prepare(
    processor: "SparsePathViTImageProcessor",
    images: "Sequence[np.ndarray | torch.Tensor]",
    device: torch.device | None = None,
    *,
    config: "SparsePathViTConfig | None" = None,
    mask_background: bool = False,
    **settings: Any,
) -> "BatchFeature":
    """Pixels as a model takes them, not resampled whatever the processor's own resolution is.

    Args:
        processor: the model's image processor.
        images: (height, width, 3) uint8 each, of any sizes.
        device: where the results go; where the images are by default.
        config: of the model they are for. Where it normalises raw pixels as the processor does, they stay raw, in a
            quarter of the memory; its features are the same.
        mask_background: whether white patches are left out; the processor's own setting does not count.
        **settings: other settings of the processor, for this call only.

    Returns:
        `pixel_values`, `patch_mask` and `image_sizes`, see the processor.

    Raises:
        ValueError: an image smaller than one patch, or without tissue where background is left out.
    """
    place = {} if device is None else {"device": device}
    settings = {"input_data_format": "channels_last", "return_tensors": "pt", **place, **settings}
    if config is not None and _normalises_alike(config, processor):
        settings |= {"do_rescale": False, "do_normalize": False}
    return processor(list(images), do_resize=False, mask_background=mask_background, **settings)


def _normalises_alike(config: "SparsePathViTConfig", processor: "SparsePathViTImageProcessor") -> bool:
    """Whether a model gives raw pixels the numbers that its image processor would."""
    if config.image_mean is None or not (processor.do_rescale and processor.do_normalize):
        return False
    of_model, of_processor = (
        [np.broadcast_to(getattr(source, name), config.num_channels).tolist() for name in ("image_mean", "image_std")]
        for source in (config, processor)
    )
    return of_model == of_processor and processor.rescale_factor == 1 / 255
