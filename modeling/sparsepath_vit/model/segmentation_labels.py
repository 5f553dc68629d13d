# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What the segmentation loss takes as labels, and what it leaves out."""

import torch

from .configuration_segmentation_sparsepath_vit import SparsePathViTUniversalSegmentationConfig


def check_labels(
    pixel_values: torch.Tensor,
    mask_labels: list[torch.Tensor] | None,
    class_labels: list[torch.Tensor] | None,
    annotated_classes: torch.Tensor | None,
    config: SparsePathViTUniversalSegmentationConfig,
) -> None:
    """Refuses labels that do not fit the images or each other.

    Raises:
        ValueError: names the image, what is wrong with its labels, and what they take.
    """
    batch, _, *size = pixel_values.shape
    for name, labels in (("mask_labels", mask_labels), ("class_labels", class_labels)):
        if labels is None or len(labels) != batch:
            given = "None" if labels is None else f"labels of {len(labels)} images"
            raise ValueError(f"{name} is {given}: it takes one tensor for each of the {batch} images.")
    for image, (masks, classes) in enumerate(zip(mask_labels, class_labels, strict=True)):
        _check_masks(f"mask_labels[{image}]", masks, size)
        _check_classes(image, masks, classes, config)
        if annotated_classes is not None and len(classes) and not annotated_classes[image][classes].all():
            raise ValueError(
                f"class_labels[{image}] holds {classes.tolist()}, of which annotated_classes says that not all were "
                "annotated."
            )


def _check_masks(name: str, masks: torch.Tensor, size: list[int]) -> None:
    if masks.ndim != 3 or list(masks.shape[1:]) != size:
        raise ValueError(
            f"{name} has shape {tuple(masks.shape)}: its image is {size[0]} x {size[1]} px, so it takes (segments, "
            f"{size[0]}, {size[1]})."
        )
    if not ((masks == 0) | (masks == 1)).all():
        raise ValueError(f"{name} holds the values {masks.unique()[:6].tolist()}: a mask is 0 and 1.")


def _check_classes(
    image: int, masks: torch.Tensor, classes: torch.Tensor, config: SparsePathViTUniversalSegmentationConfig
) -> None:
    if classes.shape != (masks.shape[0],):
        raise ValueError(
            f"class_labels[{image}] has shape {tuple(classes.shape)}: mask_labels[{image}] holds {masks.shape[0]} "
            f"segments, so it takes ({masks.shape[0]},)."
        )
    if len(classes) > config.num_queries:
        raise ValueError(
            f"mask_labels[{image}] holds {len(classes)} segments, more than num_queries={config.num_queries} can "
            "find: merge segments, crop the image, or raise num_queries."
        )
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < config.num_labels:
        raise ValueError(
            f"class_labels[{image}] holds {classes.tolist()}: the model has the classes 0 to {config.num_labels - 1} "
            "(id2label)."
        )


def ignore_unannotated(class_logits: torch.Tensor, annotated_classes: torch.Tensor) -> torch.Tensor:
    """Takes classes that were not annotated out of the softmax: they get no gradient, and are no negatives.

    Nor does "no object" get one from an image that is annotated in part. All classes share its logit: were it raised
    where an image shows none of its own class, the classes nobody looked for there would become less probable. What
    the loss sees is the difference to "no object", so that the annotated classes learn as much without it.

    Args:
        class_logits: (batch, queries, num_labels + 1), the last one "no object".
        annotated_classes: (batch, num_labels) bool.

    Raises:
        ValueError: a mask of another shape.
    """
    expected = (class_logits.shape[0], class_logits.shape[2] - 1)
    if tuple(annotated_classes.shape) != expected:
        raise ValueError(
            f"annotated_classes has shape {tuple(annotated_classes.shape)}: it takes (batch, num_labels), {expected}."
        )
    is_annotated = annotated_classes.bool().to(class_logits.device)[:, None]  # (batch, 1, num_labels)
    labels = class_logits[..., :-1].masked_fill(~is_annotated, torch.finfo(class_logits.dtype).min)
    no_object = class_logits[..., -1:]
    no_object = torch.where(is_annotated.all(dim=-1, keepdim=True), no_object, no_object.detach())
    return torch.cat([labels, no_object], dim=-1)
