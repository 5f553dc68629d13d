# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Accuracy, time and memory over resolutions, with controls: does the gain come from resolution, sparsity or glass?

Each row is one linear probe of frozen features (`tasks.linear_probe`) and one timed region. Rows that a table holds
already are not measured again.
"""

import hashlib
import json
import logging
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from PIL import Image
from tqdm import tqdm

from sparsepath_vit.runtime.configured import configured
from sparsepath_vit.runtime.cost import forward_flops, token_grid_of_size
from sparsepath_vit.runtime.measure import describe_run, measured
from sparsepath_vit.runtime.memory import forward_bytes, free_bytes, is_out_of_memory
from sparsepath_vit.slides.estimate import release_unused
from sparsepath_vit.tasks.classification.features import FeatureSettings, compute_features, model_key
from sparsepath_vit.tasks.classification.linear_probe import probe
from sparsepath_vit.tasks.classification.rois import RoiDataset

from ..results import ResultsTable
from ..variants import pruning_order
from .plan import VARIANTS, SweepRow, SweepSettings, plan

if TYPE_CHECKING:
    from sparsepath_vit.model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
    from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel

logger = logging.getLogger(__name__)

OK, OUT_OF_MEMORY, FAILED = "ok", "out of memory", "failed"
KEYS = ("checkpoint", "data", "attention", *SweepRow.__dataclass_fields__)
METRIC_COLUMNS = ("accuracy", "accuracy_low", "accuracy_high", "balanced_accuracy", "f1_macro", "quadratic_kappa")
VALUES = (
    *("status", *METRIC_COLUMNS, "num_items", "num_groups", "num_train", "num_classes"),
    *("tokens", "tflop", "seconds", "peak_growth_gib", "predicted_gib", "note"),
    *("commit", "sparsepath_vit", "torch", "transformers", "python", "machine", "threads"),
)


def run_sweep(
    dataset: RoiDataset,
    model: "SparsePathViTModel",
    processor: "SparsePathViTImageProcessor",
    settings: SweepSettings,
    table: ResultsTable,
    cache_dir: str,
) -> list[dict[str, str]]:
    """Measures the rows that the table lacks; memory that runs out is marked, and the sweep goes on.

    Args:
        dataset: labelled regions.
        model: bare encoder in evaluation mode.
        processor: its image processor.
        settings: of the sweep.
        table: with the columns `KEYS` and `VALUES`.
        cache_dir: of the features.

    Returns:
        The rows of this checkpoint, these data and these settings, measured now or before.

    Raises:
        ValueError: a size larger than the regions, or settings that the model cannot have.
    """
    largest = max(*settings.sizes, settings.ablation_size or 0)
    smallest_roi = min(max(roi.width, roi.height) for roi in dataset.rois)
    if largest > smallest_roi:
        raise ValueError(
            f"size {largest} is larger than the regions, the smallest of which has {smallest_roi} px: enlarging adds "
            "no detail. Choose sizes up to that, or prepare larger regions."
        )
    rows = plan(settings, model.config.num_hidden_layers, model.config.prune_after_layer)
    identity = _identity(dataset, model, processor, settings)
    described = describe_run(model.device)
    for row in tqdm(rows, desc="sweep", unit="row"):
        key = identity | asdict(row)
        if not table.has(key):
            table.add(key | described | _measure(row, dataset, model, processor, settings, cache_dir))
    return [found for row in rows if (found := table.find(identity | asdict(row))) is not None]


def _identity(
    dataset: RoiDataset,
    model: "SparsePathViTModel",
    processor: "SparsePathViTImageProcessor",
    settings: SweepSettings,
) -> dict[str, str]:
    """Names of checkpoint and task, so that rows of others in the same table are never taken for these."""
    rois = [(roi.roi_id, roi.label, roi.split) for roi in dataset.rois]
    probe_settings = {name: value for name, value in asdict(settings.probe).items() if name != "features"}
    content = [rois, probe_settings, settings.tile_size]
    return {
        "checkpoint": model_key(model, processor, FeatureSettings())[:12],
        "data": f"{dataset.task}-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]}",
        "attention": model.config._attn_implementation,
    }


def _measure(
    row: SweepRow,
    dataset: RoiDataset,
    model: "SparsePathViTModel",
    processor: "SparsePathViTImageProcessor",
    settings: SweepSettings,
    cache_dir: str,
) -> dict[str, Any]:
    """The values of one row."""
    shown, features = _shown(row, dataset, settings)
    with _as_in(row, model):
        values = _predicted(row, dataset, model, settings)
        free = free_bytes(model.device, settings.memory_limit)
        if free is not None and values["predicted_gib"] * 2**30 > free:
            note = f"not run: needs about {values['predicted_gib']:.1f} GiB, {free / 2**30:.1f} GiB are free"
            logger.warning("%s: %s", row, note)
            return values | {"status": OUT_OF_MEMORY, "note": note}
        try:
            values |= _cost(shown, model, processor, features, settings.repeats)
            result = probe(shown, model, processor, replace(settings.probe, features=features), cache_dir)
        except (MemoryError, RuntimeError, ValueError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            status = OUT_OF_MEMORY if is_out_of_memory(error) else FAILED
            logger.warning("%s: %s: %s", row, status, error)
            return values | {"status": status, "note": " ".join(str(error).split())[:300]}
    metrics = {name: result.metrics.get(name) for name in (*METRIC_COLUMNS, "num_items", "num_groups", "num_train")}
    return values | metrics | {"status": OK, "num_classes": len(dataset.label_names)}


def _shown(row: SweepRow, dataset: RoiDataset, settings: SweepSettings) -> tuple[RoiDataset, FeatureSettings]:
    """The regions and how they are shown to the model."""
    how, features = row.how, settings.probe.features
    variant = "" if how.order == "score" else f"{how.order} pruning, seed {settings.probe.seed}"
    features = replace(
        features,
        size=row.size,
        tile_size=settings.tile_size if how.tiled else None,
        mask_background=how.drops_background,
        variant=variant,
    )
    if row.view != "resolution":
        return dataset, replace(features, view=row.view)
    limited = LimitedDetail(**{name: getattr(dataset, name) for name in dataset.__dataclass_fields__}, detail=row.size)
    return limited, replace(features, size=max(settings.sizes), view="field_of_view")


@dataclass(frozen=True)
class LimitedDetail(RoiDataset):
    """The same regions in the same number of pixels, with less detail: reduced to `detail` pixels and enlarged again.

    Attributes:
        detail: pixels of the longer side in which the whole region is shown before it is enlarged.
    """

    detail: int = 0

    def read(self, index: int, size: int | None = None, view: str = "field_of_view") -> np.ndarray:
        """As `RoiDataset.read`."""
        roi = self.rois[index]
        longer = max(roi.width, roi.height)
        full = longer if size is None else size
        if self.detail >= full:
            return super().read(index, size, view)
        reduced = Image.fromarray(super().read(index, self.detail, view))
        shape = [max(1, round(side * full / longer)) for side in (roi.width, roi.height)]
        return np.asarray(reduced.resize(shape, Image.Resampling.BICUBIC))

    def content_key(self, index: int) -> str:
        """As `RoiDataset.content_key`, and the detail."""
        return hashlib.sha256(f"{super().content_key(index)} detail {self.detail}".encode()).hexdigest()


@dataclass(frozen=True)
class _HeldRegion(RoiDataset):
    """One region whose pixels are in memory: reading is not what is timed."""

    pixels: np.ndarray | None = None

    def read(self, index: int, size: int | None = None, view: str = "field_of_view") -> np.ndarray:
        return self.pixels


@contextmanager
def _as_in(row: SweepRow, model: "SparsePathViTModel") -> Iterator[None]:
    """The model with the row's sparsity."""
    settings = {"prune_after_layer": row.prune_after_layer} if row.prune_ratio else {}
    with ExitStack() as stack:
        stack.enter_context(configured(model, **settings, window_size=row.window_size, prune_ratio=row.prune_ratio))
        stack.enter_context(pruning_order(model, row.how.order))
        yield


