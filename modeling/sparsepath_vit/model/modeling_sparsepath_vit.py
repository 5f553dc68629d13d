# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""SparsePathViT: a ViT with block-local attention and token pruning (method: arXiv 2601.12150)."""

from typing import Any

import torch
from torch import nn
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from .configuration_sparsepath_vit import SparsePathViTConfig
from .embeddings import SparsePathViTEmbeddings
from .encoder_sparsepath_vit import EncoderOutput, SparsePathViTEncoder
from .image_lists import joined_images
from .modeling_outputs_sparsepath_vit import (
    SparsePathViTImageClassifierOutput,
    SparsePathViTModelOutput,
    attentions_in_raster,
    hidden_states_in_raster,
    normalised_in_raster,
    pooled_features,
    positions_in_raster,
    sizes_of_grids,
    weights_in_raster,
)
from .pretrained_model import SparsePathViTPreTrainedModel


class SparsePathViTModel(SparsePathViTPreTrainedModel):
    """The bare encoder: tokens, pooled features, and what pruning kept.

    Example:
    ```python
    >>> model = SparsePathViTModel.from_pretrained(directory, dtype="bfloat16")
    >>> outputs = model(**processor(image, return_tensors="pt"))
    >>> outputs.pooler_output.shape
    ```
    """

    def __init__(self, config: SparsePathViTConfig) -> None:
        super().__init__(config)
        self.embeddings = SparsePathViTEmbeddings(config)
        self.encoder = SparsePathViTEncoder(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | list[torch.Tensor],
        patch_mask: torch.Tensor | list[torch.Tensor] | None = None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> SparsePathViTModelOutput:
        """Encodes images of any size.

        Args:
            pixel_values: (batch, channels, height, width), normalised, or raw as uint8 where `config.image_mean` says
                how to normalise; height and width multiples of the patch size. Or a list of (channels, height, width)
                of several sizes; what belongs to images is then a list, too.
            patch_mask: (batch, rows, columns) bool, True where a patch token is present; all are by default.
            image_sizes: (height, width) in pixels of each image, where smaller ones share a larger canvas; their
                positions are then those of their own grid.
            output_hidden_states: whether to return the tokens after each layer.
            output_attentions: whether to return the attention probabilities ("eager" only).
            **kwargs: `return_dict`, and arguments of a pipeline this model does not use.

        Raises:
            ValueError: pixels, mask or sizes that do not fit, or pixels that are not finite.
        """
        keeps_states, keeps_attentions = self._output_switches(output_hidden_states, output_attentions)
        batch = joined_images(pixel_values, patch_mask, image_sizes, self.config.patch_size)
        grid = self.token_grid(*batch)
        encoded = self.encode(batch[0], grid, output_hidden_states=keeps_states, output_attentions=keeps_attentions)
        return self.finish(encoded, may_overwrite=not keeps_states)

    def finish(self, encoded: EncoderOutput, *, may_overwrite: bool = False) -> SparsePathViTModelOutput:
        """From encoded tokens to what the model returns: final norm, raster order, pooling, removed tokens.

        Args:
            encoded: what `encode` returned.
            may_overwrite: whether nobody needs `encoded` afterwards, so that its memory may be used at inference.

        Raises:
            ValueError: `config.unprune` was set after encoding.
        """
        tokens = encoded.last
        comes_back = self.config.unprune is not None and tokens.pruning is not None
        last_hidden_state = normalised_in_raster(self.norm, *tokens[:2], may_overwrite and not comes_back)
        # Of the kept tokens, whether the others come back or not.
        pooler_output = pooled_features(last_hidden_state, tokens.grid, self.config.pooling)
        if comes_back:
            tokens = tokens.restored()
            last_hidden_state = normalised_in_raster(self.norm, *tokens[:2], may_overwrite=True)
        return SparsePathViTModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=pooler_output,
            hidden_states=hidden_states_in_raster(encoded),
            attentions=attentions_in_raster(encoded),
            patch_positions=positions_in_raster(tokens.grid),
            grid_sizes=sizes_of_grids(tokens.grid),
            prune_scores=None if encoded.last.pruning is None else encoded.last.pruning.score_map(),
            patch_weights=weights_in_raster(tokens.grid),
        )


