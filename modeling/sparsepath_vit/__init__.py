# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Pathology foundation models on large regions: block-local attention and token pruning for Transformers."""

from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from .block_attention import block_attention, set_block_attention_backend
from .configuration_sparsepath_vit import SparsePathViTConfig
from .image_processing_sparsepath_vit import SparsePathViTImageProcessor, SparsePathViTImageProcessorPil
from .modeling_sparsepath_vit import (
    SparsePathViTBackbone,
    SparsePathViTForImageClassification,
    SparsePathViTModel,
    SparsePathViTPreTrainedModel,
)
from .token_grid import TokenGrid
from .version import __version__

AutoConfig.register("sparsepath_vit", SparsePathViTConfig, exist_ok=True)
AutoModel.register(SparsePathViTConfig, SparsePathViTModel, exist_ok=True)
AutoModelForImageClassification.register(SparsePathViTConfig, SparsePathViTForImageClassification, exist_ok=True)
AutoBackbone.register(SparsePathViTConfig, SparsePathViTBackbone, exist_ok=True)
AutoImageProcessor.register(
    SparsePathViTConfig,
    image_processor_classes={"torchvision": SparsePathViTImageProcessor, "pil": SparsePathViTImageProcessorPil},
    exist_ok=True,
)

__all__ = [
    "SparsePathViTBackbone",
    "SparsePathViTConfig",
    "SparsePathViTForImageClassification",
    "SparsePathViTImageProcessor",
    "SparsePathViTImageProcessorPil",
    "SparsePathViTModel",
    "SparsePathViTPreTrainedModel",
    "TokenGrid",
    "__version__",
    "block_attention",
    "set_block_attention_backend",
]