def _predicted(
    row: SweepRow, dataset: RoiDataset, model: "SparsePathViTModel", settings: SweepSettings
) -> dict[str, Any]:
    """Tokens, arithmetic and memory of the first region, counted and not measured."""
    roi = dataset.rois[0]
    size = max(settings.sizes) if row.view == "resolution" else row.size
    scale = size / max(roi.width, roi.height)
    shown = [max(1, round(side * scale)) for side in (roi.height, roi.width)]
    if row.view == "pixels":
        shown = [min(side, size) for side in (roi.height, roi.width)]
    grid = token_grid_of_size(model.config, *shown)
    in_one_forward = [min(side, settings.tile_size) for side in shown] if row.how.tiled else shown
    batch_size = settings.probe.features.batch_size
    needed = forward_bytes(model.config, tuple(in_one_forward), model.dtype, batch_size)
    predicted: dict[str, Any] = {"tokens": sum(grid.counts), "predicted_gib": needed / 2**30}
    if not row.how.tiled:  # the tiles' attention is not that of one grid
        predicted["tflop"] = forward_flops(model.config, grid) / 1e12
    return predicted


def _cost(
    dataset: RoiDataset,
    model: "SparsePathViTModel",
    processor: "SparsePathViTImageProcessor",
    features: FeatureSettings,
    repeats: int,
) -> dict[str, Any]:
    """Median seconds and growth of memory of the first region, from its pixels to its features."""
    if not repeats:
        return {}
    pixels = dataset.read(0, features.size, features.view)
    held = _HeldRegion((dataset.rois[0],), dataset.label_names, dataset.task, dataset.root, pixels=pixels)
    seconds, growth = [], 0
    for repeat in range(repeats + 1):
        release_unused(model.device)
        before = _held_bytes(model.device)
        with measured(model.device) as measurement:
            compute_features(held, [0], model, processor, features)
        growth = max(growth, measurement.peak_bytes - before)
        if repeat:
            seconds.append(measurement.seconds)
    return {"seconds": statistics.median(seconds), "peak_growth_gib": growth / 2**30}


