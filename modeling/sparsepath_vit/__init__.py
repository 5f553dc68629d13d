# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Pathology foundation models on large regions: block-local attention and token pruning for Transformers."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForUniversalSegmentation,
)

from .checkpoints import copy_tiny_checkpoint, tiny_checkpoint
from .model.adapter_sparsepath_vit import SparsePathViTAdapterBackbone
from .model.attention_backends import set_block_attention_backend
from .model.attention_operator import block_attention
from .model.configuration_segmentation_sparsepath_vit import (
    SparsePathViTAdapterConfig,
    SparsePathViTUniversalSegmentationConfig,
)
from .model.configuration_sparsepath_vit import SparsePathViTConfig
from .model.image_processing_sparsepath_vit import SparsePathViTImageProcessor, SparsePathViTImageProcessorPil
from .model.modeling_sparsepath_vit import (
    SparsePathViTBackbone,
    SparsePathViTForImageClassification,
    SparsePathViTModel,
    SparsePathViTPreTrainedModel,
)
from .model.segmentation_postprocessing import post_process_semantic_segmentation, semantic_probabilities
from .model.segmentation_sparsepath_vit import SparsePathViTForUniversalSegmentation
from .model.token_grid import TokenGrid
from .version import __version__

AutoConfig.register("sparsepath_vit", SparsePathViTConfig, exist_ok=True)
AutoModel.register(SparsePathViTConfig, SparsePathViTModel, exist_ok=True)
AutoModelForImageClassification.register(SparsePathViTConfig, SparsePathViTForImageClassification, exist_ok=True)
AutoBackbone.register(SparsePathViTConfig, SparsePathViTBackbone, exist_ok=True)
AutoConfig.register("sparsepath_vit_adapter", SparsePathViTAdapterConfig, exist_ok=True)
AutoBackbone.register(SparsePathViTAdapterConfig, SparsePathViTAdapterBackbone, exist_ok=True)
AutoConfig.register("sparsepath_vit_segmentation", SparsePathViTUniversalSegmentationConfig, exist_ok=True)
AutoModelForUniversalSegmentation.register(
    SparsePathViTUniversalSegmentationConfig, SparsePathViTForUniversalSegmentation, exist_ok=True
)
AutoImageProcessor.register(
    SparsePathViTConfig,
    image_processor_classes={"torchvision": SparsePathViTImageProcessor, "pil": SparsePathViTImageProcessorPil},
    exist_ok=True,
)

__all__ = [
    "SparsePathViTAdapterBackbone",
    "SparsePathViTAdapterConfig",
    "SparsePathViTBackbone",
    "SparsePathViTConfig",
    "SparsePathViTForImageClassification",
    "SparsePathViTForUniversalSegmentation",
    "SparsePathViTImageProcessor",
    "SparsePathViTImageProcessorPil",
    "SparsePathViTModel",
    "SparsePathViTPreTrainedModel",
    "SparsePathViTUniversalSegmentationConfig",
    "TokenGrid",
    "__version__",
    "block_attention",
    "copy_tiny_checkpoint",
    "post_process_semantic_segmentation",
    "semantic_probabilities",
    "set_block_attention_backend",
    "tiny_checkpoint",
]
