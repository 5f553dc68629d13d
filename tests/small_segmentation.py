# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Small segmentation models of either head, with large weights, and labels for them."""

import torch
from small_models import SMALL, large_weights_

from sparsepath_vit import SparsePathViTConfig, SparsePathViTForUniversalSegmentation
from sparsepath_vit import SparsePathViTUniversalSegmentationConfig as SegmentationConfig

SMALL_HEAD = {
    "feature_size": 32, "hidden_dim": 32, "mask_feature_size": 32, "num_queries": 5, "encoder_layers": 1,
    "decoder_layers": 3, "num_attention_heads": 2, "dim_feedforward": 32, "encoder_feedforward_dim": 32,
    "train_num_points": 100, "num_query_layers": 2, "query_feature_dim": 16,
}  # fmt: skip
SMALL_ADAPTER = {"adapter_dim": 16, "adapter_num_heads": 2, "adapter_num_points": 2, "adapter_stem_dim": 8}
LABELS = {0: "background", 1: "nucleus", 2: "plasma cell"}


def segmentation_config(head, freeze_vit=False, vit=None, **overrides):
    vit_config = SparsePathViTConfig(**{**SMALL, **(vit or {})})
    backbone_kwargs = dict(SMALL_ADAPTER) if head == "mask2former" else {}
    return SegmentationConfig.from_vit_config(
        vit_config, head, freeze_vit, backbone_kwargs, **{"id2label": LABELS, **SMALL_HEAD, **overrides}
    )


def segmentation_model(head, seed=0, **overrides):
    return large_weights_(SparsePathViTForUniversalSegmentation(segmentation_config(head, **overrides)), seed).eval()


def random_images(batch, height, width, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def random_labels(height, width, classes=((0, 1), (2,)), seed=0):
    """`mask_labels` and `class_labels` of as many images as `classes` has entries."""
    generator = torch.Generator().manual_seed(seed)
    masks = [(torch.rand(len(one), height, width, generator=generator) < 0.5).float() for one in classes]
    return {"mask_labels": masks, "class_labels": [torch.tensor(one, dtype=torch.int64) for one in classes]}
