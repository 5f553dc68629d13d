# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a checkpoint's prune score and features are worth: against a tissue mask, and under a linear probe."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sparsepath_vit.model.configuration_sparsepath_vit import SparsePathViTConfig
from sparsepath_vit.model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
from sparsepath_vit.model.modeling_outputs_sparsepath_vit import SparsePathViTModelOutput
from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel
from sparsepath_vit.model.token_pruning import num_kept
from sparsepath_vit.runtime.configured import configured
from sparsepath_vit.slides.reader import Slide
from sparsepath_vit.slides.tissue import find_tissue
from sparsepath_vit.tasks.classification.linear_probe import ProbeSettings, fit_head

VARIANTS = {
    "dense": {"window_size": None, "prune_ratio": 0.0},
    "sparse": {"window_size": 8, "prune_ratio": 0.0},
    "sparse + pruned": {"window_size": 8, "prune_ratio": 0.6},
}
HISTOGRAM_BINS = 16


def untrained_twin(config: SparsePathViTConfig, seed: int = 0) -> SparsePathViTModel:
    """A model of the same configuration with the random weights that training starts from."""
    torch.manual_seed(seed)
    return SparsePathViTModel(SparsePathViTConfig.from_dict(config.to_dict())).eval()


def until_pruning(model: SparsePathViTModel) -> SparsePathViTModel:
    """A copy that ends with the pruning layer: all that the prune score needs, at a fraction of the time."""
    config = SparsePathViTConfig.from_dict(model.config.to_dict(), num_hidden_layers=model.config.prune_after_layer)
    short = SparsePathViTModel(config).to(model.dtype).eval()
    short.load_state_dict({name: weight for name, weight in model.state_dict().items() if name in short.state_dict()})
    return short


@torch.inference_mode()
def run_model(
    model: SparsePathViTModel,
    processor: SparsePathViTImageProcessor,
    image: Image.Image | np.ndarray,
    **settings: int | float | str | None,
) -> SparsePathViTModelOutput:
    """One forward pass with some fields of the configuration set.

    Args:
        model: in evaluation mode.
        processor: of the same checkpoint.
        image: taken at its own size.
        **settings: fields of `SparsePathViTConfig`, for example `prune_ratio=0.6`.
    """
    with configured(model, **settings):
        return model(**processor(image, return_tensors="pt").to(model.device))


def region_and_tissue(path: Path, mpp: float, patch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """An image cut to whole patches, and which of its patch tokens are tissue.

    Args:
        path: any file that `Slide` opens.
        mpp: micrometres per pixel of the file.
        patch_size: pixels per patch side.

    Returns:
        (height, width, 3) uint8 and (rows, columns) bool. The mask has no margin, so that it ends where the tissue
        does.
    """
    with Slide(path, mpp=mpp) as slide:
        width, height = (side // patch_size * patch_size for side in slide.dimensions)
        tissue = find_tissue(slide, margin=0.0)
        mask = tissue.token_grid(slide, patch_size, width=width, height=height)
        return slide.read_region(0, 0, width, height), mask


def area_under_roc(scores: np.ndarray, is_tissue: np.ndarray) -> float:
    """Probability that a tissue token scores above a background token; nan where one of the two is missing."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(is_tissue, scores)) if 0 < is_tissue.sum() < is_tissue.size else float("nan")


def removed_background_share(scores: np.ndarray, is_tissue: np.ndarray, prune_ratio: float) -> float:
    """Share of the tokens removed at `prune_ratio` that are background; under random pruning that of all tokens.

    Args:
        scores: (tokens,) prune scores in raster order.
        is_tissue: (tokens,) bool.
        prune_ratio: share of the tokens removed.
    """
    removed = np.argsort(-scores, kind="stable")[num_kept(len(scores), prune_ratio) :]
    return float((~is_tissue[removed]).mean()) if len(removed) else float("nan")


def color_histogram(image: Image.Image) -> np.ndarray:
    """The baseline without a network: `HISTOGRAM_BINS` shares per channel, (3 * HISTOGRAM_BINS,)."""
    pixels = np.asarray(image.convert("RGB"))
    counts = [
        np.histogram(pixels[..., channel], HISTOGRAM_BINS, (0, 256))[0] / pixels[..., channel].size
        for channel in range(3)
    ]
    return np.concatenate(counts)


def features_of(files: Iterable[Path], size: int, embed: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """Features of images resized to a square: (files, features).

    Args:
        files: images Pillow reads.
        size: pixels of the square's side.
        embed: features of one image.
    """
    features = []
    for path in files:
        with Image.open(path) as opened:
            image = opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        features.append(embed(image))
    return np.stack(features)


def probe_predictions(features: np.ndarray, labels: np.ndarray, groups: Sequence[str]) -> np.ndarray:
    """Classes that linear heads predict for groups they have not seen: one fold per group.

    Args:
        features: (items, features).
        labels: (items,) class indices.
        groups: (items,) what must not be on both sides of a split.

    Returns:
        (items,) class indices.
    """
    group_of_item, num_labels = np.asarray(groups), int(labels.max()) + 1
    predictions = np.empty_like(labels)
    for group in np.unique(group_of_item):
        is_left_out = group_of_item == group
        head = fit_head(features[~is_left_out], labels[~is_left_out], num_labels, ProbeSettings(), l2=1.0)
        predictions[is_left_out] = head.logits(features[is_left_out]).argmax(axis=1)
    return predictions


def balanced_accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Mean over the classes that occur of the share that is predicted right."""
    return float(np.mean([(predictions[labels == label] == label).mean() for label in np.unique(labels)]))
