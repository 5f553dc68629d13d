# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What embedding a slide will take: tokens and FLOPs counted, time and memory from a two-layer probe."""

import ctypes
import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from transformers import AutoModel

from ..model.configuration_sparsepath_vit import SparsePathViTConfig
from ..model.embeddings import token_grid_of_sizes
from ..model.streamed_layers import may_stream
from ..model.token_grid import TokenGrid
from ..runtime.compute import torch_device, weight_dtype
from ..runtime.cost import forward_flops, tokens_after_pruning
from ..runtime.measure import measured
from .embedder import DEFAULT_MPP, EmbedSettings, default_workers
from .forward import forward_strips, strip_rows
from .image_shares import largest_share
from .opening import slide_to_see_at
from .reader import Slide
from .regions import tissue_regions
from .tissue import TissueMask, find_tissue

PROBE_LAYERS = 2
# Hidden states of this many numbers make the activations of the probe large against what the process holds anyway.
_PROBE_NUMBERS = 6 * 2**20
# Bytes a token that a grid, its tables and its order take beside the hidden states, and those that ranking takes.
_GRID_BYTES = 64
_RANKING_BYTES = 96
# Likewise, drawing context tokens (measured with and without weights of tokens: 74 and 116).
_DRAW_BYTES = 116
_SLIDE_CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        forwards: how many forward passes.
        tokens: tissue tokens of all of them.
        kept_tokens: of these, left after pruning.
        tissue_share: share of the slide's or image's tokens that is tissue.
        flops: floating point operations of all forwards.
        seconds: in the model; reading runs beside it.
        peak_bytes: as `runtime.measure` defines it: on CUDA the device's memory, otherwise the whole process.
        num_processes: that share each image; `seconds` and `peak_bytes` are those of the one with most tokens.
    """

    forwards: int
    tokens: int
    kept_tokens: int
    tissue_share: float
    flops: float
    seconds: float
    peak_bytes: int
    num_processes: int = 1

    def lines(self) -> list[tuple[str, str]]:
        """Names and values as people read them."""
        return [
            ("forward passes", f"{self.forwards:,}"),
            ("tissue tokens", f"{self.tokens:,} ({self.tissue_share:.0%} of all)"),
            ("after pruning", f"{self.kept_tokens:,}"),
            ("TFLOP", f"{self.flops / 1e12:,.1f}"),
            ("time in the model", f"about {self.seconds:,.1f} s"),
            (
                "peak memory" if self.num_processes == 1 else f"peak memory, each of {self.num_processes} processes",
                f"about {self.peak_bytes / 2**30:.2f} GiB",
            ),
        ]


def estimate_for(
    config: SparsePathViTConfig,
    slide: str | os.PathLike[str] | None,
    size: int | None,
    settings: EmbedSettings,
    *,
    slide_mpp: float | None = None,
    tissue_mask: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    processes: int = 1,
) -> Estimate:
    """`estimate_slide` of a file or `estimate_size` of a square, with the defaults of `embed`.

    Raises:
        ValueError: both or neither of `slide` and `size`, an unknown device or dtype, or what several processes cannot
            share.
    """
    if (slide is None) == (size is None):
        raise ValueError("pass either a slide or --size PIXELS, and not both.")
    chosen = torch_device(device)
    number_type = weight_dtype(dtype, chosen)
    if size is not None:
        return estimate_size(config, size, size, chosen, number_type, processes)
    workers = workers or default_workers()
    with slide_to_see_at(slide, slide_mpp, settings.mpp, settings.origin) as opened:
        mpp = DEFAULT_MPP if settings.mpp is None else settings.mpp
        tissue = find_tissue(opened, tissue_mask, classes=settings.annotation_classes)
        return estimate_slide(config, opened, tissue, settings, mpp, chosen, number_type, workers, processes)


def estimate_slide(
    config: SparsePathViTConfig,
    slide: Slide,
    tissue: TissueMask,
    settings: EmbedSettings,
    mpp: float,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    workers: int = 2,
    processes: int = 1,
) -> Estimate:
    """What `embed` will take for one slide with a batch size of one.

    Args:
        config: of the model.
        slide: the slide.
        tissue: its tissue.
        settings: what is taken of the slide.
        mpp: resolution in micrometres per pixel.
        device: where the model will run.
        dtype: of its weights.
        workers: threads that read ahead.
        processes: that share the slide, with `settings.whole_slide`.
    """
    if processes > 1 and not settings.whole_slide:
        raise ValueError(
            f"processes={processes} share one image each: pass --whole-slide, or --size. Regions are dealt out whole, "
            "one process's memory is that of one process."
        )
    patch_size = config.patch_size
    whole = tissue.token_grid(slide, patch_size, mpp)
    if settings.whole_slide:
        grids = [whole]
        pixel_bytes = 2 * strip_rows(whole.shape[1], patch_size) * patch_size**2 * whole.shape[1] * 3
    else:
        regions = tissue_regions(
            slide, tissue, patch_size, settings.region_size, mpp, settings.overlap, settings.minimum_tissue
        )
        grids = [
            tissue.token_grid(slide, patch_size, mpp, region.x, region.y, region.width, region.height)
            for region in regions
        ]
        pixel_bytes = max(region.width * region.height for region in regions) * 3 * (workers + 1)
    pixel_bytes += min(_SLIDE_CACHE_BYTES, 4 * slide.dimensions[0] * slide.dimensions[1])
    run = settings.whole_slide, pixel_bytes, torch.device(device), dtype, processes
    return _estimate(config, grids, float(whole.mean()), *run)


def estimate_size(
    config: SparsePathViTConfig,
    width: int,
    height: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    processes: int = 1,
) -> Estimate:
    """What one image of `width` x `height` pixels will take, all of it tissue, batch size one."""
    grid = np.ones((-(-height // config.patch_size), -(-width // config.patch_size)), dtype=bool)
    return _estimate(config, [grid], 1.0, False, width * height * 3, torch.device(device), dtype, processes)


def _estimate(
    config: SparsePathViTConfig,
    grids: list[np.ndarray],
    tissue_share: float,
    in_strips: bool,
    pixel_bytes: int,
    device: torch.device,
    dtype: torch.dtype,
    processes: int,
) -> Estimate:
    """Sums up the forwards over `grids`; memory is that of the largest."""
    token_grids = [_token_grid(config, grid) for grid in grids if grid.any()]
    tokens = sum(grid.counts[0] for grid in token_grids)
    flops = sum(forward_flops(config, grid) for grid in token_grids)
    largest = max(grids, key=np.count_nonzero)
    probe = _Probe(config, largest, device, dtype, processes)
    pixel_bytes = pixel_bytes if device.type == "cpu" else 0
    if not in_strips:  # the normalised pixels of a whole region stay while the model runs
        pixel_bytes += largest.size * config.patch_size**2 * config.num_channels * 4
    return Estimate(
        forwards=len(token_grids),
        tokens=tokens,
        kept_tokens=sum(tokens_after_pruning(config, grid)[0] for grid in token_grids),
        tissue_share=tissue_share,
        flops=flops,
        seconds=flops * probe.seconds_per_flop() * probe.share.of_image,
        peak_bytes=round(probe.peak_bytes() + pixel_bytes),
        num_processes=processes,
    )


class _Probe:
    """A model of two layers of the same width, run on a part of the tokens.

    Activations do not depend on the depth, and time grows in proportion to the tokens. The part takes whole token rows,
    so that the strips, which set the memory beside the hidden states, have their real width.
    """

    def __init__(
        self,
        config: SparsePathViTConfig,
        present: np.ndarray,
        device: torch.device,
        dtype: torch.dtype,
        processes: int = 1,
    ) -> None:
        self.config, self.device, self.dtype, self.processes = config, device, dtype, processes
        self.share = largest_share(config, _token_grid(config, present), processes, device)
        release_unused(device)
        self.idle_bytes = _held_bytes(device)
        fields = {**config.to_dict(), "num_hidden_layers": PROBE_LAYERS, "prune_ratio": 0.0}
        if processes > 1:
            fields["tokens_per_strip"] = self.share.tokens_of_strip
        shallow = SparsePathViTConfig(**{name: fields[name] for name in fields if name in _ARCHITECTURE})
        shallow._attn_implementation = config._attn_implementation
        self.model = AutoModel.from_config(shallow, dtype=dtype).to(device).eval()
        self.weight_bytes = _weight_bytes(self.model)
        self.present = present
        self.part = _rows_with_tokens(present, max(1024, _PROBE_NUMBERS // config.hidden_size))

    def seconds_per_flop(self) -> float:
        """Wall time per floating point operation, after a first run that warms up."""
        for _ in range(2):
            with measured(self.device) as measurement:
                self._run(self.part)
        return measurement.seconds / forward_flops(self.model.config, _token_grid(self.model.config, self.part))

    def peak_bytes(self) -> float:
        """Peak memory of the full model on all tokens, or on the share of one process, weights included."""
        grid = _token_grid(self.model.config, self.present)
        in_strips = self.processes > 1 or may_stream(self.model.config, grid, self.device)
        activations = self._bytes_in_strips(grid) if in_strips else self._bytes_of_whole_layers(grid.counts[0])
        return self.idle_bytes + self._full_weight_bytes() + activations

    def _bytes_in_strips(self, grid: TokenGrid) -> float:
        """The largest of some moments: a strip beside all tokens, the kept ones gathered beside them, their copies.

        What a strip takes is measured on a part that has as many rows of blocks as a strip and its surroundings.
        """
        config, share, tokens = self.config, self.share, grid.counts[0]
        row = config.hidden_size * self.dtype.itemsize
        part = _rows_with_tokens(self.present, share.tokens_around_strip + 1)
        tokens_of_part = int(part.sum())
        strip = self._activation_bytes(part) - tokens_of_part * row
        held = share.held * row + tokens * _GRID_BYTES  # each process knows where all tokens are
        moments = [held + strip]
        if grid.has_context:  # before the first strip: the logits of CLS and the mean query, then the draw
            moments.append(held + tokens * max(2 * 4 * config.num_attention_heads, _DRAW_BYTES))
        if config.prunes:
            kept = sum(tokens_after_pruning(config, grid)) * share.of_image
            moments.append(held + kept * row + tokens * _RANKING_BYTES)
        return max(moments)

    def _bytes_of_whole_layers(self, tokens: int) -> float:
        """Measured on two sizes, since it grows with the tokens."""
        half = _rows_with_tokens(self.part, max(1, int(self.part.sum()) // 2))
        sizes = [int(part.sum()) for part in (half, self.part)]
        extra = [self._activation_bytes(part) for part in (half, self.part)]
        row = self.config.hidden_size * self.dtype.itemsize
        slope = max((extra[1] - extra[0]) / max(1, sizes[1] - sizes[0]), 4 * row)
        return extra[1] + slope * (tokens - sizes[1])

    def _full_weight_bytes(self) -> int:
        layer = _weight_bytes(self.model.encoder.layers[0])
        return self.weight_bytes + layer * (self.config.num_hidden_layers - PROBE_LAYERS)

    def _activation_bytes(self, part: np.ndarray) -> int:
        release_unused(self.device)
        before = _held_bytes(self.device)
        with measured(self.device) as measurement:
            self._run(part)
        return max(0, measurement.peak_bytes - before)

    def _run(self, part: np.ndarray) -> None:
        forward_strips(self.model, self._strips(part), part, dense=False)

    def _strips(self, part: np.ndarray) -> Iterator[torch.Tensor]:
        rows, columns = part.shape
        patch_size, height = self.config.patch_size, strip_rows(columns, self.config.patch_size)
        for first in range(0, rows, height):
            size = (1, self.config.num_channels, min(height, rows - first) * patch_size, columns * patch_size)
            yield torch.randn(size, device=self.device)


_ARCHITECTURE = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "mlp_type", "qkv_bias"),
    *("use_layerscale", "num_register_tokens", "patch_size", "image_size", "num_channels"),
    *("num_prefix_position_embeddings", "pooling", "window_size", "neighbor_radius", "num_context_tokens"),
    *("prune_ratio", "tokens_per_strip"),
)


def _token_grid(config: SparsePathViTConfig, present: np.ndarray) -> TokenGrid:
    return token_grid_of_sizes(config, [present.shape], torch.from_numpy(present)[None])


def _rows_with_tokens(present: np.ndarray, tokens: int) -> np.ndarray:
    """As many whole token rows, from the first with tissue on, as hold `tokens` of them, or all."""
    counts = present.sum(axis=1).cumsum()
    first = int(np.searchsorted(counts, 1))
    last = int(np.searchsorted(counts, tokens))
    return np.ascontiguousarray(present[first : last + 1])


def _weight_bytes(module: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def _held_bytes(device: torch.device) -> int:
    """Memory in use now, as `measured` counts it."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def release_unused(device: torch.device) -> None:
    """Gives freed memory back, so that it does not hide what the next run needs."""
    gc.collect()
    if device.type == "cpu" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
