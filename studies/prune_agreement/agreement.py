# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Does pruning keep what pathologists marked? Prune scores against annotated masks, on tissue tokens only.

Only tokens that the annotation calls tissue count, so that telling tissue from glass earns nothing. Scores are a
softmax over one region, so they are compared within each region; regions of a slide are not independent, so intervals
draw whole slides.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from sparsepath_vit.model.token_pruning import num_kept
from sparsepath_vit.runtime.configured import configured
from sparsepath_vit.runtime.extras import require
from sparsepath_vit.runtime.pixels import prepare
from sparsepath_vit.slides import Slide, SlideError
from sparsepath_vit.tasks.bootstrap import bootstrap_interval
from sparsepath_vit.tasks.classification.rois import Problem, Roi, RoiDataset
from sparsepath_vit.tasks.panda.dataset import MASK_LABELS
from sparsepath_vit.tasks.panda.label_mask import LabelMask, LabelMaskError

if TYPE_CHECKING:
    from sparsepath_vit.model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
    from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel

logger = logging.getLogger(__name__)

ORDERS = ("score", "inverse", "random", "haematoxylin")
KEEP_RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Labels of the mask that a target counts, by centre. Karolinska's "benign" holds stroma and epithelium alike.
TARGETS = {
    "cancer": {"radboud": ("G3", "G4", "G5"), "karolinska": ("cancer",)},
    "epithelium": {"radboud": ("benign", "G3", "G4", "G5")},
}
_LEAST_SHARE = 0.5


@dataclass(frozen=True)
class TokenLabels:
    """What the annotation says of each patch token of a region.

    Attributes:
        is_tissue: (rows, columns) bool: at least half of the token is annotated.
        is_target: target -> (rows, columns) bool: at least half of what is annotated of the token is of the target.
    """

    is_tissue: np.ndarray
    is_target: dict[str, np.ndarray]


