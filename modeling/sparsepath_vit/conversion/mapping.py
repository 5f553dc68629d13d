# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Which tensor of a checkpoint becomes which parameter, and what the shapes say about the model."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..model.configuration_sparsepath_vit import SparsePathViTConfig
from ..model.modeling_sparsepath_vit import SparsePathViTModel


@dataclass(frozen=True)
class Rule:
    """Tensors whose whole name matches `pattern` become `target`.

    Args:
        pattern: regular expression for the whole name.
        target: parameter name; `{0}`, `{1}`, ... are the pattern's groups.
        part: position of the tensor among those stacked into the target.
        parts: how many tensors are stacked (along the output rows); 1 is a plain renaming.
    """

    pattern: str
    target: str
    part: int = 0
    parts: int = 1


_WB = r"(weight|bias)"
_BLOCK = r"blocks\.(?:\d+\.)?(\d+)"  # DINOv2 training code chunks its blocks: blocks.{chunk}.{index over all blocks}
_LAYER = r"(?:encoder\.layer|encoder\.layers|layers)\.(\d+)"  # Transformers' names of all versions
_OUR_LAYER = "encoder.layers.{0}"

# timm, and DINOv2's own code where its names differ (register_tokens, w12, w3).
TIMM_RULES = (
    Rule(r"cls_token", "embeddings.cls_token"),
    Rule(r"(?:reg_token|register_tokens)", "embeddings.register_tokens"),
    Rule(r"pos_embed", "embeddings.position_embeddings"),
    Rule(rf"patch_embed\.proj\.{_WB}", "embeddings.patch_embeddings.projection.{0}"),
    Rule(rf"{_BLOCK}\.norm([12])\.{_WB}", _OUR_LAYER + ".norm{1}.{2}"),
    Rule(rf"{_BLOCK}\.attn\.qkv\.{_WB}", _OUR_LAYER + ".attention.qkv.{1}"),
    Rule(rf"{_BLOCK}\.attn\.proj\.{_WB}", _OUR_LAYER + ".attention.projection.{1}"),
    Rule(rf"{_BLOCK}\.ls([12])\.gamma", _OUR_LAYER + ".layer_scale{1}.lambda1"),
    Rule(rf"{_BLOCK}\.mlp\.(?:fc1|w12)\.{_WB}", _OUR_LAYER + ".mlp.fc1.{1}"),
    Rule(rf"{_BLOCK}\.mlp\.(?:w1|fc1_g)\.{_WB}", _OUR_LAYER + ".mlp.fc1.{1}", part=0, parts=2),
    Rule(rf"{_BLOCK}\.mlp\.(?:w2|fc1_x)\.{_WB}", _OUR_LAYER + ".mlp.fc1.{1}", part=1, parts=2),
    Rule(rf"{_BLOCK}\.mlp\.(?:fc2|w3)\.{_WB}", _OUR_LAYER + ".mlp.fc2.{1}"),
    Rule(rf"norm\.{_WB}", "norm.{0}"),
)

