# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Time and peak memory of a piece of work, and the machine they were measured on."""

import math
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import transformers

from ..version import __version__

SAMPLING_INTERVAL_SECONDS = 0.005
CALLING_SECONDS = 0.1  # how long short work is called in a row, at least


@dataclass
class Measurement:
    """Filled in when the measured block ends.

    Attributes:
        seconds: wall time.
        peak_bytes: on CUDA the allocator's peak, otherwise the process's largest resident size, weights included.
    """

    seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def measured(device: torch.device | str = "cpu") -> Iterator[Measurement]:
    """Measures the enclosed block; resident memory is sampled every few milliseconds.

    Args:
        device: where the work runs.
    """
    device = torch.device(device)
    result = Measurement()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        yield result
        torch.cuda.synchronize(device)
        result.seconds = time.perf_counter() - start
        result.peak_bytes = torch.cuda.max_memory_allocated(device)
        return
    process, finished = psutil.Process(), threading.Event()
    result.peak_bytes = process.memory_info().rss

    def sample() -> None:
        while not finished.wait(SAMPLING_INTERVAL_SECONDS):
            result.peak_bytes = max(result.peak_bytes, process.memory_info().rss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    start = time.perf_counter()
    try:
        yield result
    finally:
        result.seconds = time.perf_counter() - start
        finished.set()
        sampler.join()


def process_peak_bytes() -> int:
    """Largest resident size of this process so far, everything included."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def repeatedly_measured(
    call: Callable[[], object], device: torch.device | str, repeats: int
) -> tuple[list[float], int]:
    """Times a short piece of work, called once before to compile and once to see how long it takes.

    Args:
        call: the work; called so often in a row that launching one hides behind the one before, as in a model.
        device: where it runs.
        repeats: measurements.

    Returns:
        Seconds of one call, once per measurement, and the peak memory in bytes.
    """
    call()
    with measured(device) as warm_up:
        call()
    num_calls = max(1, math.ceil(CALLING_SECONDS / warm_up.seconds))
    seconds, peak = [], warm_up.peak_bytes
    for _ in range(repeats):
        with measured(device) as measurement:
            for _ in range(num_calls):
                call()
        seconds.append(measurement.seconds / num_calls)
        peak = max(peak, measurement.peak_bytes)
    return seconds, peak


def matrix_flops_per_second(
    rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device | str, repeats: int = 3
) -> float:
    """What the machine reaches in a matrix product of (rows, inner) and (inner, columns): the ceiling of a network.

    Args:
        rows, inner, columns: sizes of the product.
        dtype: of both factors.
        device: where it runs.
        repeats: measurements; the median counts.
    """
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    with torch.inference_mode():
        seconds, _ = repeatedly_measured(lambda: torch.nn.functional.linear(left, right), device, repeats)
    return 2.0 * rows * inner * columns / statistics.median(seconds)


def describe_seconds(seconds: Sequence[float]) -> dict[str, float | int]:
    """Median and quartiles of repeated measurements, as every recorded timing carries them."""
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [*seconds] * 3
    return {
        "seconds_median": round(statistics.median(seconds), 6),
        "seconds_lower_quartile": round(quartiles[0], 6),
        "seconds_upper_quartile": round(quartiles[2], 6),
        "repeats": len(seconds),
    }


def describe_run(device: torch.device | str = "cpu") -> dict[str, str]:
    """Commit, versions and machine, as every recorded measurement carries them."""
    device = torch.device(device)
    return {
        "commit": _commit(),
        "sparsepath_vit": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": str(torch.get_num_threads()),
    }


def _commit() -> str:
    """The checkout's commit, marked where the tree differs from it; "unknown" outside a checkout."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def _processor() -> str:
    """Model name of the processor, with its matrix instructions where the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", "").split()
    features = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags]
    return f"{fields.get('model name', platform.machine())} ({features[0] if features else 'no AVX'})"