def token_labels(labels: np.ndarray, provider: str, patch_size: int, shown: tuple[int, int]) -> TokenLabels:
    """Labels of patch tokens from those of pixels.

    Args:
        labels: (height, width) of the region at level 0, 0 is background.
        provider: whose labels they are, of `MASK_LABELS`.
        patch_size: pixels per patch side, of the region as it is shown.
        shown: (height, width) of the region as it is shown to the model.
    """
    rows, columns = (-(-side // patch_size) for side in shown)
    token_row, token_column = (
        ((np.arange(count) + 0.5) / count * side // patch_size).astype(np.int64)
        for count, side in zip(labels.shape, shown, strict=True)
    )
    names = MASK_LABELS[provider]
    cells = (token_row[:, None] * columns + token_column) * len(names) + labels
    areas = np.bincount(cells.ravel(), minlength=rows * columns * len(names)).reshape(rows, columns, len(names))
    annotated = areas[..., 1:].sum(axis=-1)
    is_tissue = annotated >= _LEAST_SHARE * areas.sum(axis=-1)
    is_target = {}
    for target, names_of in TARGETS.items():
        if provider in names_of:
            counted = areas[..., [names.index(name) for name in names_of[provider]]].sum(axis=-1)
            is_target[target] = is_tissue & (counted >= _LEAST_SHARE * annotated)
    return TokenLabels(is_tissue & (annotated > 0), is_target)


def haematoxylin(image: np.ndarray, patch_size: int) -> np.ndarray:
    """Mean haematoxylin (Ruifrok and Johnston 2001) of each patch: (height, width, 3) uint8 -> (rows, columns)."""
    stain = require("skimage.color").rgb2hed(image)[..., 0]
    rows, columns = (-(-side // patch_size) for side in stain.shape)
    token_row, token_column = (np.arange(side) // patch_size for side in stain.shape)
    cells = (token_row[:, None] * columns + token_column).ravel()
    sums = np.bincount(cells, weights=stain.ravel(), minlength=rows * columns)
    return (sums / np.bincount(cells, minlength=rows * columns)).reshape(rows, columns)


def agreement(values: np.ndarray, is_target: np.ndarray, keep_rates: Sequence[float] = KEEP_RATES) -> dict[str, float]:
    """How well an order of tokens finds a target.

    Args:
        values: (tokens,) the order: tokens with high values are kept.
        is_target: (tokens,) bool; both kinds must occur.
        keep_rates: shares of the tokens that are kept.

    Returns:
        `auroc`, and `recall_at_RATE`: the share of the target's tokens among those kept.
    """
    ranking = np.argsort(-values, kind="stable")
    found = is_target[ranking].cumsum() / is_target.sum()
    recalls = {f"recall_at_{rate:g}": float(found[num_kept(len(values), 1 - rate) - 1]) for rate in keep_rates}
    return {"auroc": float(roc_auc_score(is_target, values)), **recalls}


@torch.no_grad()
def region_scores(
    model: "SparsePathViTModel", processor: "SparsePathViTImageProcessor", image: np.ndarray
) -> np.ndarray:
    """The prune score of every patch token of a region: (height, width, 3) uint8 -> (rows, columns) float32.

    NaN where there is no token: at the edges of a region that fills its last patches too little.
    """
    inputs = prepare(processor, [image], model.device, mask_background=processor.mask_background)
    # The scores are those before pruning; the ratio only has to switch pruning on.
    with configured(model, prune_ratio=model.config.prune_ratio or 0.5):
        outputs = model(**inputs)
    scores = outputs.prune_scores[0].view(*outputs.grid_sizes[0].tolist())
    return scores.masked_fill(~inputs["patch_mask"][0], torch.nan).cpu().numpy()


def measure_agreement(
    dataset: RoiDataset,
    model: "SparsePathViTModel",
    processor: "SparsePathViTImageProcessor",
    indices: Sequence[int] | None = None,
    seed: int = 0,
) -> tuple[list[dict[str, Any]], list[Problem]]:
    """The agreement of every order with every target in every region.

    Args:
        dataset: PANDA regions, see `scripts/prepare_panda.py`; the masks lie beside the slides.
        model: bare encoder in evaluation mode; it prunes where its configuration says.
        processor: its image processor.
        indices: which regions; None takes all.
        seed: of the random order.

    Returns:
        One row per region, target and order, and why regions or targets were left out.
    """
    rows: list[dict[str, Any]] = []
    problems: list[Problem] = []
    chosen = range(len(dataset)) if indices is None else indices
    for index in tqdm(chosen, desc="regions", unit="region"):
        roi = dataset.rois[index]
        try:
            labels = annotation_of(dataset, roi)
            image = dataset.read(index)
        except (LabelMaskError, SlideError) as error:
            problems.append(Problem("unusable_mask_or_slide", roi.roi_id, str(error)))
            continue
        provider = roi.attributes["provider"]
        tokens = token_labels(labels, provider, model.config.patch_size, image.shape[:2])
        values = {"score": region_scores(model, processor, image)}
        values["inverse"] = -values["score"]
        digest = int(hashlib.sha256(roi.roi_id.encode()).hexdigest()[:8], 16)
        values["random"] = np.random.default_rng([seed, digest]).random(values["score"].shape)
        values["haematoxylin"] = haematoxylin(image, model.config.patch_size)
        is_counted = tokens.is_tissue & ~np.isnan(values["score"])
        for target, is_target in tokens.is_target.items():
            on_tissue = is_target[is_counted]
            if not on_tissue.any() or on_tissue.all():
                what = "no" if not on_tissue.any() else "nothing but"
                problems.append(Problem(f"one_kind_of_{target}", roi.roi_id, f"its tissue holds {what} {target}"))
                continue
            described = {"roi_id": roi.roi_id, "slide_id": roi.slide_id, "provider": provider, "target": target}
            described |= {"tissue_tokens": on_tissue.size, "target_share": float(on_tissue.mean())}
            rows += [described | {"order": order} | agreement(values[order][is_counted], on_tissue) for order in ORDERS]
    return rows, problems


def annotation_of(dataset: RoiDataset, roi: Roi) -> np.ndarray:
    """The mask's labels of a region, (height, width) uint8 at level 0.

    Raises:
        LabelMaskError: the mask is missing, damaged, or has another table of labels.
    """
    provider = roi.attributes.get("provider")
    if provider not in MASK_LABELS:
        raise LabelMaskError(f"{roi.roi_id} is of {provider or 'no'} provider, whose mask labels are not known.")
    with Slide(dataset.root / roi.file) as slide:
        scale = slide.scale(roi.mpp)
    path = dataset.root / "train_label_masks" / f"{roi.slide_id}_mask.tiff"
    with LabelMask(path, MASK_LABELS[provider]) as mask:
        width, height = (
            min(round(side * step), limit - start)
            for side, step, limit, start in zip(
                (roi.width, roi.height), scale, mask.levels[0], (roi.x, roi.y), strict=True
            )
        )
        return mask.read(roi.x, roi.y, width, height)


def summarise_agreement(rows: Sequence[Mapping[str, Any]], samples: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """Means over regions with 95 % intervals over slides, per centre and for all together.

    Args:
        rows: of `measure_agreement`.
        samples: of the bootstrap.
        seed: of the bootstrap.
    """
    metrics = ["auroc", *(f"recall_at_{rate:g}" for rate in KEEP_RATES)]
    summary = []
    for provider in (*sorted({row["provider"] for row in rows}), "all"):
        for target in TARGETS:
            for order in ORDERS:
                found = [
                    row
                    for row in rows
                    if row["order"] == order and row["target"] == target and provider in (row["provider"], "all")
                ]
                if not found:
                    continue
                slides = sorted({row["slide_id"] for row in found})
                line: dict[str, Any] = {"provider": provider, "target": target, "order": order}
                line |= {"regions": len(found), "slides": len(slides)}
                values = np.array([[row[name] for name in metrics] for row in found])
                of_slide = [np.flatnonzero([row["slide_id"] == slide for row in found]) for slide in slides]
                line |= dict(zip(metrics, values.mean(axis=0).tolist(), strict=True))
                if len(slides) > 1:

                    def resampled(
                        drawn: np.ndarray, values: np.ndarray = values, of_slide: list[np.ndarray] = of_slide
                    ) -> np.ndarray:
                        return values[np.concatenate([of_slide[number] for number in drawn])].mean(axis=0)

                    _, low, high = bootstrap_interval(resampled, len(slides), samples, seed=seed)
                    line |= {f"{name}_low": float(value) for name, value in zip(metrics, low, strict=True)}
                    line |= {f"{name}_high": float(value) for name, value in zip(metrics, high, strict=True)}
                summary.append(line)
    return summary