class SparsePathViTForImageClassification(SparsePathViTPreTrainedModel):
    """A linear classifier on the pooled features; single-label, multi-label or regression."""

    def __init__(self, config: SparsePathViTConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.sparsepath_vit = SparsePathViTModel(config)
        self.classifier = nn.Linear(config.pooled_size, config.num_labels) if config.num_labels else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | list[torch.Tensor],
        labels: torch.Tensor | None = None,
        patch_mask: torch.Tensor | list[torch.Tensor] | None = None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> SparsePathViTImageClassifierOutput:
        """Classifies images of any size; the arguments are those of `SparsePathViTModel`.

        Args:
            pixel_values: (batch, channels, height, width), or a list of images.
            labels: (batch,) class indices, (batch, num_labels) for multi-label, (batch,) or (batch, num_labels) numbers
                for regression; `config.problem_type` says which, or it is inferred as Transformers does.
            patch_mask: (batch, rows, columns) bool.
            image_sizes: (height, width) in pixels of each image.
            output_hidden_states: whether to return the tokens after each layer.
            output_attentions: whether to return the attention probabilities ("eager" only).
            **kwargs: arguments of the loss.
        """
        kwargs.pop("return_dict", None)
        outputs = self.sparsepath_vit(
            pixel_values,
            patch_mask=patch_mask,
            image_sizes=image_sizes,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return SparsePathViTImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            patch_positions=outputs.patch_positions,
            patch_weights=outputs.patch_weights,
            grid_sizes=outputs.grid_sizes,
            prune_scores=outputs.prune_scores,
        )


class SparsePathViTBackbone(BackboneMixin, SparsePathViTPreTrainedModel):
    """Feature maps of any layers, for detection and segmentation heads.

    Where the config prunes, the maps after pruning hold each removed token's last features; switch pruning off
    (`prune_ratio=0.0`) where every place needs features of the last layer.
    """

    def __init__(self, config: SparsePathViTConfig) -> None:
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.embeddings = SparsePathViTEmbeddings(config)
        self.encoder = SparsePathViTEncoder(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor | list[torch.Tensor],
        patch_mask: torch.Tensor | list[torch.Tensor] | None = None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        """Computes the feature maps named by `config.out_features`.

        Args:
            pixel_values: (batch, channels, height, width), or a list of images as `SparsePathViTModel` takes it.
            patch_mask: (batch, rows, columns) bool; absent places are zero in the maps.
            image_sizes: (height, width) in pixels of each image.
            output_hidden_states: whether to return the tokens after each layer.
            output_attentions: whether to return the attention probabilities ("eager" only).
            **kwargs: `return_dict`.

        Returns:
            `feature_maps`, each (batch, hidden_size, rows, columns); with `config.reshape_hidden_states` off each
            (batch, 1 + rows * columns, hidden_size).
        """
        batch = joined_images(pixel_values, patch_mask, image_sizes, self.config.patch_size)
        _, keeps_attentions = self._output_switches(None, output_attentions)
        grid = self.token_grid(*batch)
        encoded = self.encode(batch[0], grid, output_hidden_states=True, output_attentions=keeps_attentions)
        layers = [layer for layer, name in enumerate(self.stage_names) if name in self.out_features]
        view = self.feature_map if self.config.reshape_hidden_states else self._feature_sequence
        feature_maps = tuple(view(encoded, layer) for layer in layers)
        return BackboneOutput(
            feature_maps=feature_maps,
            hidden_states=hidden_states_in_raster(encoded),
            attentions=attentions_in_raster(encoded),
        )

    def _feature_sequence(self, encoded: EncoderOutput, layer: int) -> torch.Tensor:
        """As `feature_map`, (batch, 1 + rows * columns, hidden_size): the CLS token, then the places row by row."""
        tokens = encoded.states[layer]
        cls_token = tokens.grid.to_raster(tokens.hidden_states)[:, :1]
        cls_token = self.norm(cls_token) if self.config.apply_layernorm else cls_token
        return torch.cat([cls_token, self.feature_map(encoded, layer).flatten(2).transpose(1, 2)], dim=1)


__all__ = [
    "SparsePathViTBackbone",
    "SparsePathViTForImageClassification",
    "SparsePathViTModel",
    "SparsePathViTPreTrainedModel",
]
