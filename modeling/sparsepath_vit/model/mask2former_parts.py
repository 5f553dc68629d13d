# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Parts of Mask2Former that need less memory and full precision, under the same parameter names.

The stock head samples all points of all queries at once, computes them in the dtype of the features, and keeps the mask
maps of all ten predictions in evaluation too. For a region of thousands of pixels that is most of its memory.
"""

from typing import Any

import torch
from torch import nn
from transformers import Mask2FormerModel
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerMaskPredictor,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    Mask2FormerSinePositionEmbedding,
)

from .configuration_segmentation_sparsepath_vit import STRIDES, SparsePathViTUniversalSegmentationConfig
from .deformable_attention import MultiScaleDeformableAttention, deformable_attention, reference_points


class PixelDecoderAttention(Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention):
    """The pixel decoder's deformable attention in float32 and in chunks of queries."""

    def __init__(self, embed_dim: int, num_heads: int, n_levels: int, n_points: int) -> None:
        super().__init__(embed_dim, num_heads, n_levels, n_points)
        self.attend = MultiScaleDeformableAttention()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        position_embeddings: torch.Tensor | None = None,
        spatial_shapes_list: list[tuple[int, int]] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """As the stock layer, but a cell's centre is the same pixel in all maps also where their sizes were rounded up.

        Args:
            hidden_states: (batch, cells, feature_size), the queries.
            attention_mask: always False in Mask2Former, which pads no feature maps.
            encoder_hidden_states: (batch, cells, feature_size), the maps one after the other.
            position_embeddings: (batch, cells, feature_size), added to the queries.
            spatial_shapes_list: (height, width) of each map.
            **kwargs: what the stock layer also gets.

        Returns:
            (batch, cells, feature_size), and `None` in place of attention weights.
        """
        queries = hidden_states if position_embeddings is None else hidden_states + position_embeddings
        shape = (*queries.shape[:2], self.n_heads, self.n_levels, self.n_points)
        value = self.value_proj(encoder_hidden_states).unflatten(-1, (self.n_heads, -1))
        strides = list(STRIDES[:0:-1])  # the pixel decoder goes from the coarsest of its three maps to the finest
        points = reference_points(spatial_shapes_list, strides, spatial_shapes_list, strides, queries.device)
        attended = deformable_attention(
            self.attend,
            value,
            spatial_shapes_list,
            points,
            self.sampling_offsets(queries).view(*shape, 2),
            self.attention_weights(queries).view(shape),
        )
        return self.output_proj(attended), None


class FullPrecisionPositions(Mask2FormerSinePositionEmbedding):
    """Sine positions computed in float32: in bfloat16 neighbouring cells of a large map share one."""

    def forward(
        self, shape: torch.Size, device: torch.device | str, dtype: torch.dtype, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(batch, channels, height, width) in the dtype asked for."""
        return super().forward(shape, device, torch.promote_types(dtype, torch.float32), mask).to(dtype)


class LastMaskPredictor(Mask2FormerMaskPredictor):
    """In evaluation hands on what a mask says about attention, and not the mask, which only the last layer needs."""

    def masks(self, states: torch.Tensor, mask_features: torch.Tensor) -> torch.Tensor:
        """(batch, queries, hidden_dim) and (batch, channels, h, w) -> mask logits (batch, queries, h, w)."""
        return torch.einsum("bqc,bchw->bqhw", self.mask_embedder(states), mask_features)

    def forward(
        self, outputs: torch.Tensor, pixel_embeddings: torch.Tensor, attention_mask_target_size: Any = None
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The mask logits (`None` in evaluation), and where a head must not attend: (batch * heads, queries, cells)."""
        masks = self.masks(outputs.transpose(0, 1), pixel_embeddings)
        with torch.no_grad():
            resized = nn.functional.interpolate(
                masks, size=attention_mask_target_size, mode="bilinear", align_corners=False
            )
            is_outside = (resized.flatten(2).sigmoid() < 0.5)[:, None].expand(-1, self.num_heads, -1, -1)
        return (masks if self.training else None), is_outside.flatten(0, 1)


def lighten_mask2former(model: Mask2FormerModel, config: SparsePathViTUniversalSegmentationConfig) -> None:
    """Puts the parts above in the place of the stock ones; their weights are new and have the same names."""
    pixel_decoder = model.pixel_level_module.decoder
    for layer in pixel_decoder.encoder.layers:
        attention = layer.self_attn
        layer.self_attn = PixelDecoderAttention(
            attention.d_model, attention.n_heads, attention.n_levels, attention.n_points
        )
    for owner, name in ((pixel_decoder, "position_embedding"), (model.transformer_module, "position_embedder")):
        positions = getattr(owner, name)
        full_precision = FullPrecisionPositions(
            positions.num_position_features, positions.temperature, positions.normalize, positions.scale
        )
        setattr(owner, name, full_precision)
    model.transformer_module.decoder.mask_predictor = LastMaskPredictor(
        config.hidden_dim, config.num_attention_heads, config.mask_feature_size
    )
