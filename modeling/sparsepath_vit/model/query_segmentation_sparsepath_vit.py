# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Segmentation by queries that join the ViT (EoMT, arXiv 2503.19108): no adapter, no pixel decoder.

Mask queries enter the last layers as extra global tokens: they attend to everything and are seen by everything, which
in block-local attention costs one run of keys. A query's mask is its product with mask features of stride 4: the patch
tokens, enlarged, and a few convolutions over the pixels for the edges that patches of 14 or 16 px cannot show.
"""

import math

import torch
from torch import nn

from .adapter_sparsepath_vit import token_map_at_stride
from .configuration_segmentation_sparsepath_vit import NORM_GROUPS, STRIDES, SparsePathViTUniversalSegmentationConfig
from .modeling_sparsepath_vit import SparsePathViTBackbone
from .segmentation_inputs import allows_pruning, pad_to_patches
from .token_grid import TokenGrid
from .token_pruning import EncodedTokens

MASK_STRIDE = STRIDES[0]


def join_global_tokens(
    hidden_states: torch.Tensor, grid: TokenGrid, joining: torch.Tensor
) -> tuple[torch.Tensor, TokenGrid]:
    """Puts the same extra global tokens behind the global tokens of each image.

    Args:
        hidden_states: (*grid.batch_shape, features).
        grid: where the tokens are.
        joining: (Q, features).

    Returns:
        (*joined grid.batch_shape, features), and the joined grid with G + Q global tokens.
    """
    num_before = grid.num_global_tokens
    joined = grid.with_global_tokens(num_before + joining.shape[0])
    packed = torch.cat([hidden_states.reshape(grid.num_tokens, -1), joining.to(hidden_states.dtype)])
    source = torch.empty(joined.num_tokens, dtype=torch.int64, device=grid.device)
    places = joined.global_indices().view(grid.batch_size, -1)
    source[places[:, :num_before]] = grid.global_indices().view(grid.batch_size, -1)
    source[places[:, num_before:]] = grid.num_tokens + torch.arange(joining.shape[0], device=grid.device)
    source[joined.patch_indices()] = grid.patch_indices()
    return packed[source].view(*joined.batch_shape, -1), joined


class SparsePathViTMaskFeatures(nn.Module):
    """Mask features of stride 4 from patch tokens and pixels."""

    def __init__(self, config: SparsePathViTUniversalSegmentationConfig) -> None:
        super().__init__()
        backbone_config, dim = config.backbone_config, config.query_feature_dim
        self.patch_size = backbone_config.patch_size
        groups = math.gcd(NORM_GROUPS, dim)
        self.token_projection = nn.Conv2d(backbone_config.hidden_size, dim, kernel_size=1)
        self.stem = nn.Sequential(
            nn.Conv2d(backbone_config.num_channels, dim, kernel_size=3, stride=2, padding=1),
            nn.GroupNorm(groups, dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, kernel_size=3, stride=2, padding=1),
        )
        self.fusion = nn.Sequential(
            nn.GroupNorm(groups, dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, kernel_size=3, padding=1),
            nn.GroupNorm(groups, dim),
            nn.GELU(),
            nn.Conv2d(dim, dim, kernel_size=1),
        )

    def edges(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) -> (batch, dim, ceil(height / 4), ceil(width / 4))."""
        return self.stem(pixel_values.to(self.token_projection.weight.dtype))

    def forward(self, token_map: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
        """(batch, hidden_size, rows, columns) and what `edges` returned -> mask features of the same size."""
        size = (edges.shape[2], edges.shape[3])
        coarse = token_map_at_stride(self.token_projection(token_map), self.patch_size, MASK_STRIDE, size)
        return self.fusion(coarse + edges)


class SparsePathViTQuerySegmenter(nn.Module):
    """The ViT with mask queries in its last layers; makes the queries' final states and their masks."""

    def __init__(self, config: SparsePathViTUniversalSegmentationConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = SparsePathViTBackbone(config.backbone_config)
        hidden_size, dim = config.backbone_config.hidden_size, config.query_feature_dim
        self.queries = nn.Embedding(config.num_queries, hidden_size)
        self.mask_features = SparsePathViTMaskFeatures(config)
        self.mask_head = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.GELU(), nn.Linear(hidden_size, hidden_size), nn.GELU(),
            nn.Linear(hidden_size, dim),
        )  # fmt: skip
        self.train(self.training)

    def train(self, mode: bool = True) -> "SparsePathViTQuerySegmenter":
        """As of any module, but frozen layers need no gradients and drop nothing out."""
        super().train(mode)
        if self.config.freeze_lower_layers:
            layers = self.backbone.encoder.layers[: len(self.backbone.encoder.layers) - self.config.num_query_layers]
            for module in (self.backbone.embeddings, layers):
                module.requires_grad_(False)
                module.eval()
        return self

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_mask: torch.Tensor | None = None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Predicts masks.

        Args:
            pixel_values: (batch, channels, height, width) of any height and width of at least one patch.
            patch_mask: (batch, rows, columns) bool, True where a patch token is present.
            image_sizes: (height, width) in pixels of each image on a larger canvas.

        Returns:
            The queries' states (batch, queries, hidden_size) and mask logits (batch, queries, ceil(height / 4),
            ceil(width / 4)): of the last layer, in training also of each layer the queries took part in before.
        """
        backbone_config = self.backbone.config
        pixel_values = self.backbone.embeddings.patch_embeddings.normalised(pixel_values)
        padded = pad_to_patches(pixel_values, self.backbone.embeddings.patch_embeddings)
        may_prune = allows_pruning(backbone_config, self.training)
        edges = self.mask_features.edges(pixel_values)
        first = backbone_config.num_hidden_layers - self.config.num_query_layers
        predicts_early = self.training and self.config.use_auxiliary_loss
        states, masks = [], []

        def predict(tokens: EncodedTokens) -> None:
            queries, logits = self._predict(tokens, edges)
            states.append(queries)
            masks.append(logits)

        def after_layer(number: int, tokens: EncodedTokens) -> EncodedTokens:
            if predicts_early and first < number < backbone_config.num_hidden_layers:
                predict(tokens)
            if number == first:
                joined = join_global_tokens(tokens.hidden_states, tokens.grid, self.queries.weight)
                tokens = EncodedTokens(*joined, tokens.pruning)
            return tokens

        grid = self.backbone.token_grid(padded, patch_mask, image_sizes)
        encoded = self.backbone.encode(padded, grid, after_layer=after_layer, may_prune=may_prune)
        predict(encoded.last)
        return states, masks

    def _predict(self, tokens: EncodedTokens, edges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From the tokens to the queries' states and their mask logits."""
        tokens, grid = tokens.apply(self.backbone.norm), tokens.grid
        places = grid.global_indices().view(grid.batch_size, -1)[:, -self.config.num_queries :]
        queries = tokens.hidden_states.reshape(grid.num_tokens, -1)[places]  # (batch, queries, hidden_size)
        features = self.mask_features(tokens.to_map(), edges)
        return queries, torch.einsum("bqc,bchw->bqhw", self.mask_head(queries), features)
