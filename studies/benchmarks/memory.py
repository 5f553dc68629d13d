# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Peak memory of one forward on a CPU, beside what cannot be smaller: weights, pixels and hidden states.

Each case runs in a process of its own: what one has freed would hide what the next one takes.
"""

import dataclasses
import multiprocessing
import operator
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from tempfile import TemporaryDirectory

import psutil
import torch
from torch import distributed
from tqdm import tqdm

from sparsepath_vit.conversion import architecture
from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel
from sparsepath_vit.runtime.measure import describe_run, measured, process_peak_bytes


@dataclasses.dataclass(frozen=True)
class MemoryCase:
    """One forward.

    Attributes:
        architecture: name of a known model; its weights are random.
        num_layers: how many of its layers; 0 for all.
        size: pixels of a square image, of uint8.
        dtype: of the weights, "float32" or "bfloat16".
        prune_ratio: share of the patch tokens removed.
        prune_after_layer: counted from 1.
        num_context_tokens: of the configuration; 0 for block-local attention.
        tokens_per_strip: of the configuration; 0 for whole layers, `None` for the default.
        num_threads: of the CPU, in each process.
        num_processes: that share the image; what counts is the largest of them.
    """

    architecture: str
    num_layers: int
    size: int
    dtype: str
    prune_ratio: float
    prune_after_layer: int
    num_context_tokens: int
    tokens_per_strip: int | None
    num_threads: int
    num_processes: int = 1


def measure_memory(cases: Sequence[MemoryCase]) -> Iterator[dict[str, object]]:
    """One row a case, as they are done."""
    context = multiprocessing.get_context("spawn")
    for case in tqdm(cases, desc="memory", unit="forward", leave=False):
        with ProcessPoolExecutor(case.num_processes, mp_context=context) as processes, TemporaryDirectory() as meeting:
            ranks = range(case.num_processes)
            rows = [processes.submit(_measure, case, rank, f"file://{meeting}/processes") for rank in ranks]
            yield max((row.result() for row in rows), key=operator.itemgetter("peak_growth_bytes"))


def _measure(case: MemoryCase, rank: int, meeting: str) -> dict[str, object]:
    torch.set_num_threads(case.num_threads)
    torch.manual_seed(0)  # the same weights in all processes
    model, pixel_values = _model(case), _pixels(case)
    if case.num_processes > 1:
        distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=case.num_processes)
    config, grid = model.config, model.token_grid(pixel_values)
    hidden_bytes = grid.num_tokens * config.hidden_size * model.dtype.itemsize
    share = model.split_over_processes() if case.num_processes > 1 else nullcontext()
    with torch.inference_mode(), share:
        held = psutil.Process().memory_info().rss  # with what connecting the processes takes
        with measured("cpu") as measurement:
            model(pixel_values)
    growth = measurement.peak_bytes - held
    return {
        "architecture": case.architecture,
        "layers": config.num_hidden_layers,
        "size": case.size,
        "tokens": grid.num_tokens,
        "dtype": case.dtype,
        "processes": case.num_processes,
        "prune_ratio": case.prune_ratio,
        "prune_after_layer": case.prune_after_layer,
        "num_context_tokens": case.num_context_tokens,
        "tokens_per_strip": "default" if case.tokens_per_strip is None else case.tokens_per_strip,
        "hidden_states_bytes": hidden_bytes,
        "weights_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "pixels_bytes": pixel_values.nbytes,
        "peak_growth_bytes": growth,
        "times_hidden_states": round(growth / hidden_bytes, 3),
        "process_peak_bytes": process_peak_bytes(),
        **describe_run(),
    }


def _model(case: MemoryCase) -> SparsePathViTModel:
    known = architecture(case.architecture)
    depth = {"num_hidden_layers": case.num_layers} if case.num_layers else {}
    config = known.build_config(
        prune_ratio=case.prune_ratio,
        prune_after_layer=case.prune_after_layer,
        num_context_tokens=case.num_context_tokens,
        tokens_per_strip=case.tokens_per_strip,
        **depth,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, case.dtype))  # weights of another type would leave a hole in the memory
    try:
        return SparsePathViTModel(config).eval()
    finally:
        torch.set_default_dtype(before)


def _pixels(case: MemoryCase) -> torch.Tensor:
    """(1, 3, size, size) uint8."""
    generator = torch.Generator().manual_seed(case.size)
    return torch.randint(256, (1, 3, case.size, case.size), dtype=torch.uint8, generator=generator)
