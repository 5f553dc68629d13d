# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""From queries and their stride-4 masks to label maps, at the resolution of the image.

Transformers' own post-processing resizes all masks to 384 x 384 px first, which for a region of thousands of pixels
throws the boundaries away.
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from .configuration_segmentation_sparsepath_vit import STRIDES

MASK_STRIDE = STRIDES[0]
# Pixels of all enlarged masks that are in memory at once: 16 masks of 2048 x 2048 px, 256 MB.
PIXELS_PER_CHUNK = 2**26


@torch.no_grad()
def semantic_probabilities(
    outputs: Mask2FormerForUniversalSegmentationOutput,
    target_sizes: Sequence[tuple[int, int]],
    input_sizes: Sequence[tuple[int, int]] | None = None,
    pixels_per_chunk: int = PIXELS_PER_CHUNK,
) -> list[torch.Tensor]:
    """How probable each label is at each pixel.

    A label's score is the sum over queries of the label's probability times the mask's (Mask2Former, semantic
    inference). Where the scores of a pixel sum to more than 1, because several queries found the same, they are divided
    by their sum; the largest stays the largest.

    Args:
        outputs: `class_queries_logits` (batch, queries, labels + 1) and `masks_queries_logits` (batch, queries, h, w).
        target_sizes: (height, width) in pixels of each map wanted.
        input_sizes: (height, width) in pixels of each image as the model saw it, on a canvas at most as large as the
            masks cover; by default the target sizes, that is native resolution.
        pixels_per_chunk: how many pixels of enlarged masks to have in memory at once, over all queries of a chunk.

    Returns:
        For each image (labels, height, width) float32, in [0, 1] and with a sum of at most 1.

    Raises:
        ValueError: sizes that do not fit the batch or its masks.
    """
    class_logits, mask_logits = outputs.class_queries_logits, outputs.masks_queries_logits
    sizes = _check_sizes("target_sizes", target_sizes, mask_logits)
    crops = sizes if input_sizes is None else _check_sizes("input_sizes", input_sizes, mask_logits)
    covered = tuple(MASK_STRIDE * cells for cells in mask_logits.shape[2:])
    for image, crop in enumerate(crops):
        if crop[0] > covered[0] or crop[1] > covered[1]:
            raise ValueError(
                f"{'target_sizes' if input_sizes is None else 'input_sizes'}[{image}] is {crop}: the masks cover "
                f"{covered[0]} x {covered[1]} px. Where the model saw a smaller image, pass its size as input_sizes."
            )
    probabilities = class_logits.float().softmax(dim=-1)[..., :-1]  # (batch, queries, labels)
    return [
        _image_probabilities(*arguments, pixels_per_chunk)
        for arguments in zip(probabilities, mask_logits, crops, sizes, strict=True)
    ]


def post_process_semantic_segmentation(
    outputs: Mask2FormerForUniversalSegmentationOutput,
    target_sizes: Sequence[tuple[int, int]],
    input_sizes: Sequence[tuple[int, int]] | None = None,
) -> list[torch.Tensor]:
    """The most probable label of each pixel.

    Args:
        outputs: see `semantic_probabilities`.
        target_sizes: see `semantic_probabilities`.
        input_sizes: see `semantic_probabilities`.

    Returns:
        For each image (height, width) int64. With a single label 1 is where it is at least as probable as not, else 0.
    """
    maps = semantic_probabilities(outputs, target_sizes, input_sizes)
    return [(one[0] >= 0.5).long() if len(one) == 1 else one.argmax(dim=0) for one in maps]


def _image_probabilities(
    probabilities: torch.Tensor,
    mask_logits: torch.Tensor,
    crop: tuple[int, int],
    size: tuple[int, int],
    pixels_per_chunk: int,
) -> torch.Tensor:
    """One image's (queries, labels) probabilities and (queries, h, w) masks -> (labels, height, width)."""
    cells = [-(-side // MASK_STRIDE) for side in crop]
    masks = mask_logits[:, : cells[0], : cells[1]]
    scores = torch.zeros(probabilities.shape[1], *size, dtype=torch.float32, device=masks.device)
    queries_per_chunk = max(1, pixels_per_chunk // max(crop[0] * crop[1], size[0] * size[1]))
    for some_probabilities, some_masks in zip(
        probabilities.split(queries_per_chunk), masks.split(queries_per_chunk), strict=True
    ):
        enlarged = nn.functional.interpolate(
            some_masks[None].float(), scale_factor=MASK_STRIDE, mode="bilinear", align_corners=False
        )[:, :, : crop[0], : crop[1]]
        if size != crop:
            enlarged = nn.functional.interpolate(enlarged, size=size, mode="bilinear", align_corners=False)
        scores += torch.einsum("ql,qhw->lhw", some_probabilities, enlarged[0].sigmoid())
    return scores / scores.sum(dim=0, keepdim=True).clamp(min=1.0)


def _check_sizes(name: str, sizes: Sequence[tuple[int, int]], mask_logits: torch.Tensor) -> list[tuple[int, int]]:
    pairs = [tuple(int(side) for side in size) for size in sizes]
    if len(pairs) != mask_logits.shape[0] or not all(len(pair) == 2 and min(pair) >= 1 for pair in pairs):
        raise ValueError(
            f"{name} is {pairs}: it takes one (height, width) in pixels for each of the {mask_logits.shape[0]} images."
        )
    return pairs
