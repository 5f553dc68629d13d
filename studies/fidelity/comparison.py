# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""How near sparse comes to dense on the same weights: features, attention inside the pattern, predictions."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sparsepath_vit.model.configuration_sparsepath_vit import SparsePathViTConfig
from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTForImageClassification, SparsePathViTModel
from sparsepath_vit.model.token_grid import TokenGrid
from sparsepath_vit.runtime.memory import forward_bytes, free_bytes

from ..variants import configured

_LOGIT_BYTES = 128 * 2**20  # of the attention probabilities that exist at once while their mass is summed


class DenseDoesNotFit(ValueError):
    """Dense attention needs more memory than there is; the message says the size that would fit."""


@dataclass(frozen=True)
class Fidelity:
    """One sparse variant against the dense model, on one image.

    Attributes:
        size: (height, width) of the image in pixels.
        tokens: patch tokens that were present.
        kept_tokens: of these, left after pruning: the ones that are compared.
        window_size: of the variant; None where only pruning differs.
        prune_ratio: of the variant.
        prune_after_layer: of the variant.
        cls_cosine: cosine similarity of the CLS token after the final norm.
        patch_cosine: mean cosine similarity of the kept patch tokens.
        patch_cosine_p5: its 5th percentile over the tokens.
        attention_mass: per layer, share of the dense model's attention probability of the patch queries that are left
            there which falls on keys the variant's pattern has, mean over heads and queries.
        same_prediction: whether a classifier predicts the same class; None for a model without classes.
    """

    size: tuple[int, int]
    tokens: int
    kept_tokens: int
    window_size: int | None
    prune_ratio: float
    prune_after_layer: int
    cls_cosine: float
    patch_cosine: float
    patch_cosine_p5: float
    attention_mass: tuple[float, ...]
    same_prediction: bool | None

    def row(self) -> dict[str, Any]:
        """The values by column name, for a table; of the attention mass the mean and the smallest layer."""
        return {
            "height": self.size[0],
            "width": self.size[1],
            "tokens": self.tokens,
            "kept_tokens": self.kept_tokens,
            "window_size": self.window_size,
            "prune_ratio": self.prune_ratio,
            "prune_after_layer": self.prune_after_layer,
            "cls_cosine": self.cls_cosine,
            "patch_cosine": self.patch_cosine,
            "patch_cosine_p5": self.patch_cosine_p5,
            "attention_mass": float(np.mean(self.attention_mass)),
            "attention_mass_min": min(self.attention_mass),
            "same_prediction": self.same_prediction,
        }


@torch.inference_mode()
def compare_to_dense(
    model: SparsePathViTModel | SparsePathViTForImageClassification,
    inputs: Mapping[str, torch.Tensor],
    variants: Sequence[Mapping[str, Any]] = ({},),
    max_queries: int | None = 1024,
) -> list[Fidelity]:
    """Runs variants and the dense model on one image; dense runs once.

    Args:
        model: in evaluation mode. With a classifier, predictions are compared too.
        inputs: what the image processor returned for one image, on the model's device.
        variants: fields of the configuration that differ from the model's, for example `{"window_size": 16}`; the
            default is the model as it is.
        max_queries: patch queries, evenly spaced, whose attention is summed over the pattern in each layer; None takes
            all, which costs as much as dense attention once more.

    Raises:
        ValueError: more than one image.
        DenseDoesNotFit: dense attention needs more memory than there is.

    Example:
    ```python
    >>> inputs = processor(image, return_tensors="pt")
    >>> compare_to_dense(model, inputs, [{"window_size": w} for w in (4, 8, 16)])[1].cls_cosine
    ```
    """
    pixel_values = inputs["pixel_values"]
    if pixel_values.shape[0] != 1:
        raise ValueError(f"inputs hold {pixel_values.shape[0]} images: pass them one at a time.")
    encoder = model.base_model
    check_dense_fits(model.config, tuple(pixel_values.shape[-2:]), model.dtype, model.device, len(variants))
    sparse_runs = []
    for variant in variants:
        with configured(model, unprune=None, **variant):
            patterns_of = {name: getattr(model.config, name) for name in _VARIANT_FIELDS}
            sparse_runs.append((patterns_of, encoder(**inputs)))
    with configured(model, window_size=None, prune_ratio=0.0):
        grid = encoder.token_grid(
            pixel_values, inputs.get("patch_mask"), inputs.get("image_sizes")
        )  # one block: raster order
        masses = _AttentionMasses(
            encoder, grid, [_Pattern.of(settings, outputs, grid) for settings, outputs in sparse_runs], max_queries
        )
        with masses:
            dense = encoder(**inputs)
    return [
        _compare(model, settings, sparse, dense, tuple(masses.of_variant(index)), tuple(pixel_values.shape[-2:]))
        for index, (settings, sparse) in enumerate(sparse_runs)
    ]


