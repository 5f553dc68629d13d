# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint and its image processor, from a folder or the Hub, ready to run."""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME

from ..model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
from .checkpoint_paths import checkpoint_config, existing_source
from .compute import torch_device, weight_dtype


def load_model(
    source: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    *,
    model_class: type = AutoModel,
    **overrides: Any,
) -> tuple[PreTrainedModel, SparsePathViTImageProcessor]:
    """A model in evaluation mode and its image processor.

    Args:
        source: folder or Hub id of a converted checkpoint.
        device: where the weights go; by default CUDA where there is one, else the CPU.
        dtype: of the weights; by default bfloat16 on CUDA, else float32, in which results do not depend on the CPU.
        model_class: any model or Auto class; the bare encoder by default.
        **overrides: fields of the configuration, or other arguments of `from_pretrained`.

    Raises:
        ValueError: an unknown device or dtype, a checkpoint that is none of ours (a foundation model that was not
            converted), or a processor that does not fit the model.
        OSError: no checkpoint at `source`; a path that does not exist is called so.
    """
    source = existing_source(source)
    device = device if isinstance(device, torch.device) else torch_device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    elif isinstance(dtype, str):
        dtype = weight_dtype(dtype, device)
    has_adapters_alone = (Path(source) / ADAPTER_CONFIG_NAME).is_file()  # their configuration names the model
    if not has_adapters_alone:
        checkpoint_config(source)
    model = model_class.from_pretrained(source, dtype=dtype, **overrides)
    processor = AutoImageProcessor.from_pretrained(source)
    patch_size = getattr(model.config, "backbone_config", model.config).patch_size
    if processor.patch_size != patch_size:
        raise ValueError(
            f"{source}: the processor's patch_size={processor.patch_size} is not the model's {patch_size}: correct "
            "preprocessor_config.json."
        )
    return model.to(device).eval(), processor
