# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Prune scores after every layer of one forward, and how well each finds the labelled tokens."""

from collections.abc import Iterator

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from sparsepath_vit.model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel
from sparsepath_vit.model.token_pruning import EncodedTokens, prune_scores
from sparsepath_vit.runtime.pixels import prepare

from ..against_tiles.datasets import TokenImage

CENTRED = "attention_value, centred"
SCORES = ("attention", "cls_attention", "attention_value", CENTRED)


def areas_of_image(
    model: SparsePathViTModel, processor: SparsePathViTImageProcessor, image: TokenImage
) -> dict[tuple[int, str], float]:
    """(layer, score) -> area under the ROC; layers count from 1, "saturation" is that of layer 0.

    Args:
        model: in evaluation mode; its attention pattern is used, it does not prune.
        processor: its image processor.
        image: labels of 0 and 1, both of which occur.
    """
    places = image.rows, image.columns
    areas = {(0, "saturation"): roc_auc_score(image.labels, saturation(image.image, model.config.patch_size)[places])}
    for layer, score, values in scores_of_layers(model, processor, image.image):
        areas[layer, score] = roc_auc_score(image.labels, values[places])
    return {key: float(area) for key, area in areas.items()}


@torch.inference_mode()
def scores_of_layers(
    model: SparsePathViTModel, processor: SparsePathViTImageProcessor, image: np.ndarray
) -> Iterator[tuple[int, str, np.ndarray]]:
    """Layer, score and (rows, columns) float32 of its values; NaN where a patch holds too little of the image."""
    inputs = prepare(processor, [image], model.device)
    grid = model.token_grid(**inputs)
    found: list[tuple[int, str, np.ndarray]] = []

    def after_layer(number: int, tokens: EncodedTokens) -> EncodedTokens:
        if number < model.config.num_hidden_layers:
            layer = model.encoder.layers[number]
            query, key, value = layer.attention.query_key_value(layer.norm1(tokens.hidden_states))
            for score in SCORES:
                kind = "attention_value" if score == CENTRED else score
                seen = value - value.mean(dim=2, keepdim=True) if score == CENTRED else value
                values = prune_scores(query, key, seen, grid, scale=layer.attention.scaling, kind=kind)
                score_map = torch.full(grid.grid_sizes[0], torch.nan)
                score_map[grid.rows, grid.columns] = values
                found.append((number + 1, score, score_map.numpy()))
        return tokens

    model.encode(inputs["pixel_values"], grid, after_layer=after_layer, may_prune=False)
    yield from found


def saturation(image: np.ndarray, patch_size: int) -> np.ndarray:
    """(rows, columns) means over patches of (largest - smallest) / largest colour; (height, width, 3) uint8 image."""
    colours = image.astype(np.float64)
    largest = colours.max(axis=2)
    of_pixel = np.divide(largest - colours.min(axis=2), largest, out=np.zeros_like(largest), where=largest > 0)
    rows, columns = (-(-side // patch_size) for side in of_pixel.shape)
    cells = (np.arange(of_pixel.shape[0]) // patch_size * columns)[:, None] + np.arange(of_pixel.shape[1]) // patch_size
    sums = np.bincount(cells.ravel(), weights=of_pixel.ravel(), minlength=rows * columns)
    return (sums / np.bincount(cells.ravel(), minlength=rows * columns)).reshape(rows, columns)
