# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Frozen features of ROIs, computed once: a folder of safetensors shards in which every vector has its content's key.

The key covers everything a vector depends on: weights, architecture, sparsity, preprocessing, how the ROI is shown, and
the ROI's own pixels. What was computed for another data set, or before a run was killed, is found again.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm import tqdm

from ...runtime.atomic_files import atomic_path, remove_stale_files
from ...runtime.model_identity import identity_digest, model_identity
from ...runtime.pixels import prepare
from ...slides.forward import read_ahead
from .rois import RoiDataset

if TYPE_CHECKING:
    from ...model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
    from ...model.modeling_sparsepath_vit import SparsePathViTModel

logger = logging.getLogger(__name__)

_SHARD_ROIS = 256
_KEYS = "keys"


@dataclass(frozen=True)
class FeatureSettings:
    """How each ROI is shown to the model.

    Attributes:
        size: pixels of the longer side; None for the ROI as it is.
        view: "field_of_view" shows the whole ROI in `size` pixels, "pixels" the middle of it at its own resolution.
        tile_size: None for the ROI in one forward; else it is cut into tiles of this many pixels, whose features are
            averaged, weighted by area (tiles at the right and bottom edge are smaller).
        mask_background: whether white patches are left out.
        batch_size: ROIs (or tiles) per forward. No effect on the numbers beyond rounding.
        workers: threads that read ahead.
        variant: name of whatever else was changed about the model, e.g. another pruning order: features of one variant
            are never taken for those of another.
    """

    size: int | None = None
    view: str = "field_of_view"
    tile_size: int | None = None
    mask_background: bool = False
    batch_size: int = 1
    workers: int = 2
    variant: str = ""


def embed_rois(
    dataset: RoiDataset,
    model: "SparsePathViTModel",
    processor: "SparsePathViTImageProcessor",
    settings: FeatureSettings,
    cache_dir: str | os.PathLike[str],
) -> np.ndarray:
    """The pooled features of every ROI, from the cache where they are there, else computed and added to it.

    Under `accelerate launch` the ROIs are shared out over the processes.

    Args:
        dataset: the ROIs.
        model: bare encoder in evaluation mode; the device of its weights is used.
        processor: the model's image processor.
        settings: how each ROI is shown.
        cache_dir: made if missing; any number of models and settings share it.

    Returns:
        (rois, pooled_size) float32.

    Raises:
        ValueError: an ROI that cannot be read or is smaller than `settings.size`; the message names it.
    """
    cache = FeatureCache(Path(cache_dir) / model_key(model, processor, settings))
    known = cache.load()
    keys = [dataset.content_key(index) for index in range(len(dataset))]
    missing = list({key: index for index, key in enumerate(keys) if key not in known}.values())
    state = PartialState()
    state.wait_for_everyone()  # who computes what follows from what is missing: nobody may add before all have looked
    if state.is_main_process:
        logger.info("features: %d of %d ROIs from the cache %s", len(keys) - len(missing), len(keys), cache.folder)
    mine = missing[state.process_index :: state.num_processes]
    progress = tqdm(total=len(mine), desc="features", unit="ROI", disable=not mine or not state.is_local_main_process)
    with progress:
        for first in range(0, len(mine), _SHARD_ROIS):
            shard = mine[first : first + _SHARD_ROIS]
            features = compute_features(dataset, shard, model, processor, settings, progress)
            cache.add([keys[index] for index in shard], features)
    state.wait_for_everyone()
    known = cache.load()
    return np.stack([known[key] for key in keys])


