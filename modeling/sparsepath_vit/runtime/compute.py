# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Where a model runs on slides and in which numbers, from what a user wrote."""

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
    """The type of the weights by its name; by default bfloat16 on CUDA, else float32.

    Raises:
        ValueError: an unknown name.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown: it takes {', '.join(DTYPES)}.")
    return getattr(torch, dtype)


def faster_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where this machine multiplies matrices faster in it than in float32; always on an accelerator."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16

    def seconds(dtype: torch.dtype) -> float:
        matrix = torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            matrix @ matrix
            times.append(time.perf_counter() - start)
        return min(times)

    return torch.bfloat16 if seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32