_QKV = _OUR_LAYER + ".attention.qkv.{1}"
# ViT, Dinov2 and Dinov2WithRegisters: the names in published files and those of the newest Transformers.
TRANSFORMERS_RULES = (
    Rule(r"embeddings\.(cls_token|register_tokens|position_embeddings)", "embeddings.{0}"),
    Rule(rf"embeddings\.patch_embeddings\.projection\.{_WB}", "embeddings.patch_embeddings.projection.{0}"),
    Rule(rf"{_LAYER}\.(?:norm1|layernorm_before)\.{_WB}", _OUR_LAYER + ".norm1.{1}"),
    Rule(rf"{_LAYER}\.(?:norm2|layernorm_after)\.{_WB}", _OUR_LAYER + ".norm2.{1}"),
    Rule(rf"{_LAYER}\.attention\.(?:attention\.query|q_proj)\.{_WB}", _QKV, part=0, parts=3),
    Rule(rf"{_LAYER}\.attention\.(?:attention\.key|k_proj)\.{_WB}", _QKV, part=1, parts=3),
    Rule(rf"{_LAYER}\.attention\.(?:attention\.value|v_proj)\.{_WB}", _QKV, part=2, parts=3),
    Rule(rf"{_LAYER}\.attention\.(?:output\.dense|o_proj)\.{_WB}", _OUR_LAYER + ".attention.projection.{1}"),
    Rule(rf"{_LAYER}\.layer_scale([12])\.lambda1", _OUR_LAYER + ".layer_scale{1}.lambda1"),
    Rule(rf"{_LAYER}\.(?:mlp\.fc1|mlp\.weights_in|intermediate\.dense)\.{_WB}", _OUR_LAYER + ".mlp.fc1.{1}"),
    Rule(rf"{_LAYER}\.mlp\.gate_proj\.{_WB}", _OUR_LAYER + ".mlp.fc1.{1}", part=0, parts=2),
    Rule(rf"{_LAYER}\.mlp\.up_proj\.{_WB}", _OUR_LAYER + ".mlp.fc1.{1}", part=1, parts=2),
    Rule(rf"{_LAYER}\.(?:mlp\.fc2|mlp\.weights_out|mlp\.down_proj|output\.dense)\.{_WB}", _OUR_LAYER + ".mlp.fc2.{1}"),
    Rule(rf"layernorm\.{_WB}", "norm.{0}"),
)

# The tensor that tells the naming style, and where the network begins below any prefix.
_ANCHORS = {
    "timm": (re.compile(r"(.*?)patch_embed\.proj\.weight"), TIMM_RULES),
    "transformers": (re.compile(r"(.*?)embeddings\.patch_embeddings\.projection\.weight"), TRANSFORMERS_RULES),
}
_PREFIX = re.compile(r"(?:(?:module|model|_orig_mod|backbone|teacher|student|vit|dinov2|dinov2_with_registers)\.)*")

# Tensors that a checkpoint may hold and the backbone has no use for. Anything else without a home is an error.
IGNORABLE = (
    (r"(?:embeddings\.)?mask_token", "mask token of masked-image training"),
    (r"(?:head|classifier)\..*", "classification head"),
    (r"pooler\..*", "Transformers' ViT pooler (a dense layer on CLS)"),
    (r"(?:dino_head|ibot_head|dino_loss|ibot_patch_loss|decoder)\..*", "head or loss of self-supervised training"),
)

# Fields that the tensors decide; an override or a known model must agree with them.
STRUCTURAL_FIELDS = (
    "patch_size",
    "num_channels",
    "hidden_size",
    "num_hidden_layers",
    "mlp_type",
    "intermediate_size",
    "qkv_bias",
    "use_layerscale",
    "num_register_tokens",
    "num_prefix_position_embeddings",
    "image_size",
)


@dataclass(frozen=True)
class MappingPlan:
    """What becomes of every tensor of a checkpoint.

    Args:
        style: `"timm"` (also DINOv2's own names) or `"transformers"`.
        prefix: what stood before every name of the network.
        sources: parameter name -> the tensors stacked into it, in order.
        shapes: parameter name -> its shape after stacking.
        ignored: tensor name -> why it is not used.
    """

    style: str
    prefix: str
    sources: dict[str, tuple[str, ...]]
    shapes: dict[str, tuple[int, ...]]
    ignored: dict[str, str]


