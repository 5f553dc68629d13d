# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a source says of itself that its tensors' shapes do not: by its config.json, and by its naming."""

from typing import Any

import torch

from .architectures import Architecture
from .mapping import MappingPlan
from .sources import CheckpointSource

# The published default of each naming, used where no config.json says otherwise.
TIMM_LAYER_NORM_EPS = 1e-6
DINOV2_LAYER_NORM_EPS = 1e-6
TRANSFORMERS_VIT_LAYER_NORM_EPS = 1e-12
DINOV2_INTERPOLATION_OFFSET = 0.1

# What a config.json says that the tensors say too: its name -> ours.
_TIMM_STRUCTURE = {"embed_dim": "hidden_size", "depth": "num_hidden_layers", "patch_size": "patch_size"}
_TRANSFORMERS_STRUCTURE = {name: name for name in _TIMM_STRUCTURE.values()}

Normalisation = tuple[tuple[float, ...] | None, tuple[float, ...] | None]


def read_source_config(opened: CheckpointSource, plan: MappingPlan, structure: dict[str, Any]) -> dict[str, Any]:
    """Head count, LayerNorm epsilon and pooling of a model that the table does not know.

    Args:
        opened: the checkpoint with its config.json, timm style (`model_args`) or Transformers style.
        plan: the mapping of its tensors.
        structure: the fields read from the shapes.

    Returns:
        `dict[str, Any]`: fields of `SparsePathViTConfig`; without `num_attention_heads` where nothing says it.

    Raises:
        ValueError: the activation is not the exact GELU, or SiLU in a gated MLP.
    """
    if plan.style == "timm":
        return _read_timm_config(opened.config, structure)
    config = opened.config
    # Transformers' Dinov2 configs keep hidden_act="gelu" beside a SwiGLU MLP, which does not use it.
    if structure["mlp_type"] == "gelu":
        _check_activation(config.get("hidden_act"), "gelu")
    default_eps = DINOV2_LAYER_NORM_EPS if structure["use_layerscale"] else TRANSFORMERS_VIT_LAYER_NORM_EPS
    values = {"layer_norm_eps": float(config.get("layer_norm_eps", default_eps))}
    if "num_attention_heads" in config:
        values["num_attention_heads"] = config["num_attention_heads"]
    return values


def read_source_structure(opened: CheckpointSource, plan: MappingPlan) -> dict[str, Any]:
    """Width, depth and patch size by the source's config.json, as far as it states them, to compare with the tensors.

    Args:
        opened: the checkpoint with its config.json.
        plan: the mapping of its tensors.

    Returns:
        `dict[str, Any]`: fields of `SparsePathViTConfig`.
    """
    is_timm = plan.style == "timm"
    stated = (opened.config.get("model_args") or {}) if is_timm else opened.config
    names = _TIMM_STRUCTURE if is_timm else _TRANSFORMERS_STRUCTURE
    return {ours: stated[theirs] for theirs, ours in names.items() if isinstance(stated.get(theirs), int)}


def _read_timm_config(config: dict[str, Any], structure: dict[str, Any]) -> dict[str, Any]:
    arguments = config.get("model_args") or {}
    _check_activation(arguments.get("act_layer"), structure["mlp_type"])
    values: dict[str, Any] = {"layer_norm_eps": TIMM_LAYER_NORM_EPS}
    heads = arguments.get("num_heads") or _heads_of_timm_model(config.get("architecture"))
    if heads is not None:
        values["num_attention_heads"] = heads
    return values


def _heads_of_timm_model(name: str | None) -> int | None:
    """Heads of a model of timm's registry, where timm is installed and knows it; nothing is allocated."""
    try:
        import timm
    except ImportError:
        return None
    if name is None or not timm.is_model(name):
        return None
    with torch.device("meta"):
        blocks = getattr(timm.create_model(name, pretrained=False), "blocks", None)
    return None if blocks is None else blocks[0].attn.num_heads


def _check_activation(name: str | None, mlp_type: str) -> None:
    if name is not None and name.lower() != ("gelu" if mlp_type == "gelu" else "silu"):
        raise ValueError(
            f"The source's activation {name!r} is not supported in a {mlp_type} MLP: SparsePathViT computes the exact "
            "GELU, or SiLU in a gated MLP, and would give other numbers."
        )


def read_source_normalisation(opened: CheckpointSource) -> Normalisation:
    """Channel means and standard deviations, from preprocessor_config.json or timm's `pretrained_cfg`.

    Args:
        opened: the checkpoint with its JSON files.

    Returns:
        `tuple`: (mean, std); `None` for what is not stated.

    Raises:
        ValueError: one of them is no list.
    """
    timm_fields = opened.config.get("pretrained_cfg") or {}
    mean = opened.preprocessor.get("image_mean") or timm_fields.get("mean")
    std = opened.preprocessor.get("image_std") or timm_fields.get("std")
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and not isinstance(value, list):
            raise ValueError(
                f"The {name} beside the weights of {opened.label} is {value!r}: wanted a list with one number per "
                "channel. Repair it, or remove it and pass image_mean and image_std."
            )
    return (None if mean is None else tuple(mean), None if std is None else tuple(std))


def read_resampling(plan: MappingPlan, known: Architecture | None) -> dict[str, Any]:
    """How the source's own code resamples position embeddings at other image sizes; all of them do so bicubically.

    timm antialiases. Transformers' ViT and Dinov2 do not, its Dinov2WithRegisters does. DINOv2's own code (and GPFM's)
    antialiases for models with registers; for those without it does not, and takes the samples as if there were 0.1
    more of them (its `interpolate_antialias` and `interpolate_offset`).

    Args:
        plan: the mapping of the checkpoint.
        known: the known model, if it is one. Otherwise DINOv2's own files are told from timm's by their mask token.

    Returns:
        `dict[str, Any]`: `position_antialias` and `position_interpolation_offset` of `SparsePathViTConfig`.
    """
    has_registers = "embeddings.register_tokens" in plan.sources
    if plan.style == "transformers":
        return {"position_antialias": has_registers, "position_interpolation_offset": 0.0}
    has_mask_token = any(name.endswith("mask_token") for name in plan.ignored)
    is_dinov2 = has_mask_token if known is None else known.source_style == "dinov2"
    is_dinov2_without_registers = is_dinov2 and not has_registers
    return {
        "position_antialias": not is_dinov2_without_registers,
        "position_interpolation_offset": DINOV2_INTERPOLATION_OFFSET if is_dinov2_without_registers else 0.0,
    }
