# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What all models of the family share: the steps of a forward, weight initialisation, the choice of attention."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .attention_registration import ATTENTION_NAME
from .configuration_sparsepath_vit import SparsePathViTConfig, failure_signatures
from .embeddings import OnTokens, SparsePathViTEmbeddings, token_grid_of_sizes
from .encoder_sparsepath_vit import AfterLayer, EncoderOutput, SparsePathViTLayerScale
from .lora_targets import LoraTargetsMixin
from .process_split import ProcessSplitMixin, together
from .remote_code import ModelRemoteCodeMixin
from .token_grid import TokenGrid
from .token_pruning import EncodedTokens

logger = logging.get_logger(__name__)


class SparsePathViTPreTrainedModel(ProcessSplitMixin, ModelRemoteCodeMixin, LoraTargetsMixin, PreTrainedModel):
    """What all models of the family share: the way from pixels to encoded tokens, and what Transformers asks for.

    A forward is three steps, which code that needs something in between calls one by one: `token_grid` (or
    `token_grid_of_image`), `encode`, and `SparsePathViTModel.finish` or `feature_map`.
    """

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

    @together
    def token_grid(
        self,
        pixel_values: torch.Tensor,
        patch_mask: torch.Tensor | None = None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
    ) -> TokenGrid:
        """Says which patch tokens of a batch of images are present, and checks the images on the way.

        Args:
            pixel_values: (batch, channels, height, width), normalised, or raw as uint8 where `config.image_mean` says
                how to normalise; height and width multiples of the patch size.
            patch_mask: (batch, rows, columns) bool, True where a patch token is present; all are by default.
            image_sizes: (height, width) in pixels of each image, where smaller ones share a larger canvas.

        Raises:
            ValueError: pixels, mask or sizes that do not fit, or pixels that are not finite.
        """
        return self.base_model.embeddings.token_grid(pixel_values, patch_mask, image_sizes)

    @together
    def token_grid_of_image(self, present: torch.Tensor) -> TokenGrid:
        """The grid of one image whose pixels come later, strip by strip.

        Args:
            present: (rows, columns) bool, True where a patch token is present.

        Raises:
            ValueError: a mask of another shape or type, or without a present token.
        """
        if present.ndim != 2:
            raise ValueError(f"present has shape {tuple(present.shape)}: it takes (rows, columns) of one image.")
        return token_grid_of_sizes(self.config, [tuple(present.shape)], present[None].to(self.device))

    def encode(
        self,
        pixel_values: torch.Tensor | Iterable[torch.Tensor],
        grid: TokenGrid,
        *,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        after_layer: AfterLayer | None = None,
        may_prune: bool = True,
        on_tokens: OnTokens | None = None,
    ) -> EncoderOutput:
        """Embeds the present patch tokens and runs all layers on them.

        Args:
            pixel_values: (batch, channels, height, width) of images, or one image as (1, channels, height, width)
                strips from the top down, each a whole number of patches high and as wide as the grid. Strips are taken
                one after the other: the pixels of the image are never in memory at once.
            grid: what `token_grid` or `token_grid_of_image` returned.
            output_hidden_states: whether to keep the tokens after each layer.
            output_attentions: whether to keep the attention probabilities ("eager" only).
            after_layer: called before the first layer and after each with the number of layers run so far and the
                tokens; returns the tokens the next layer takes.
            may_prune: `False` keeps all tokens, whatever the config says.
            on_tokens: called as the forward proceeds, with the number of patch tokens that the embeddings or a layer
                have just finished, so that a long forward can show where it is and be interrupted. With N patch tokens
                and L layers the numbers add up to (1 + L) N, or (1 + n) N + (L - n) K where layer n prunes to K.

        Returns:
            The tokens in the grid's order, before the final norm. What pruning removed is kept beside them where
            `config.unprune` or `output_hidden_states` asks for it.

        Raises:
            ValueError: pixels that do not fit the grid, or attention probabilities that are not available.
        """
        if not torch.compiler.is_compiling():
            for warning in failure_signatures(self.config):
                logger.warning_once(warning)
        if output_attentions and self.config._attn_implementation != "eager":
            raise ValueError(
                f"output_attentions=True needs the materialised attention: attn_implementation is "
                f'{self.config._attn_implementation!r}, call model.set_attn_implementation("eager").'
            )
        embeddings, encoder = self.base_model.embeddings, self.base_model.encoder
        settings = (output_hidden_states, output_attentions, after_layer, may_prune, on_tokens)
        if self.base_model.process_split is not None:
            return self.base_model.process_split.encode(encoder, pixel_values, grid, *settings)
        embed = embeddings if isinstance(pixel_values, torch.Tensor) else embeddings.embed_strips
        return encoder(lambda: EncodedTokens(embed(pixel_values, grid, on_tokens), grid), *settings)

    def feature_map(self, encoded: EncoderOutput, layer: int) -> torch.Tensor:
        """The tokens after a layer as a map, of a model with a final norm.

        Removed tokens are filled in with the features they were removed with.

        Args:
            encoded: what `encode` returned with `output_hidden_states=True`.
            layer: how many layers they went through; 0 for the embeddings.

        Returns:
            (batch, hidden_size, rows, columns) on the grid all images fit in, after the final norm unless
            `config.apply_layernorm` is off; zero at places that were never present.

        Raises:
            ValueError: a layer there are no tokens of.
        """
        if not 0 <= layer < len(encoded.states):
            raise ValueError(
                f"layer={layer} is not among the {len(encoded.states)} states that were kept: encode with "
                f"output_hidden_states=True and choose from 0 to {self.config.num_hidden_layers}."
            )
        tokens = encoded.states[layer]
        return (tokens.apply(self.base_model.norm) if self.config.apply_layernorm else tokens).to_map()

    def _output_switches(self, output_hidden_states: bool | None, output_attentions: bool | None) -> tuple[bool, bool]:
        """The caller's choice, or the config's."""
        return (
            self.config.output_hidden_states if output_hidden_states is None else bool(output_hidden_states),
            self.config.output_attentions if output_attentions is None else bool(output_attentions),
        )
