# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""One region through one model, dense, sparse, and sparse with pruning: a table, features and two pictures."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save
from tqdm import tqdm
from transformers.utils import logging

from ..checkpoints import tiny_checkpoint
from ..model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
from ..model.modeling_outputs_sparsepath_vit import SparsePathViTModelOutput
from ..model.modeling_sparsepath_vit import SparsePathViTModel
from ..runtime.atomic_files import atomic_path, make_folder
from ..runtime.compute import faster_dtype, torch_device
from ..runtime.cost import mean_keys_per_query, token_grid_of_size
from ..runtime.figures import block_pattern_figure, prune_map_figure, save_image
from ..runtime.load_model import load_model
from ..runtime.measure import measured
from .images import bundled_image, read_image

logger = logging.get_logger(__name__)

RECOMMENDED_PRUNE_RATIO = 0.6
PROBED_QUERIES = 256
CROP_SECONDS = 2.5


@dataclasses.dataclass(frozen=True)
class DemoRow:
    """One line of the demo's table.

    Attributes:
        size: (height, width) in pixels.
        variant: "dense", "sparse" or "sparse + pruned"; "sparse, whole layers" where no layer ran strip by strip.
        tokens: patch tokens before the first and after the last layer.
        keys_per_query: on average, before pruning.
        seconds: measured, or predicted where `was_run` is False.
        peak_bytes: as `runtime.measure` defines it; 0 where not run.
        cosine: of the CLS token to the dense one at that size; `None` where dense was not run.
        was_run: False for a dense run that would have taken too long.
    """

    size: tuple[int, int]
    variant: str
    tokens: tuple[int, int]
    keys_per_query: float
    seconds: float
    peak_bytes: int
    cosine: float | None
    was_run: bool = True


@dataclasses.dataclass(frozen=True)
class DemoReport:
    """What the demo measured and wrote.

    Attributes:
        model: its name, and whether it is trained.
        rows: of the table.
        files: written, in the order to look at them.
    """

    model: str
    rows: list[DemoRow]
    files: list[Path]


def run_demo(
    output_dir: Path,
    *,
    image_file: Path | None = None,
    model_source: str | None = None,
    size: int = 3430,
    dense_budget: float = 30.0,
    device: str | None = None,
) -> DemoReport:
    """Runs one region dense (only where it finishes within the budget), sparse, and sparse with pruning.

    Layers run strip by strip; beside it stands a run of whole layers, for its peak memory.

    Args:
        output_dir: where features and pictures go.
        image_file: any image Pillow reads, cropped to `size` around its centre; scikit-image's bundled
            immunohistochemistry image, tiled by reflection, by default.
        model_source: a checkpoint (folder or Hub id); the trained tiny ViT that comes with the
            package by default.
        size: pixels of the region's side.
        dense_budget: seconds the dense run may take, as predicted from a probe.
        device: "cuda" where there is one, by default.
    """
    make_folder(output_dir)
    device = torch_device(device)
    model, processor, name = _load(model_source, device)
    image = _load_region(image_file, size)
    strips = {"tokens_per_strip": model.config.tokens_per_strip}
    sparse_settings = {"window_size": model.config.window_size or 8, "prune_ratio": 0.0, **strips}
    pruned_settings = {**sparse_settings, "prune_ratio": model.config.prune_ratio or RECOMMENDED_PRUNE_RATIO}
    whole_settings = {**sparse_settings, "tokens_per_strip": 0}
    with tqdm(total=4, desc="demo", unit="run") as progress:
        inputs = _process(processor, image, device)
        sparse_row, sparse = _run(model, inputs, image, "sparse", sparse_settings, progress)
        pruned_row, pruned = _run(model, inputs, image, "sparse + pruned", pruned_settings, progress)
        whole_row, whole = _run(model, inputs, image, "sparse, whole layers", whole_settings, progress)
        dense_row, dense = _dense_if_affordable(model, inputs, image, sparse_row, dense_budget, progress)
        rows = [dense_row, sparse_row, whole_row, pruned_row]
        rows = _with_cosines(rows, [dense, sparse, whole, pruned])
        if dense is None:
            crop = _crop_center(image, _affordable_size(dense_row, model.config.patch_size))
            progress.total += 3
            inputs = _process(processor, crop, device)
            variants = (("dense", {"window_size": None, "prune_ratio": 0.0}), ("sparse", sparse_settings))
            variants = (*variants, ("sparse + pruned", pruned_settings))
            runs = [_run(model, inputs, crop, variant, settings, progress) for variant, settings in variants]
            rows += _with_cosines([row for row, _ in runs], [outputs for _, outputs in runs])
    return DemoReport(name, rows, _write(output_dir, image, pruned))


def _load(source: str | None, device: torch.device) -> tuple[SparsePathViTModel, SparsePathViTImageProcessor, str]:
    """Model in the dtype that is faster on this machine, its processor, and what to call it."""
    dtype = faster_dtype(device)
    name = source or "sparsepath-vit-tiny, trained on 89 tissue images for demonstration, no foundation model"
    source = source or str(tiny_checkpoint())
    model, processor = load_model(source, device, dtype)
    return model, processor, f"{name} ({dtype}, {device})"


