# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""How near sparse variants come to the dense model on the same weights, and what they cost.

Two dense patch tokens of one image have a cosine near 1 on real weights, however far apart they lie. Patch tokens are
therefore compared after subtracting the dense mean token, too: an unrelated token then has 0.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

from ..model.configuration_sparsepath_vit import SparsePathViTConfig
from ..model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
from ..model.modeling_outputs_sparsepath_vit import SparsePathViTModelOutput
from ..model.modeling_sparsepath_vit import SparsePathViTForImageClassification, SparsePathViTModel
from ..runtime.configured import configured
from ..runtime.cost import mean_keys_per_query
from ..runtime.measure import Measurement, measured
from ..runtime.memory import forward_bytes, free_bytes
from ..runtime.pixels import prepare

NUM_SAMPLES = 1024
PRUNE_RATIO = 0.6
DENSE = {"window_size": None, "num_context_tokens": 0, "prune_ratio": 0.0, "num_representatives": 0}


class DenseDoesNotFit(ValueError):
    """Dense attention needs more memory than there is; the message says the size that would fit."""


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """One variant against the dense model, on one image.

    Cosines of patch tokens are means over the tokens that are left, `_p5` their 5th percentile; `centred` ones are
    taken after subtracting the dense mean token from both.

    Attributes:
        size: (height, width) of the image in pixels.
        tokens: patch tokens that were present.
        kept_tokens: of these, left after pruning, representatives among them: the ones that are compared.
        window_size: of the variant; None where it is dense.
        num_context_tokens: of the variant.
        prune_ratio: of the variant.
        prune_after_layer: of the variant.
        num_representatives: of the variant.
        keys_per_query: on average, before pruning.
        seconds: of the forward.
        peak_bytes: as `runtime.measure` defines it.
        cls_cosine: cosine similarity of the CLS token after the final norm.
        pooled_cosine: of the pooled features.
        patch_cosine: of the patch tokens after the final norm.
        patch_cosine_p5: likewise.
        centred_patch_cosine: likewise.
        centred_patch_cosine_p5: likewise.
        self_similarity: mean cosine of two different patch tokens of the variant's own.
        estimated_cls_error: 1 - `cls_cosine`, estimated from two runs whose draws of context tokens are independent,
            without the dense model; None where it was not asked for, or nothing is drawn.
        same_prediction: whether a classifier predicts the same class; None for a model without classes.
    """

    size: tuple[int, int]
    tokens: int
    kept_tokens: int
    window_size: int | None
    num_context_tokens: int
    prune_ratio: float
    prune_after_layer: int
    num_representatives: int
    keys_per_query: float
    seconds: float
    peak_bytes: int
    cls_cosine: float
    pooled_cosine: float
    patch_cosine: float
    patch_cosine_p5: float
    centred_patch_cosine: float
    centred_patch_cosine_p5: float
    self_similarity: float
    estimated_cls_error: float | None
    same_prediction: bool | None

    @property
    def variant(self) -> str:
        """What was computed, in words."""
        parts = ["dense" if self.window_size is None else f"w = {self.window_size}"]
        if self.num_context_tokens and self.window_size is not None:
            parts.append(f"{self.num_context_tokens:,} context tokens")
        if self.prune_ratio:
            parts.append(f"{self.prune_ratio:.0%} pruned")
            if self.num_representatives:
                parts.append(f"{self.num_representatives:,} representatives")
        return ", ".join(parts)

    def row(self) -> dict[str, Any]:
        """The values by column name, for a table."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "size"}
        return {"variant": self.variant, "height": self.size[0], "width": self.size[1], **values}


_VARIANT_FIELDS = ("window_size", "num_context_tokens", "prune_ratio", "prune_after_layer", "num_representatives")


def usual_variants(config: SparsePathViTConfig) -> list[dict[str, Any]]:
    """What a user chooses between: block-local, stratified, and each of them pruned.

    Args:
        config: its own window size, numbers and prune ratio are taken where it has any.
    """
    local = {"window_size": config.window_size or 8, "num_context_tokens": 0, "prune_ratio": 0.0}
    stratified = local | {"num_context_tokens": config.num_context_tokens or NUM_SAMPLES}
    pruned = {"prune_ratio": config.prune_ratio or PRUNE_RATIO}
    representatives = {"num_representatives": config.num_representatives or NUM_SAMPLES}
    return [local, stratified, local | pruned | {"num_representatives": 0}, stratified | pruned | representatives]


def compare_image(
    model: SparsePathViTModel | SparsePathViTForImageClassification,
    processor: SparsePathViTImageProcessor,
    image: Image.Image,
) -> list[Fidelity]:
    """`compare_to_dense` of an image and `usual_variants`, with estimated errors.

    Args:
        model: in evaluation mode.
        processor: its image processor.
        image: RGB.
    """
    inputs = prepare(processor, [np.asarray(image)], model.device, mask_background=processor.mask_background)
    return compare_to_dense(model, inputs, usual_variants(model.config), estimates_error=True)


@torch.inference_mode()
def compare_to_dense(
    model: SparsePathViTModel | SparsePathViTForImageClassification,
    inputs: Mapping[str, torch.Tensor],
    variants: Sequence[Mapping[str, Any]] = ({},),
    *,
    estimates_error: bool = False,
) -> list[Fidelity]:
    """Runs the dense model and variants of it on one image.

    Args:
        model: in evaluation mode. With a classifier, predictions are compared too.
        inputs: what the image processor returned for one image, on the model's device.
        variants: fields of the configuration that differ from the model's, for example `{"window_size": 16}`; the
            default is the model as it is. See `usual_variants`.
        estimates_error: whether variants with context tokens run twice, for `Fidelity.estimated_cls_error`.

    Returns:
        The dense model itself first, then the variants in their order.

    Raises:
        ValueError: more than one image.
        DenseDoesNotFit: dense attention needs more memory than there is.

    Example:
    ```python
    >>> inputs = processor(image, return_tensors="pt")
    >>> dense, *rows = compare_to_dense(model, inputs, [{"window_size": w} for w in (4, 8, 16)])
    >>> rows[1].cls_cosine
    ```
    """
    pixel_values = inputs["pixel_values"]
    if pixel_values.shape[0] != 1:
        raise ValueError(f"inputs hold {pixel_values.shape[0]} images: pass them one at a time.")
    size = tuple(pixel_values.shape[-2:])
    check_dense_fits(model.config, size, model.dtype, model.device)
    rows: list[Fidelity] = []
    dense: SparsePathViTModelOutput | None = None
    for variant in (DENSE, *variants):
        with configured(model, unprune=None, **variant):
            outputs, measurement = _measured_run(model, inputs)
            dense = dense or outputs
            estimated = _estimated_cls_error(model, inputs, outputs) if estimates_error else None
            grid = model.token_grid(pixel_values, inputs.get("patch_mask"), inputs.get("image_sizes"))
            rows.append(
                Fidelity(
                    size=size,
                    tokens=sum(grid.counts),
                    kept_tokens=outputs.patch_positions.shape[1],
                    **{name: getattr(model.config, name) for name in _VARIANT_FIELDS},
                    keys_per_query=mean_keys_per_query(grid),
                    seconds=measurement.seconds,
                    peak_bytes=measurement.peak_bytes,
                    **_cosines(outputs, dense, model.config.num_global_tokens),
                    estimated_cls_error=estimated,
                    same_prediction=_is_same_prediction(model, outputs, dense),
                )
            )
    return rows


def markdown_table(rows: Sequence[Fidelity]) -> str:
    """Variants below each other, for a model card."""
    titles = ["variant", "keys a query", "CLS cosine", "patch tokens, centred (5th percentile)"]
    lines = [titles, ["---"] * len(titles)]
    lines += [
        [
            row.variant,
            f"{row.keys_per_query:,.0f}",
            f"{row.cls_cosine:.4f}",
            f"{row.centred_patch_cosine:.3f} ({row.centred_patch_cosine_p5:.3f})",
        ]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _measured_run(
    model: SparsePathViTModel | SparsePathViTForImageClassification, inputs: Mapping[str, torch.Tensor]
) -> tuple[SparsePathViTModelOutput, Measurement]:
    with measured(model.device) as measurement:
        outputs = model.base_model(**inputs)
    return outputs, measurement


def _cosines(
    outputs: SparsePathViTModelOutput, dense: SparsePathViTModelOutput, num_global_tokens: int
) -> dict[str, float]:
    """The cosines of `Fidelity` by name."""
    columns = int(dense.grid_sizes[0, 1])
    all_places, places = (
        one.patch_positions[0, :, 0] * columns + one.patch_positions[0, :, 1] for one in (dense, outputs)
    )
    matching = torch.searchsorted(all_places, places)  # both in raster order
    states, dense_states = (one.last_hidden_state[0].double() for one in (outputs, dense))
    patches, dense_patches = states[num_global_tokens:], dense_states[num_global_tokens:]
    mean, dense_patches = dense_patches.mean(dim=0), dense_patches[matching]
    plain = cosine_similarity(patches, dense_patches, dim=1)
    centred = cosine_similarity(patches - mean, dense_patches - mean, dim=1)
    pooled, dense_pooled = (one.pooler_output[0].double() for one in (outputs, dense))
    return {
        "cls_cosine": cosine_similarity(states[0], dense_states[0], dim=0).item(),
        "pooled_cosine": cosine_similarity(pooled, dense_pooled, dim=0).item(),
        "patch_cosine": plain.mean().item(),
        "patch_cosine_p5": plain.quantile(0.05).item(),
        "centred_patch_cosine": centred.mean().item(),
        "centred_patch_cosine_p5": centred.quantile(0.05).item(),
        "self_similarity": _self_similarity(patches),
    }


def _self_similarity(patches: torch.Tensor) -> float:
    """Mean cosine of two different rows; nan where there is only one."""
    number = len(patches)
    # Of all pairs, those of a row with itself included.
    of_all_pairs = torch.nn.functional.normalize(patches, dim=1).sum(dim=0).square().sum().item()
    return (of_all_pairs - number) / (number * (number - 1)) if number > 1 else math.nan


def _estimated_cls_error(
    model: SparsePathViTModel | SparsePathViTForImageClassification,
    inputs: Mapping[str, torch.Tensor],
    outputs: SparsePathViTModelOutput,
) -> float | None:
    """The errors of two draws are as large and independent: the square of their difference is twice that of one."""
    if model.config.window_size is None or not model.config.num_context_tokens:
        return None
    with other_draws(model):
        second = model.base_model(**inputs)
    states = (one.last_hidden_state[0, 0].double() for one in (outputs, second))
    return max(0.0, 1.0 - cosine_similarity(*states, dim=0).item()) / 2  # of equal ones rounding may leave less than 0


@contextmanager
def other_draws(model: SparsePathViTModel | SparsePathViTForImageClassification, number: int = 1) -> Iterator[None]:
    """Lets the model draw other context tokens for a while, independently of its own.

    Args:
        model: any model of the family.
        number: which of the other draws.
    """
    layers = model.base_model.encoder.layers
    for layer in layers:
        layer.attention.draw += number * len(layers)
    try:
        yield
    finally:
        for layer in layers:
            layer.attention.draw -= number * len(layers)


def _is_same_prediction(
    model: SparsePathViTModel | SparsePathViTForImageClassification,
    outputs: SparsePathViTModelOutput,
    dense: SparsePathViTModelOutput,
) -> bool | None:
    classifier = getattr(model, "classifier", None)
    if classifier is None or not model.config.num_labels:
        return None
    one, other = (int(classifier(of.pooler_output).argmax()) for of in (outputs, dense))
    return one == other


def dense_bytes(config: SparsePathViTConfig, size: tuple[int, int], dtype: torch.dtype) -> int:
    """Memory that `compare_to_dense` needs beside the weights, about: a forward, and the outputs of two.

    Args:
        config: of the model; its attention implementation decides whether attention is materialised.
        size: (height, width) in pixels.
        dtype: of the weights.
    """
    tokens = math.prod(math.ceil(side / config.patch_size) for side in size)
    # Compared in float64: two outputs, and each less the mean.
    return forward_bytes(config, size, dtype) + tokens * config.hidden_size * (2 * dtype.itemsize + 6 * 8)


def check_dense_fits(
    config: SparsePathViTConfig, size: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> None:
    """Raises `DenseDoesNotFit` where `compare_to_dense` needs more memory than is free."""
    free, needed = free_bytes(device), dense_bytes(config, size, dtype)
    if free is None or needed <= free:
        return
    patch_size = config.patch_size
    fitting, too_large = 0, -(-max(size) // patch_size)  # patches per side
    while too_large - fitting > 1:
        middle = (fitting + too_large) // 2
        if dense_bytes(config, (middle * patch_size,) * 2, dtype) <= free:
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
