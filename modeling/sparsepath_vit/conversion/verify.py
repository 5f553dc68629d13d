# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Runs the source model in timm or Transformers beside the converted one and compares their outputs."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..model.configuration_sparsepath_vit import SparsePathViTConfig
from ..model.modeling_sparsepath_vit import SparsePathViTModel
from .architectures import architecture as find_architecture
from .mapping import MappingPlan, plan_mapping
from .peers import has_dinov2_positions, timm_network, transformers_form
from .sources import CheckpointSource, open_source

# Grids of patch tokens that are compared besides the native one: at patch 14 these are 224, 448 and 196 x 350 px.
DEFAULT_GRIDS = ((16, 16), (32, 32), (14, 25))

Peer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Parity:
    """How far the converted model is from its source on one image size.

    Args:
        height: of the image in pixels.
        width: likewise.
        peer: `"timm"` or `"transformers"`.
        pattern: `"dense"`, or `"w = N"` for block-local attention with blocks of N x N tokens.
        max_abs_error: largest absolute difference over all tokens of `last_hidden_state`, in float32.
        scale: root mean square of the source's output.
        note: why they differ, where they must; empty otherwise.
    """

    height: int
    width: int
    peer: str
    pattern: str
    max_abs_error: float
    scale: float
    note: str = ""

    @property
    def relative_error(self) -> float:
        """`max_abs_error` over `scale`."""
        return self.max_abs_error / self.scale

    def __str__(self) -> str:
        text = f"{self.height} x {self.width} px, {self.pattern}: {self.relative_error:.1e} of the output's scale"
        return f"{text} ({self.max_abs_error:.1e} absolute, against {self.peer}){'; ' + self.note if self.note else ''}"


@torch.inference_mode()
def verify_conversion(
    source: str | Path,
    converted: str | Path,
    *,
    architecture: str | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
) -> list[Parity]:
    """Compares a converted model with its source on random images, in float32 on the CPU.

    Dense attention and no pruning at every size; where the blocks' neighbourhoods cover a size's whole grid also the
    attention pattern that was converted, which then must give the same numbers. Where the peer resamples position
    embeddings otherwise than the source's own code, results at other sizes than the native one carry a note, and the
    difference says how much that matters.

    Args:
        source: what was converted, as for `convert_checkpoint`.
        converted: the folder that was written.
        architecture: as for `convert_checkpoint`; only needed where it says which file of a folder was converted.
        sizes: (height, width) in pixels, multiples of the patch size; by default the native size and about 224, 448
            and 196 x 350 px.

    Returns:
        `list[Parity]`: one per size and attention pattern.

    Raises:
        ValueError: there is no peer for this form, or a size is no multiple of the patch size.
        ImportError: the source is timm style and timm is not installed.
    """
    opened = open_source(source, None if architecture is None else find_architecture(architecture))
    plan = plan_mapping(opened.shapes)
    model = SparsePathViTModel.from_pretrained(converted, dtype=torch.float32).eval()
    config = model.config
    sizes = sizes or _default_sizes(config)
    _check_sizes(sizes, config.patch_size)
    peer = _timm_peer(opened, plan, config) if plan.style == "timm" else _transformers_peer(opened, plan, config)
    note = _resampling_note(plan, config)
    converted_window = config.window_size
    config.prune_ratio = 0.0
    results = []
    generator = torch.Generator().manual_seed(0)
    for height, width in tqdm(sizes, desc="verifying", unit="size", leave=False):
        pixel_values = torch.randn(1, config.num_channels, height, width, generator=generator)
        wanted = peer(pixel_values)
        has_pattern = converted_window is not None and _covers(height, width, converted_window, config)
        for window_size in (None, converted_window) if has_pattern else (None,):
            config.window_size = window_size
            results.append(_compare(model, pixel_values, wanted, plan.style, note))
    return results


def _compare(
    model: SparsePathViTModel, pixel_values: torch.Tensor, wanted: torch.Tensor, peer: str, note: str
) -> Parity:
    """How far the model's output is from the peer's; `note` holds at other sizes than the native one."""
    height, width = pixel_values.shape[-2:]
    window_size = model.config.window_size
    found = model(pixel_values).last_hidden_state
    return Parity(
        height=height,
        width=width,
        peer=peer,
        pattern="dense" if window_size is None else f"w = {window_size}",
        max_abs_error=(found - wanted).abs().max().item(),
        scale=wanted.square().mean().sqrt().item(),
        note="" if height == width == model.config.image_size else note,
    )


