# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Variants of one model for comparisons: controls for the order of pruning."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel
from sparsepath_vit.model.token_grid import TokenGrid

PRUNING_ORDERS = ("score", "random", "inverse")


@contextmanager
def pruning_order(model: SparsePathViTModel, order: str, seed: int = 0) -> Iterator[None]:
    """Lets the model prune in another order for a while: controls of what its score is worth.

    "random" deals the scores out anew among the tokens of each image, "inverse" removes the highest first. The random
    order depends on `seed` and the image's own scores, not on what ran before.

    Args:
        model: bare encoder that prunes.
        order: "score" (the model as it is), "random" or "inverse".
        seed: of the random order.

    Raises:
        ValueError: an unknown order.
    """
    if order not in PRUNING_ORDERS:
        raise ValueError(f"order={order!r} is unknown: choose one of {', '.join(PRUNING_ORDERS)}.")
    if order == "score":
        yield
        return

    def reorder(module: torch.nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> tuple[Any, ...]:
        attended, weights, scores = output
        if scores is None:
            return output
        grid: TokenGrid = inputs[1]
        return attended, weights, -scores if order == "inverse" else _dealt_out_anew(scores, grid, seed)

    hooks = [layer.attention.register_forward_hook(reorder) for layer in model.encoder.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _dealt_out_anew(scores: torch.Tensor, grid: TokenGrid, seed: int) -> torch.Tensor:
    """(T,) scores, permuted within each image."""
    images = []
    for of_image in scores.split(grid.counts):
        digest = hashlib.sha256(of_image.cpu().numpy().tobytes() + str(seed).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        images.append(of_image[torch.randperm(len(of_image), generator=generator).to(of_image.device)])
    return torch.cat(images)
