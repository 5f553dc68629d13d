# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Pathology foundation models on large regions: block-local attention and token pruning for Transformers."""

from typing import TYPE_CHECKING

from .runtime.auto_classes import register_auto_classes
from .runtime.lazy_loading import lazy_names
from .version import __version__

if TYPE_CHECKING:
    from .checkpoints import copy_tiny_checkpoint, tiny_checkpoint
    from .model.adapter_sparsepath_vit import SparsePathViTAdapterBackbone
    from .model.attention_backends import set_block_attention_backend
    from .model.attention_operator import block_attention
    from .model.configuration_segmentation_sparsepath_vit import (
        SparsePathViTAdapterConfig,
        SparsePathViTUniversalSegmentationConfig,
    )
    from .model.configuration_sparsepath_vit import SparsePathViTConfig
    from .model.context_tokens import draw_context_tokens
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

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "checkpoints": ("copy_tiny_checkpoint", "tiny_checkpoint"),
        "model.adapter_sparsepath_vit": ("SparsePathViTAdapterBackbone",),
        "model.attention_backends": ("set_block_attention_backend",),
        "model.attention_operator": ("block_attention",),
        "model.configuration_segmentation_sparsepath_vit": (
            "SparsePathViTAdapterConfig",
            "SparsePathViTUniversalSegmentationConfig",
        ),
        "model.configuration_sparsepath_vit": ("SparsePathViTConfig",),
        "model.context_tokens": ("draw_context_tokens",),
        "model.image_processing_sparsepath_vit": ("SparsePathViTImageProcessor", "SparsePathViTImageProcessorPil"),
        "model.modeling_sparsepath_vit": (
            "SparsePathViTBackbone",
            "SparsePathViTForImageClassification",
            "SparsePathViTModel",
            "SparsePathViTPreTrainedModel",
        ),
        "model.segmentation_postprocessing": ("post_process_semantic_segmentation", "semantic_probabilities"),
        "model.segmentation_sparsepath_vit": ("SparsePathViTForUniversalSegmentation",),
        "model.token_grid": ("TokenGrid",),
    },
)

# The Auto classes know the models from here on; the models are imported when one of them, or a name below, is used.
register_auto_classes()

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
    "draw_context_tokens",
    "post_process_semantic_segmentation",
    "semantic_probabilities",
    "set_block_attention_backend",
    "tiny_checkpoint",
]