def _load_region(image_file: Path | None, size: int) -> Image.Image:
    if image_file is None:
        tissue = np.asarray(bundled_image())  # (512, 512, 3)
        missing = [max(0, size - side) for side in tissue.shape[:2]]
        tissue = np.pad(tissue, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")
        return _crop_center(Image.fromarray(tissue), size)
    return _crop_center(read_image(image_file), size)


def _crop_center(image: Image.Image, size: int) -> Image.Image:
    width, height = min(size, image.width), min(size, image.height)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _process(processor: SparsePathViTImageProcessor, image: Image.Image, device: str) -> dict[str, torch.Tensor]:
    return dict(processor(image, return_tensors="pt").to(device))


def _run(
    model: SparsePathViTModel,
    inputs: dict[str, torch.Tensor],
    image: Image.Image,
    variant: str,
    settings: dict[str, int | float | None],
    progress: tqdm,
) -> tuple[DemoRow, SparsePathViTModelOutput]:
    """One measured forward with the given window size and prune ratio."""
    progress.set_postfix_str(f"{image.height} x {image.width} px {variant}")
    for field, value in settings.items():
        setattr(model.config, field, value)
    with torch.inference_mode(), measured(model.device) as measurement:
        outputs = model(**inputs)
    progress.update()
    grid = token_grid_of_size(model.config, image.height, image.width)
    row = DemoRow(
        size=(image.height, image.width),
        variant=variant,
        tokens=(sum(grid.counts), outputs.patch_positions.shape[1]),
        keys_per_query=mean_keys_per_query(grid),
        seconds=measurement.seconds,
        peak_bytes=measurement.peak_bytes,
        cosine=None,
    )
    return row, outputs


def _dense_if_affordable(
    model: SparsePathViTModel,
    inputs: dict[str, torch.Tensor],
    image: Image.Image,
    sparse_row: DemoRow,
    budget: float,
    progress: tqdm,
) -> tuple[DemoRow, SparsePathViTModelOutput | None]:
    """The dense run, or its row with the predicted time where that exceeds the budget."""
    predicted = sparse_row.seconds + _probe_dense_attention(model, sparse_row.tokens[0])
    if predicted <= budget:
        return _run(model, inputs, image, "dense", {"window_size": None, "prune_ratio": 0.0}, progress)
    progress.update()
    tokens = sparse_row.tokens[0]
    keys = float(tokens + model.config.num_global_tokens)
    return DemoRow(sparse_row.size, "dense", (tokens, tokens), keys, predicted, 0, None, was_run=False), None


def _probe_dense_attention(model: SparsePathViTModel, tokens: int) -> float:
    """Seconds all layers of dense attention would take, from some of its queries against all of its keys."""
    shape = (1, model.config.num_attention_heads, tokens, model.config.head_dim)
    key = torch.randn(shape, device=model.device, dtype=model.dtype)
    query = key[:, :, :PROBED_QUERIES]
    with torch.inference_mode(), measured(model.device) as measurement:
        torch.nn.functional.scaled_dot_product_attention(query, key, key)
    return measurement.seconds * tokens / query.shape[2] * model.config.num_hidden_layers


def _affordable_size(dense_row: DemoRow, patch_size: int) -> int:
    """Side of a square on which dense attention takes a few seconds: its cost grows with the side's fourth power."""
    side = min(dense_row.size) * (CROP_SECONDS / dense_row.seconds) ** 0.25
    return max(patch_size, int(side) // patch_size * patch_size)


def _with_cosines(rows: list[DemoRow], outputs: list[SparsePathViTModelOutput | None]) -> list[DemoRow]:
    """Fills in the CLS cosines to the first output, the dense one."""
    if outputs[0] is None:
        return rows
    features = [output.last_hidden_state[0, 0].float() for output in outputs]
    cosines = [torch.nn.functional.cosine_similarity(feature, features[0], dim=0).item() for feature in features]
    return [dataclasses.replace(row, cosine=cosine) for row, cosine in zip(rows, cosines, strict=True)]


def _write(output_dir: Path, image: Image.Image, outputs: SparsePathViTModelOutput) -> list[Path]:
    """Features as safetensors, the prune map, and the pattern; each renamed into place when complete."""
    names = ("pooler_output", "last_hidden_state", "patch_positions", "prune_scores", "grid_sizes")
    features = output_dir / "features.safetensors"
    with atomic_path(features) as temporary:
        temporary.write_bytes(save({name: outputs[name].cpu().contiguous() for name in names}))
    prune_map = output_dir / "prune_map.png"
    figure = prune_map_figure(
        image, outputs.prune_scores[0].cpu(), outputs.patch_positions[0].cpu(), outputs.grid_sizes[0].tolist()
    )
    save_image(figure, prune_map)
    pattern = output_dir / "block_pattern.png"
    save_image(block_pattern_figure(), pattern)
    return [prune_map, pattern, features]