def plan_mapping(shapes: Mapping[str, tuple[int, ...]]) -> MappingPlan:
    """Assigns every tensor of a checkpoint to a parameter, or to the table of ignorable ones.

    Args:
        shapes: tensor name -> shape.

    Raises:
        ValueError: the naming style is unknown, a tensor has no home, two tensors want the same one, or a stacked
            parameter lacks a part. The message lists the names.
    """
    style, prefix, rules = _find_style(shapes)
    parts: dict[str, dict[int, str]] = defaultdict(dict)
    expected_parts: dict[str, int] = {}
    ignored: dict[str, str] = {}
    homeless: list[str] = []
    clashes: list[str] = []
    for name in shapes:
        rule, target = _match(name.removeprefix(prefix), rules) if name.startswith(prefix) else (None, "")
        if rule is None:
            reason = _ignorable(name, prefix)
            if reason is None:
                homeless.append(name)
            else:
                ignored[name] = reason
        elif rule.part in parts[target] or expected_parts.setdefault(target, rule.parts) != rule.parts:
            clashes.append(f"{name} and {next(iter(parts[target].values()))} (both {target})")
        else:
            parts[target][rule.part] = name
    incomplete = [target for target, found in parts.items() if len(found) != expected_parts[target]]
    unequal = [target for target, found in parts.items() if len({shapes[name] for name in found.values()}) > 1]
    _raise_if_any(
        {
            "tensors without a home in a plain vision transformer": homeless,
            "tensors that want the same home": clashes,
            "parameters that lack a part": [f"{t} (only {', '.join(parts[t].values())})" for t in incomplete],
            "parameters whose parts differ in shape": [f"{t} ({', '.join(parts[t].values())})" for t in unequal],
        }
    )
    sources = {target: tuple(found[part] for part in sorted(found)) for target, found in parts.items()}
    stacked = {target: _stacked_shape(shapes[names[0]], len(names)) for target, names in sources.items()}
    return MappingPlan(style, prefix, sources, stacked, ignored)


def _find_style(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, str, tuple[Rule, ...]]:
    foreign = []
    for style, (anchor, rules) in _ANCHORS.items():
        prefixes = [match.group(1) for name in shapes if (match := anchor.fullmatch(name))]
        teachers = [prefix for prefix in prefixes if "teacher." in prefix]
        candidates = [prefix for prefix in teachers or prefixes if _PREFIX.fullmatch(prefix)]
        if len(candidates) > 1:
            raise ValueError(
                f"The checkpoint holds several networks, at {', '.join(map(repr, candidates))}: keep one and save it."
            )
        if candidates:
            return style, candidates[0], rules
        foreign += prefixes
    if foreign:
        raise ValueError(
            f"The checkpoint holds a vision transformer under {', '.join(map(repr, foreign))}, as a part of another "
            "network: save the tensors of one without this prefix, and convert that file."
        )
    raise ValueError(
        "The checkpoint is no vision transformer in a known naming: looked for patch_embed.proj.weight (timm, DINOv2) "
        "and embeddings.patch_embeddings.projection.weight (Transformers ViT, Dinov2, Dinov2WithRegisters). Its "
        f"tensors are {_listed(shapes)}."
    )


def _match(name: str, rules: tuple[Rule, ...]) -> tuple[Rule | None, str]:
    for rule in rules:
        if match := re.fullmatch(rule.pattern, name):
            return rule, rule.target.format(*match.groups())
    return None, ""


def _ignorable(name: str, prefix: str) -> str | None:
    if "teacher." in prefix and "student." in name:
        return "the student beside the teacher"
    bare = name[_PREFIX.match(name).end() :]
    return next((reason for pattern, reason in IGNORABLE if re.fullmatch(pattern, bare)), None)


