# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a segmentation model says of each pixel, at the resolution of the image; prediction needs no more."""

import copy
from collections.abc import Sequence

import torch
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from ...model.segmentation_postprocessing import semantic_probabilities

# Written into the config of a model whose labels are separate yes-or-no questions, as those of SegPath.
INDEPENDENT_LABELS = "multi_label_classification"
THRESHOLD = 0.5


def label_probabilities(
    outputs: Mask2FormerForUniversalSegmentationOutput, label: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> list[torch.Tensor]:
    """How probable one label is at each pixel, whatever the other labels are: a question of yes or no.

    Args:
        outputs: of the model.
        label: for each image the label asked for.
        sizes: (height, width) in pixels of each image.

    Returns:
        For each image (height, width) float32 in [0, 1].
    """
    logits = outputs.class_queries_logits
    chosen = torch.as_tensor(label, device=logits.device)[:, None, None].expand(-1, logits.shape[1], 1)
    # (batch, queries, 2): the label against "no object"
    binary = torch.cat([logits.gather(-1, chosen), logits[..., -1:]], dim=-1)
    alone = copy.copy(outputs)
    alone.class_queries_logits = binary
    return [maps[0] for maps in semantic_probabilities(alone, sizes)]


def all_label_probabilities(
    outputs: Mask2FormerForUniversalSegmentationOutput, size: tuple[int, int], independent: bool
) -> torch.Tensor:
    """(labels, height, width) probabilities of a batch of one image.

    Args:
        outputs: of the model.
        size: (height, width) in pixels of the image.
        independent: whether labels may overlap (`config.problem_type` is `INDEPENDENT_LABELS`).
    """
    if not independent:
        return semantic_probabilities(outputs, [size])[0]
    num_labels = outputs.class_queries_logits.shape[-1] - 1
    return torch.stack([label_probabilities(outputs, [label], [size])[0] for label in range(num_labels)])
