# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The same dense network in timm and in Transformers, to compare with."""

from functools import partial

import torch
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from ..model.configuration_sparsepath_vit import SparsePathViTConfig


def timm_network(config: SparsePathViTConfig) -> nn.Module:
    """timm's `VisionTransformer` of this shape, for images of any size, on the meta device.

    Args:
        config: the shape; block-local attention and pruning have no counterpart.

    Returns:
        `nn.Module`: without a head, all tokens out; `to_empty` or `load_state_dict(..., assign=True)` gives it weights.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        from timm.layers import LayerNorm, SwiGLUPacked
        from timm.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise ImportError("Comparing with timm needs it: pip install timm.") from error
    gated = config.mlp_type == "swiglu"
    # timm takes the width of the MLP as a ratio that it truncates; half a row keeps rounding from losing one.
    rows = config.intermediate_size * (2 if gated else 1)
    network = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.num_channels,
        num_classes=0,
        global_pool="",
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=(rows + 0.5) / config.hidden_size,
        qkv_bias=config.qkv_bias,
        init_values=1.0 if config.use_layerscale else None,
        no_embed_class=config.num_prefix_position_embeddings == 0 or has_dinov2_positions(config),
        reg_tokens=config.num_register_tokens,
        dynamic_img_size=True,
        weight_init="skip",
        norm_layer=partial(LayerNorm, eps=config.layer_norm_eps),
        act_layer=nn.SiLU if gated else nn.GELU,
        device=torch.device("meta"),
        **({"mlp_layer": SwiGLUPacked} if gated else {}),
    )
    return network.eval()


def has_dinov2_positions(config: SparsePathViTConfig) -> bool:
    """Whether CLS carries a position embedding and the registers none, which timm cannot keep apart from the token."""
    return config.num_register_tokens > 0 and config.num_prefix_position_embeddings == 1


def transformers_form(config: SparsePathViTConfig, is_vit: bool) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class and configuration of the same network in Transformers.

    Args:
        config: the shape.
        is_vit: Transformers' ViT; otherwise Dinov2, or Dinov2WithRegisters where there are registers.

    Returns:
        `tuple`: the class, and the configuration to build it from.

    Raises:
        ValueError: Transformers has no MLP of this width.
    """
    fields = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "layer_norm_eps": config.layer_norm_eps,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": config.num_channels,
        "qkv_bias": config.qkv_bias,
        "hidden_act": "gelu",
    }
    if is_vit:
        return ViTModel, ViTConfig(intermediate_size=config.intermediate_size, **fields)
    # Dinov2 states the MLP by a whole ratio; its SwiGLU takes two thirds of that, rounded up to a multiple of 8.
    ratios = {
        "gelu": {ratio * config.hidden_size: ratio for ratio in range(1, 17)},
        "swiglu": {(int(ratio * config.hidden_size * 2 / 3) + 7) // 8 * 8: ratio for ratio in range(1, 17)},
    }
    ratio = ratios[config.mlp_type].get(config.intermediate_size)
    if ratio is None:
        raise ValueError(
            f"Transformers' Dinov2 has no {config.mlp_type} MLP of width {config.intermediate_size} at hidden size "
            f"{config.hidden_size}, so there is nothing to compare with."
        )
    fields |= {"mlp_ratio": ratio, "use_swiglu_ffn": config.mlp_type == "swiglu"}
    if config.num_register_tokens:
        registers = {"num_register_tokens": config.num_register_tokens}
        return Dinov2WithRegistersModel, Dinov2WithRegistersConfig(**fields, **registers)
    return Dinov2Model, Dinov2Config(**fields)