@torch.no_grad()
def compute_features(
    dataset: RoiDataset,
    indices: Sequence[int],
    model: "SparsePathViTModel",
    processor: "SparsePathViTImageProcessor",
    settings: FeatureSettings,
    progress: tqdm | None = None,
) -> np.ndarray:
    """The pooled features of some ROIs, without any cache; (len(indices), pooled_size) float32."""
    features = []
    pixels = read_ahead(lambda index: dataset.read(index, settings.size, settings.view), indices, settings.workers)
    batch_size = settings.batch_size if settings.tile_size is None else 1
    batch: list[np.ndarray] = []
    for number, image in enumerate(pixels, start=1):
        batch.append(image)
        if len(batch) == batch_size or number == len(indices):
            if settings.tile_size is None:
                features.append(pooled(model, processor, batch, settings.mask_background))
            else:
                features.append(_mean_of_tiles(model, processor, image, settings))
            if progress is not None:
                progress.update(len(batch))
            batch = []
    return np.concatenate(features)


@torch.no_grad()
def pooled(
    model: "SparsePathViTModel",
    processor: "SparsePathViTImageProcessor",
    images: Sequence[np.ndarray],
    mask_background: bool = False,
) -> np.ndarray:
    """One forward pass.

    Args:
        model: bare encoder in evaluation mode.
        processor: its image processor.
        images: (height, width, 3) uint8 each; the pixels are taken as they are, not resampled.
        mask_background: whether white patches are left out.

    Returns:
        (images, pooled_size) float32.
    """
    inputs = prepare(processor, images, model.device, config=model.config, mask_background=mask_background)
    return model(**inputs).pooler_output.float().cpu().numpy()


def _mean_of_tiles(
    model: "SparsePathViTModel",
    processor: "SparsePathViTImageProcessor",
    image: np.ndarray,
    settings: FeatureSettings,
) -> np.ndarray:
    """(1, pooled_size): the mean over the image's pixels by tiles; remnants narrower than a patch are no tiles."""
    side, patch_size = settings.tile_size, model.config.patch_size
    height, width = image.shape[:2]
    tops = [top for top in range(0, height, side) if height - top >= patch_size]
    lefts = [left for left in range(0, width, side) if width - left >= patch_size]
    tiles = [image[top : top + side, left : left + side] for top in tops for left in lefts]
    features = [
        pooled(model, processor, tiles[first : first + settings.batch_size], settings.mask_background)
        for first in range(0, len(tiles), settings.batch_size)
    ]
    areas = [tile.shape[0] * tile.shape[1] for tile in tiles]
    return np.average(np.concatenate(features), axis=0, weights=areas)[None].astype(np.float32)


def model_key(model: "SparsePathViTModel", processor: "SparsePathViTImageProcessor", settings: FeatureSettings) -> str:
    """Hash of the model's identity and of the settings that change the numbers."""
    shown = {name: value for name, value in asdict(settings).items() if name not in ("batch_size", "workers")}
    if settings.tile_size is not None:
        shown["mean"] = "weighted by area"  # it once was not
    return identity_digest({"model": model_identity(model, processor), "shown": shown})


class FeatureCache:
    """The vectors of one model and one way to show ROIs to it, by content key.

    Each shard is written under a temporary name and renamed when it is complete; its own name is that of its content.

    Args:
        folder: made if missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        remove_stale_files(folder)

    def load(self) -> dict[str, np.ndarray]:
        """Every vector that is there, by its key; a damaged shard is named, removed, and its vectors are missing."""
        vectors: dict[str, np.ndarray] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="numpy") as shard:
                    vectors |= dict(zip(json.loads(shard.metadata()[_KEYS]), shard.get_tensor("features"), strict=True))
            except FileNotFoundError:
                continue  # another process found it damaged first
            except (SafetensorError, KeyError, ValueError) as error:
                logger.warning("%s is damaged (%s); it is removed and its features are computed again.", path, error)
                path.unlink(missing_ok=True)
        return vectors

    def add(self, keys: Sequence[str], features: np.ndarray) -> None:
        """Writes a shard.

        Args:
            keys: of the vectors.
            features: (len(keys), pooled_size) float32.
        """
        name = hashlib.sha256(" ".join(keys).encode()).hexdigest()[:32]
        path = self.folder / f"{name}.safetensors"
        metadata = {_KEYS: json.dumps(list(keys))}
        with atomic_path(path) as temporary:
            temporary.write_bytes(save({"features": np.ascontiguousarray(features)}, metadata))
