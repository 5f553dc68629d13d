# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""How near features come to the dense model's, and what two independent draws say about it without the dense model."""

from torch.nn.functional import cosine_similarity

from .forward import Features


def distance_to_dense(features: Features, dense: Features) -> dict[str, float]:
    """Cosines to the dense model's features.

    Two dense patch tokens of one image have a cosine near 1 on real weights, so patch tokens are compared after
    subtracting the dense mean token: an unrelated token then has 0.

    Args:
        features: of any run on an image.
        dense: of the dense one on the same image.

    Returns:
        `cls_cosine`, `patch_cosine` (mean over the tokens that are left) and `patch_cosine_p5` (5th percentile).
    """
    mean = dense.patches.double().mean(dim=0)
    expected = dense.patches.double()[features.tokens.places] - mean
    cosines = cosine_similarity(features.patches.double() - mean, expected, dim=1)
    return {
        "cls_cosine": cosine_similarity(features.cls.double(), dense.cls.double(), dim=0).item(),
        "patch_cosine": cosines.mean().item(),
        "patch_cosine_p5": cosines.quantile(0.05).item(),
    }


def estimated_cls_error(first: Features, second: Features) -> float:
    """1 - cosine of CLS to dense, estimated from two runs whose draws are independent, without the dense model.

    The errors of both are as large and independent, so the square of their difference is twice that of one. What both
    have in common (the bias of a ratio of estimates) stays unseen.
    """
    return (1 - cosine_similarity(first.cls.double(), second.cls.double(), dim=0).item()) / 2