def _default_sizes(config: SparsePathViTConfig) -> list[tuple[int, int]]:
    native = config.image_size // config.patch_size
    grids = dict.fromkeys(((native, native), *DEFAULT_GRIDS))
    return [(rows * config.patch_size, columns * config.patch_size) for rows, columns in grids]


def _check_sizes(sizes: Sequence[tuple[int, int]], patch_size: int) -> None:
    wrong = [f"{height} x {width}" for height, width in sizes if height % patch_size or width % patch_size]
    if wrong:
        raise ValueError(f"sizes: {', '.join(wrong)} px are no multiples of the patch size {patch_size}.")


def _covers(height: int, width: int, window_size: int, config: SparsePathViTConfig) -> bool:
    """Whether every block is a neighbour of every other, so that the pattern equals dense attention."""
    side = max(height, width) // config.patch_size
    return -(-side // window_size) <= config.neighbor_radius + 1


def _resampling_note(plan: MappingPlan, config: SparsePathViTConfig) -> str:
    """What to say of sizes at which the peer has other position embeddings; empty where it has the same."""
    # No peer has an offset. timm always antialiases; in Transformers Dinov2WithRegisters does, ViT and Dinov2 do not.
    peer_antialiases = plan.style == "timm" or config.num_register_tokens > 0
    differing = []
    if config.position_antialias != peer_antialiases:
        ours, theirs = ("with", "without") if config.position_antialias else ("without", "with")
        differing.append(f"{ours} antialiasing here, {theirs} in the peer")
    if config.position_interpolation_offset:
        differing.append(f"with an offset of {config.position_interpolation_offset:g} here, without in the peer")
    return f"position embeddings are resampled {' and '.join(differing)}" if differing else ""


def _state_of(opened: CheckpointSource, plan: MappingPlan) -> dict[str, torch.Tensor]:
    """The source's own tensors under their own names, without prefix and ignored ones, in float32."""
    used = [name for names in plan.sources.values() for name in names]
    return {name.removeprefix(plan.prefix): opened.tensors[name].float() for name in used}


def _timm_peer(opened: CheckpointSource, plan: MappingPlan, config: SparsePathViTConfig) -> Peer:
    """The source network in timm, loaded strictly by timm's own rules."""
    network = timm_network(config)
    state = _state_of(opened, plan)
    state = {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): tensor for name, tensor in state.items()}
    if has_dinov2_positions(config) or any(".mlp.w12." in name for name in state):
        from timm.models.vision_transformer import checkpoint_filter_fn

        # timm recognises DINOv2's own form by its mask token, and folds the position of CLS into the token.
        state = checkpoint_filter_fn({**state, "mask_token": torch.zeros(1)}, network)
    differing = sorted(network.state_dict().keys() ^ state.keys())
    if differing:
        raise ValueError(
            f"timm has no network of this form, so there is nothing to compare with: {len(differing)} tensors are "
            f"only in one of them, {', '.join(differing[:10])}."
        )
    network.load_state_dict(state, strict=True, assign=True)
    return network


def _transformers_peer(opened: CheckpointSource, plan: MappingPlan, config: SparsePathViTConfig) -> Peer:
    """The source network in Transformers, loaded by its own rules for names of older versions."""
    state = _state_of(opened, plan)
    is_vit = any(".layernorm_before." in name for name in state)
    model_class, peer_config = transformers_form(config, is_vit)
    arguments = {"add_pooling_layer": False} if is_vit else {}
    if not is_vit:  # a training parameter that published files may lack
        state["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)
    network, loading = model_class.from_pretrained(
        None, config=peer_config, state_dict=state, output_loading_info=True, dtype=torch.float32, **arguments
    )
    if loading["missing_keys"] or loading["unexpected_keys"] or loading["mismatched_keys"]:
        raise ValueError(
            f"{model_class.__name__} does not take this checkpoint, so there is nothing to compare with: missing "
            f"{sorted(loading['missing_keys'])}, unexpected {sorted(loading['unexpected_keys'])}, misshapen "
            f"{sorted(map(str, loading['mismatched_keys']))}."
        )
    network.eval()
    forward_arguments = {"interpolate_pos_encoding": True} if is_vit else {}
    return lambda pixel_values: network(pixel_values, **forward_arguments).last_hidden_state