_VARIANT_FIELDS = ("window_size", "neighbor_radius", "prune_ratio", "prune_after_layer")


def _compare(
    model: SparsePathViTModel | SparsePathViTForImageClassification,
    settings: Mapping[str, Any],
    sparse: Any,
    dense: Any,
    masses: tuple[float, ...],
    size: tuple[int, int],
) -> Fidelity:
    num_global_tokens = model.config.num_global_tokens
    columns = int(dense.grid_sizes[0, 1])
    all_places, kept_places = (
        outputs.patch_positions[0, :, 0] * columns + outputs.patch_positions[0, :, 1] for outputs in (dense, sparse)
    )
    matching = torch.searchsorted(all_places, kept_places)  # both in raster order
    dense_states, sparse_states = (outputs.last_hidden_state[0].double() for outputs in (dense, sparse))
    dense_patches = dense_states[num_global_tokens:][matching]
    cosines = torch.nn.functional.cosine_similarity(dense_patches, sparse_states[num_global_tokens:], dim=-1)
    same_prediction = None
    classifier = getattr(model, "classifier", None)
    if classifier is not None and model.config.num_labels:
        predictions = [int(classifier(outputs.pooler_output).argmax()) for outputs in (dense, sparse)]
        same_prediction = predictions[0] == predictions[1]
    return Fidelity(
        size=size,
        tokens=len(all_places),
        kept_tokens=len(kept_places),
        window_size=settings["window_size"],
        prune_ratio=float(settings["prune_ratio"]),
        prune_after_layer=settings["prune_after_layer"],
        cls_cosine=torch.nn.functional.cosine_similarity(dense_states[0], sparse_states[0], dim=0).item(),
        patch_cosine=cosines.mean().item(),
        patch_cosine_p5=torch.quantile(cosines, 0.05).item(),
        attention_mass=masses,
        same_prediction=same_prediction,
    )


@dataclass(frozen=True)
class _Pattern:
    """Which keys a variant's queries see, on the dense grid's tokens; the globals are seen always.

    Attributes:
        block_rows: (T,) of each patch token.
        block_columns: (T,) of each patch token.
        radius: blocks seen beyond the own.
        is_kept: (T,) bool, what pruning left.
        prune_after_layer: the last layer that sees all tokens.
    """

    block_rows: torch.Tensor
    block_columns: torch.Tensor
    radius: int
    is_kept: torch.Tensor
    prune_after_layer: int

    @classmethod
    def of(cls, settings: Mapping[str, Any], outputs: Any, grid: TokenGrid) -> "_Pattern":
        window = settings["window_size"] or max(grid.canvas_size)
        columns = grid.canvas_size[1]
        kept_places = outputs.patch_positions[0, :, 0] * columns + outputs.patch_positions[0, :, 1]
        return cls(
            block_rows=grid.rows // window,
            block_columns=grid.columns // window,
            radius=settings["neighbor_radius"],
            is_kept=torch.isin(grid.rows * columns + grid.columns, kept_places),
            prune_after_layer=settings["prune_after_layer"],
        )

    def present(self, layer: int) -> torch.Tensor:
        """(T,) bool, the patch tokens that are there in a layer, counted from 1."""
        return self.is_kept if layer > self.prune_after_layer else torch.ones_like(self.is_kept)

    def seen(self, queries: torch.Tensor, layer: int) -> torch.Tensor:
        """(queries, T) bool, the patch keys that each of some patch queries sees in a layer."""
        row_distance = (self.block_rows[queries, None] - self.block_rows).abs()
        column_distance = (self.block_columns[queries, None] - self.block_columns).abs()
        return (row_distance <= self.radius) & (column_distance <= self.radius) & self.present(layer)


