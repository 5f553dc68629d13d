# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What the steps of the acceptance on a GPU take and give: sizes, full or to rehearse, and findings."""

import dataclasses
import functools
import traceback
from collections.abc import Callable, Mapping

import torch

from sparsepath_vit.runtime.measure import matrix_flops_per_second


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the final table.

    Attributes:
        name: what was measured.
        measured: the result, for a reader.
        target: what it should be; empty where there is none.
        passed: whether it is; None where there is no target.
        rows: for the step's CSV.
    """

    name: str
    measured: str
    target: str = ""
    passed: bool | None = None
    rows: tuple[dict[str, object], ...] = ()


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large the steps are.

    Attributes:
        is_rehearsal: on the CPU, with interpreted kernels.
        sizes: pixels of a square image, of the whole models.
        tokens: patch tokens, of attention alone.
        windows: tokens per block side, of attention alone.
        context_tokens: of stratified attention.
        heads: attention heads.
        head_dim: width of each.
        repeats: measurements of each; the median counts.
        forward_repeats, backward_repeats: of the bitwise comparison.
        workers: processes that compile and check kernels at once; 0 checks in this one.
        architectures: known models, random weights.
        layers: of each model; None for all.
        tile_batches: images of a batch of 224 px tiles.
        matrix_size: rows and columns of the product that says what the machine can do.
        copied_bytes: of the copy that does the same.
        published: patch tokens, window size, radius and head_dim of the problem that NATTEN publishes times of.
        earlier: what a run that was stopped in this step has measured, by name; it is not measured again.
    """

    is_rehearsal: bool = False
    sizes: tuple[int, ...] = (224, 1400, 3430, 13720)
    tokens: tuple[int, ...] = (10_000, 60_025, 240_100, 1_000_000)
    windows: tuple[int, ...] = (8, 16, 64)
    context_tokens: int = 1024
    heads: int = 24
    head_dim: int = 64
    repeats: int = 3
    forward_repeats: int = 1000
    backward_repeats: int = 100
    workers: int = 12
    architectures: tuple[str, ...] = ("uni2-h", "vit-small-14-reg8")
    layers: int | None = None
    tile_batches: tuple[int, ...] = (64, 128, 256, 512)
    matrix_size: int = 8192
    copied_bytes: int = 2**32
    published: tuple[int, int, int, int] = (65_536, 16, 2, 128)
    earlier: Mapping[str, Finding] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def device(self) -> str:
        """Where everything runs."""
        return "cpu" if self.is_rehearsal else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of what is timed; Triton's interpreter computes bfloat16 wrongly."""
        return torch.float32 if self.is_rehearsal else torch.bfloat16


REHEARSAL = Scale(
    is_rehearsal=True,
    sizes=(56, 224),
    tokens=(49,),
    windows=(4,),
    context_tokens=6,
    heads=2,
    head_dim=16,
    repeats=1,
    forward_repeats=2,
    backward_repeats=2,
    workers=0,
    architectures=("vit-tiny-14-reg4", "vit-tiny-14-reg4"),
    layers=2,
    tile_batches=(1, 2),
    matrix_size=64,
    copied_bytes=2**16,
    published=(100, 2, 2, 16),
)


@functools.cache
def matrix_rate(scale: Scale) -> float:
    """Floating point operations a second of a large matrix product, the ceiling of everything here."""
    return matrix_flops_per_second(*[scale.matrix_size] * 3, scale.dtype, scale.device)


def finding_of(name: str, measure: Callable[[], Finding], scale: Scale) -> Finding:
    """The finding of that name, an earlier run's where it has one.

    Where measuring fails it says so, and the step goes on.
    """
    if name in scale.earlier:
        return scale.earlier[name]
    try:
        return measure()
    except Exception as error:
        traceback.print_exc()
        return Finding(name, f"{type(error).__name__}: {str(error).strip()[:200]}", "runs", False)


def wait(scale: Scale) -> None:
    """Returns when the device has done all it was asked for."""
    if scale.device == "cuda":
        torch.cuda.synchronize()