def _stacked_shape(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    return shape if parts == 1 else (parts * shape[0], *shape[1:])


def infer_structure(plan: MappingPlan, num_prefix_position_embeddings: int | None = None) -> dict[str, Any]:
    """The fields of `SparsePathViTConfig` that the shapes decide (`STRUCTURAL_FIELDS`).

    Args:
        plan: the mapping of the checkpoint.
        num_prefix_position_embeddings: how many global tokens carry a position embedding, where the caller knows; only
            needed where the number of positions allows two readings (grids of at most 5 x 5).

    Raises:
        ValueError: a tensor that decides a field is missing or its shape is not possible.
    """
    needed = (
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.position_embeddings",
        "encoder.layers.0.mlp.fc1.weight",
        "encoder.layers.0.mlp.fc2.weight",
    )
    _raise_if_any({"missing parameters": [name for name in needed if name not in plan.shapes]})
    patch, positions, fc1, fc2 = (plan.shapes[name] for name in needed)
    ranks = {name: len(plan.shapes[name]) for name in needed}
    if tuple(ranks.values()) != (4, 3, 2, 2) or patch[2] != patch[3]:
        raise ValueError(
            "The shapes are not those of a vision transformer with square patches: "
            + ", ".join(f"{name} {plan.shapes[name]}" for name in needed)
        )
    registers = plan.shapes.get("embeddings.register_tokens", (1, 0))[1]
    prefix, grid = _split_positions(positions[1], registers, num_prefix_position_embeddings)
    layers = {int(match.group(1)) for name in plan.shapes if (match := re.match(r"encoder\.layers\.(\d+)\.", name))}
    return {
        "patch_size": patch[2],
        "num_channels": patch[1],
        "hidden_size": patch[0],
        "num_hidden_layers": max(layers) + 1,
        "mlp_type": _mlp_type(fc1, fc2),
        "intermediate_size": fc2[1],
        "qkv_bias": "encoder.layers.0.attention.qkv.bias" in plan.shapes,
        "use_layerscale": "encoder.layers.0.layer_scale1.lambda1" in plan.shapes,
        "num_register_tokens": registers,
        "num_prefix_position_embeddings": prefix,
        "image_size": grid * patch[2],
    }


def _mlp_type(fc1: tuple[int, ...], fc2: tuple[int, ...]) -> str:
    if fc1[0] == fc2[1]:
        return "gelu"
    if fc1[0] == 2 * fc2[1]:
        return "swiglu"
    raise ValueError(
        f"The MLP of layer 0 is neither plain nor gated: fc1 has {fc1[0]} rows, fc2 {fc2[1]} columns; "
        "wanted the same number, or twice as many rows."
    )


def _split_positions(count: int, registers: int, known_prefix: int | None) -> tuple[int, int]:
    """How many of the position embeddings belong to global tokens, and the side of the patch grid."""
    candidates = sorted({0, 1, 1 + registers}) if known_prefix is None else [known_prefix]
    readings = [
        (prefix, math.isqrt(count - prefix))
        for prefix in candidates
        if count > prefix and math.isqrt(count - prefix) ** 2 == count - prefix
    ]
    if not readings:
        raise ValueError(
            f"{count} position embeddings are not a square grid plus {' or '.join(map(str, candidates))} global "
            f"tokens (the checkpoint has {registers} registers). Only square grids can be converted."
        )
    if len(readings) > 1:
        raise ValueError(
            f"{count} position embeddings can be read in several ways: "
            + ", ".join(f"{prefix} global tokens and a {grid} x {grid} grid" for prefix, grid in readings)
            + ". Pass num_prefix_position_embeddings."
        )
    return readings[0]


def check_parameters(plan: MappingPlan, config: SparsePathViTConfig) -> None:
    """Checks that the plan sets every parameter of the model, each with its shape, and no other.

    Args:
        plan: the mapping of the checkpoint.
        config: the model's configuration.

    Raises:
        ValueError: parameters are missing, too many or misshapen; the message lists them.
    """
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in SparsePathViTModel(config).state_dict().items()}
    misshapen = [
        f"{name} (from {', '.join(plan.sources[name])}): {plan.shapes[name]}, wanted {wanted[name]}"
        for name in wanted.keys() & plan.shapes.keys()
        if plan.shapes[name] != wanted[name]
    ]
    extra = [f"{name} (from {', '.join(plan.sources[name])})" for name in plan.shapes.keys() - wanted.keys()]
    _raise_if_any(
        {
            "parameters that no tensor sets": sorted(wanted.keys() - plan.shapes.keys()),
            "tensors for parameters that the model lacks": sorted(extra),
            "tensors of the wrong shape": sorted(misshapen),
        }
    )


def _raise_if_any(problems: dict[str, list[str]]) -> None:
    found = [f"{len(names)} {what}: {_listed(names)}" for what, names in problems.items() if names]
    if found:
        raise ValueError(
            "The checkpoint does not fit: " + "; ".join(found) + ". Convert the file as its authors publish it; "
            "a partial, adapted or different network cannot be converted."
        )


def _listed(names: Iterable[str], limit: int = 20) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
