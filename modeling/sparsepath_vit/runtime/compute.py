# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Where a model runs on slides and in which numbers, from what a user wrote."""

import functools
import time

import torch

DTYPES = ("float32", "bfloat16", "float16")


def torch_device(device: str | None) -> torch.device:
    """The device of that name; by default CUDA where there is one, else the CPU.

    Raises:
        ValueError: there is no such device, here or at all.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device={device!r} is unknown: it takes cpu, cuda, or one of several GPUs (cuda:1)."
        ) from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device!r} is not there: torch finds {torch.cuda.device_count()} CUDA devices. Use cpu, or see "
            "`sparsepath doctor`."
        )
    return chosen


def weight_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The type of the weights by its name; by default the one that `device` is faster in (`faster_dtype`).

    Raises:
        ValueError: an unknown name.
    """
    if dtype is None:
        return faster_dtype(device)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown: it takes {', '.join(DTYPES)}.")
    return getattr(torch, dtype)


def faster_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where this machine multiplies matrices faster in it than in float32; always on an accelerator.

    A CPU with instructions for bfloat16 is about four times as fast in it, one without them several times as slow.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if _matrix_seconds(torch.bfloat16) < _matrix_seconds(torch.float32) else torch.float32


def describe_dtypes(device: str | torch.device) -> str:
    """Which type `faster_dtype` chooses there, and why."""
    chosen = str(faster_dtype(device)).removeprefix("torch.")
    if torch.device(device).type != "cpu":
        return chosen
    ratio = _matrix_seconds(torch.float32) / _matrix_seconds(torch.bfloat16)
    speed = f"{ratio:.1f} times as fast" if ratio >= 1 else f"{1 / ratio:.1f} times as slow"
    return f"{chosen}: a matrix product in bfloat16 is {speed} as one in float32 on this CPU"


@functools.cache
def _matrix_seconds(dtype: torch.dtype) -> float:
    """Seconds of a product of two matrices of 1024 x 1024 on this CPU, the best of four."""
    matrix = torch.ones(1024, 1024, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return min(times)