class _AttentionMasses:
    """While entered, sums in each layer of a dense forward the attention that falls inside each pattern."""

    def __init__(
        self, encoder: SparsePathViTModel, grid: TokenGrid, patterns: Sequence[_Pattern], max_queries: int | None
    ) -> None:
        self.layers = encoder.encoder.layers
        self.grid, self.patterns, self.max_queries = grid, patterns, max_queries
        self.masses: list[list[float]] = []

    def __enter__(self) -> None:
        self.hooks = [layer.attention.register_forward_pre_hook(self._measure) for layer in self.layers]

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def of_variant(self, index: int) -> list[float]:
        """Of each layer."""
        return [of_layer[index] for of_layer in self.masses]

    def _measure(self, attention: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        hidden_states, layer = inputs[0], len(self.masses) + 1
        tokens = hidden_states.shape[1]
        query, key, _ = (states[0].float() for states in attention.query_key_value(hidden_states))
        queries = self._queries(hidden_states.device)
        sums, counts = [0.0] * len(self.patterns), [0] * len(self.patterns)
        chunk = max(1, _LOGIT_BYTES // (4 * attention.num_heads * tokens))
        first = self.grid.num_global_tokens
        for part in queries.split(chunk):
            logits = query[:, first + part] @ key.transpose(1, 2) * attention.scaling  # (heads, queries, tokens)
            probability = logits.softmax(dim=-1).mean(dim=0)  # (queries, tokens)
            to_globals, to_patches = probability[:, :first].sum(dim=1), probability[:, first:]
            for index, pattern in enumerate(self.patterns):
                mass = to_globals + (to_patches * pattern.seen(part, layer)).sum(dim=1)
                is_there = pattern.present(layer)[part]
                sums[index] += mass[is_there].double().sum().item()
                counts[index] += int(is_there.sum())
        self.masses.append([total / count if count else math.nan for total, count in zip(sums, counts, strict=True)])

    def _queries(self, device: torch.device) -> torch.Tensor:
        """Indices of the patch queries that are looked at."""
        count = sum(self.grid.counts)
        if self.max_queries is None or count <= self.max_queries:
            return torch.arange(count, device=device)
        return torch.linspace(0, count - 1, self.max_queries, device=device, dtype=torch.float64).round().long()


def dense_bytes(config: SparsePathViTConfig, size: tuple[int, int], dtype: torch.dtype, num_variants: int = 1) -> int:
    """Memory that `compare_to_dense` needs beside the weights, about.

    Args:
        config: of the model; its attention implementation decides whether attention is materialised.
        size: (height, width) in pixels.
        dtype: of the weights.
        num_variants: whose outputs are kept.
    """
    tokens = math.prod(math.ceil(side / config.patch_size) for side in size)
    # Queries and keys in float32 for the attention mass, and the outputs of the variants.
    beside = tokens * config.hidden_size * (2 * 4 + num_variants * dtype.itemsize) + 3 * _LOGIT_BYTES
    return forward_bytes(config, size, dtype) + beside


def check_dense_fits(
    config: SparsePathViTConfig,
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    num_variants: int = 1,
) -> None:
    """Raises `DenseDoesNotFit` where `compare_to_dense` needs more memory than is free."""
    free, needed = free_bytes(device), dense_bytes(config, size, dtype, num_variants)
    if free is None or needed <= free:
        return
    patch_size = config.patch_size
    fitting, too_large = 0, -(-max(size) // patch_size)  # patches per side
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        if dense_bytes(config, (middle * patch_size,) * 2, dtype, num_variants) <= free:
            fitting = middle
        else:
            too_large = middle
    would_fit = (
        f"the largest square that fits is {fitting * patch_size} x {fitting * patch_size} px"
        if fitting
        else "no size fits"
    )
    raise DenseDoesNotFit(
        f"dense attention was not run on {size[0]} x {size[1]} px: it needs about {needed / 2**30:.1f} GiB, "
        f"{free / 2**30:.1f} GiB are free on {device}; {would_fit}. Pass a smaller image, or a smaller dtype."
    )
