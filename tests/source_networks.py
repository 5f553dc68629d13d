# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Every known model's network in timm or Transformers, as its authors build it; at true or at small size."""

import torch
from timm.layers import SwiGLUPacked
from timm.models import create_model
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

GATED = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
VIRCHOW = {"init_values": 1e-5, "mlp_ratio": 5.3375, **GATED}

# Name -> timm entry point and arguments, as the model cards state them.
TIMM_MODELS = {
    "uni": ("vit_large_patch16_224", {"init_values": 1e-5}),
    "uni2-h": (
        "vit_giant_patch14_224",
        {
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "reg_tokens": 8,
            **GATED,
        },
    ),
    "virchow": ("vit_huge_patch14_224", VIRCHOW),
    "virchow2": ("vit_huge_patch14_224", {**VIRCHOW, "reg_tokens": 4}),
    "h-optimus-0": ("vit_giant_patch14_reg4_dinov2", {"init_values": 1e-5}),
    "h-optimus-1": ("vit_giant_patch14_reg4_dinov2", {"init_values": 1e-5}),
    "h0-mini": ("vit_base_patch14_reg4_dinov2", {"mlp_ratio": 5.33334, **GATED}),
    "prov-gigapath": ("vit_giant_patch14_dinov2", {"patch_size": 16, "mlp_ratio": 5.33334}),
    "kaiko-s16": ("vit_small_patch16_224", {}),
    "kaiko-s8": ("vit_small_patch8_224", {}),
    "kaiko-b16": ("vit_base_patch16_224", {}),
    "kaiko-b8": ("vit_base_patch8_224", {}),
    "kaiko-l14": ("vit_large_patch14_reg4_dinov2", {"img_size": 518}),
}

# Name -> timm model that DINOv2's own naming is read into, and its arguments.
DINOV2_MODELS = {
    "gpfm": ("vit_large_patch14_dinov2", {}),
    "openmidnight": ("vit_giant_patch14_reg4_dinov2", {}),
}

# Name -> class and configuration of Transformers.
TRANSFORMERS_MODELS = {
    "phikon": (ViTModel, ViTConfig, {}),
    "phikon-v2": (
        Dinov2Model,
        Dinov2Config,
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 224, "patch_size": 16},
    ),
    "hibou-b": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {"patch_size": 14, "use_swiglu_ffn": True}),
    "hibou-l": (
        Dinov2WithRegistersModel,
        Dinov2WithRegistersConfig,
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "use_swiglu_ffn": True,
        },
    ),
    "midnight-12k": (
        Dinov2Model,
        Dinov2Config,
        {
            "hidden_size": 1536,
            "num_hidden_layers": 40,
            "num_attention_heads": 24,
            "image_size": 518,
            "patch_size": 14,
            "use_swiglu_ffn": True,
        },
    ),
}

SMALL_TIMM = {"embed_dim": 96, "depth": 3, "num_heads": 4}
SMALL_TRANSFORMERS = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}


def timm_network(name, device="cpu", **arguments):
    """The timm network of a known model; `arguments` make it smaller."""
    entry_point, published = {**TIMM_MODELS, **DINOV2_MODELS}[name]
    defaults = {"img_size": 224, "num_classes": 0, "global_pool": "", "dynamic_img_size": True}
    with torch.device(device):
        return create_model(entry_point, pretrained=False, **{**defaults, **published, **arguments}).eval()


def transformers_network(name, device="cpu", **fields):
    """The Transformers network of a known model; `fields` make it smaller."""
    model_class, config_class, published = TRANSFORMERS_MODELS[name]
    if model_class is ViTModel and "hidden_size" in fields:
        fields = {"intermediate_size": 4 * fields["hidden_size"], **fields}
    pooling = {"add_pooling_layer": False} if model_class is ViTModel else {}
    with torch.device(device):
        return model_class(config_class(**{"image_size": 224, **published, **fields}), **pooling).eval()


@torch.no_grad()
def randomize(network, seed=0, std=0.15):
    """Large random weights, LayerNorm and LayerScale near 1: a wrong scale or a lost term cannot hide."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        noise = torch.empty_like(parameter).normal_(generator=generator)
        is_scale = name.endswith(("gamma", "lambda1")) or ("norm" in name and name.endswith("weight"))
        parameter.copy_(1 + 0.2 * noise if is_scale else std * noise)
    return network


def dinov2_state(network, chunk=2, seed=1):
    """The weights of a timm DINOv2 network in the naming of DINOv2's own training code, nested as it saves them.

    Where there are registers, CLS gets a position embedding of its own, which timm adds to the token. Changes the
    network to compute the same.
    """
    state = {}
    for name, tensor in network.state_dict().items():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            if hasattr(network.blocks[0].mlp, "gate_last"):
                rest = rest.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
            name = f"blocks.{int(index) // chunk}.{index}.{rest}"
        state[name.replace("reg_token", "register_tokens")] = tensor.clone()
    if "register_tokens" in state:
        position = 0.15 * torch.randn(1, 1, network.embed_dim, generator=torch.Generator().manual_seed(seed))
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
        with torch.no_grad():
            network.cls_token += position
    state["mask_token"] = torch.randn(1, network.embed_dim)
    nested = {f"backbone.{name}": tensor for name, tensor in state.items()}
    return {"teacher": {**nested, "dino_head.mlp.0.weight": torch.randn(3, 3)}, "iteration": 12}
