# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""SparsePathViT: a ViT with block-local attention and token pruning (method: arXiv 2601.12150)."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .attention_operator import ATTENTION_NAME
from .configuration_sparsepath_vit import SparsePathViTConfig, failure_signatures
from .embeddings import SparsePathViTEmbeddings
from .encoder_sparsepath_vit import AfterLayer, EncoderOutput, SparsePathViTEncoder, SparsePathViTLayerScale
from .modeling_outputs_sparsepath_vit import (
    SparsePathViTImageClassifierOutput,
    SparsePathViTModelOutput,
    public_outputs,
)
from .remote_code import ModelRemoteCodeMixin
from .token_grid import TokenGrid, per_image
from .token_pruning import restore_tokens, scatter_to_map

logger = logging.get_logger(__name__)


class SparsePathViTPreTrainedModel(ModelRemoteCodeMixin, PreTrainedModel):
    """Weight initialisation and what Transformers needs to know of the architecture."""

    config: SparsePathViTConfig
    config_class = SparsePathViTConfig
    base_model_prefix = "sparsepath_vit"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["SparsePathViTEmbeddings", "SparsePathViTLayer"]
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _input_embed_layer = "patch_embeddings"

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """`block_sparse` unless another implementation is asked for: dense is never a silent default."""
        try:
            return super().get_correct_attn_implementation(requested_attention or ATTENTION_NAME, is_init_check)
        except ValueError as error:  # Transformers names neither the default nor what is the matter
            raise ValueError(
                f"attn_implementation={requested_attention!r} is not supported: choose {ATTENTION_NAME!r} (the "
                "default), 'sdpa', 'eager' or 'flex_attention'. All give the same numbers."
            ) from error

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, SparsePathViTEmbeddings):
            init.trunc_normal_(module.position_embeddings, mean=0.0, std=self.config.initializer_range)
            init.trunc_normal_(module.cls_token, mean=0.0, std=self.config.initializer_range)
            if self.config.num_register_tokens:
                init.trunc_normal_(module.register_tokens, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, SparsePathViTLayerScale):
            init.constant_(module.lambda1, self.config.layerscale_value)

    def _encode(
        self,
        pixel_values: torch.Tensor,
        patch_mask: torch.Tensor | None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None,
        output_hidden_states: bool,
        output_attentions: bool,
        after_layer: AfterLayer | None = None,
        may_prune: bool = True,
    ) -> EncoderOutput:
        """Runs embeddings and encoder, which every model of this family has as `embeddings` and `encoder`."""
        if not torch.compiler.is_compiling():
            for warning in failure_signatures(self.config):
                logger.warning_once(warning)
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True needs the materialised attention: attn_implementation is "
                f'{self.config._attn_implementation!r}, call model.set_attn_implementation("eager").'
            )
        grid = self.embeddings.token_grid(pixel_values, patch_mask, image_sizes)
        hidden_states = self.embeddings(pixel_values, grid)
        return self.encoder(hidden_states, grid, output_hidden_states, output_attentions, after_layer, may_prune)

    def _output_switches(self, output_hidden_states: bool | None, output_attentions: bool | None) -> tuple[bool, bool]:
        """The caller's choice, or the config's."""
        return (
            self.config.output_hidden_states if output_hidden_states is None else bool(output_hidden_states),
            self.config.output_attentions if output_attentions is None else bool(output_attentions),
        )


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
        pixel_values: torch.Tensor,
        patch_mask: torch.Tensor | None = None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> SparsePathViTModelOutput:
        """Encodes images of any size.

        Args:
            pixel_values: (batch, channels, height, width), normalised; height and width multiples of the patch size.
            patch_mask: (batch, rows, columns) bool, True where a patch token is present; all are by default.
            image_sizes: (height, width) in pixels of each image, where smaller ones share a larger canvas; their
                positions are then those of their own grid.
            output_hidden_states: whether to return the tokens after each layer.
            output_attentions: whether to return the attention probabilities ("eager" only).
            **kwargs: `return_dict`, and arguments of a pipeline this model does not use.

        Raises:
            ValueError: pixels, mask or sizes that do not fit, or pixels that are not finite.
        """
        encoded = self._encode(
            pixel_values, patch_mask, image_sizes, *self._output_switches(output_hidden_states, output_attentions)
        )
        hidden_states, grid = encoded.last
        last_hidden_state = grid.to_raster(self.norm(hidden_states))
        pooler_output = self._pool(last_hidden_state, grid)
        if encoded.before_pruning is not None:
            all_tokens, all_grid, kept = encoded.before_pruning
            restored = restore_tokens(hidden_states, all_tokens, all_grid, kept)
            last_hidden_state = all_grid.to_raster(self.norm(restored))
        return SparsePathViTModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=pooler_output,
            **public_outputs(encoded),
        )

    def _pool(self, last_hidden_state: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
        """(batch, G + K, hidden_size) -> (batch, pooled_size)."""
        # A copy: a view would keep all tokens alive as long as somebody holds the pooled features.
        cls_token = last_hidden_state[:, 0].clone()
        if self.config.pooling == "cls":
            return cls_token
        counts = per_image(grid.counts, cls_token.device)[:, None]
        mean = last_hidden_state[:, grid.num_global_tokens :].float().sum(dim=1) / counts  # absent tokens are zero
        return torch.cat([cls_token, mean.to(cls_token.dtype)], dim=-1)


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
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        patch_mask: torch.Tensor | None = None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> SparsePathViTImageClassifierOutput:
        """Classifies images of any size; the arguments are those of `SparsePathViTModel`.

        Args:
            pixel_values: (batch, channels, height, width).
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
        pixel_values: torch.Tensor,
        patch_mask: torch.Tensor | None = None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        """Computes the feature maps named by `config.out_features`.

        Args:
            pixel_values: (batch, channels, height, width).
            patch_mask: (batch, rows, columns) bool; absent places are zero in the maps.
            image_sizes: (height, width) in pixels of each image.
            output_hidden_states: whether to return the tokens after each layer.
            output_attentions: whether to return the attention probabilities ("eager" only).
            **kwargs: `return_dict`.

        Returns:
            `feature_maps`, each (batch, hidden_size, rows, columns).
        """
        encoded = self._encode(
            pixel_values, patch_mask, image_sizes, True, self._output_switches(None, output_attentions)[1]
        )
        feature_maps = tuple(
            self._feature_map(encoded, index)
            for index, name in enumerate(self.stage_names)
            if name in self.out_features
        )
        outputs = public_outputs(encoded)
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs["hidden_states"], attentions=outputs["attentions"]
        )

    def _feature_map(self, encoded: EncoderOutput, stage: int) -> torch.Tensor:
        """(batch, hidden_size, rows, columns) after `stage` layers."""

        def to_map(tokens: torch.Tensor, grid: TokenGrid, base: torch.Tensor | float) -> torch.Tensor:
            return scatter_to_map(self.norm(tokens) if self.config.apply_layernorm else tokens, grid, base)

        base: torch.Tensor | float = 0.0
        if self.config.prunes and stage > self.config.prune_after_layer:
            base = to_map(*encoded.states[self.config.prune_after_layer], base)
        return to_map(*encoded.states[stage], base)


__all__ = [
    "SparsePathViTBackbone",
    "SparsePathViTForImageClassification",
    "SparsePathViTModel",
    "SparsePathViTPreTrainedModel",
]