def _held_bytes(device: torch.device) -> int:
    """Memory in use now, as `measured` counts it."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def resolution_shares(rows: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """Which part of the gain from the smallest to the largest size comes from resolution, which from more tokens.

    The gain at a fixed field of view mixes both. At a fixed number of tokens (view "resolution") only detail is added;
    what is left of the gain comes from the larger number of tokens.

    Args:
        rows: of `run_sweep`.

    Returns:
        One row per variant that has all the points: accuracies, `gain`, `from_resolution`, `from_tokens`, and
        `gain_of_wider_view`, the gain at fixed resolution and growing field of view (view "pixels"), if there.
    """
    accuracy = {
        (row["variant"], row["view"], int(row["size"])): float(row["accuracy"])
        for row in rows
        if row["part"] == "resolution" and row["status"] == OK
    }
    sizes = sorted({size for _, _, size in accuracy})
    shares = []
    for name in VARIANTS:
        if len(sizes) < 2:
            break
        low, high = ((name, "field_of_view", size) for size in (sizes[0], sizes[-1]))
        blurred, sharp = ((name, "resolution", size) for size in (sizes[0], sizes[-1]))
        if not {low, high, blurred, sharp} <= set(accuracy):
            continue
        share = {"variant": name, "smallest": sizes[0], "largest": sizes[-1]}
        share |= {"accuracy_smallest": accuracy[low], "accuracy_largest": accuracy[high]}
        share["gain"] = accuracy[high] - accuracy[low]
        share["from_resolution"] = accuracy[sharp] - accuracy[blurred]
        share["from_tokens"] = share["gain"] - share["from_resolution"]
        middle, whole = ((name, "pixels", size) for size in (sizes[0], sizes[-1]))
        wider = {middle, whole} <= set(accuracy)
        share["gain_of_wider_view"] = accuracy[whole] - accuracy[middle] if wider else None
        shares.append(share)
    return shares
