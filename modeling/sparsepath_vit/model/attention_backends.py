# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The backends of block-local attention, and which of them runs.

That is the first of `BACKENDS` that runs on the tensors' device, unless `set_block_attention_backend` or the
environment variable SPARSEPATH_ATTENTION_BACKEND names one. "reference" is none of them but the specification that they
follow.
"""

import functools
import itertools
import logging
import os

import torch

from .attention_backend import AttentionBackend
from .attention_cpu import CPU_KERNEL
from .attention_sdpa_tiles import SDPA_TILES
from .attention_triton import TRITON

logger = logging.getLogger(__name__)

# The fastest first. A new backend is a file that describes it, as these do, and its line here.
BACKENDS = {
    backend.name: backend
    for backend in (
        TRITON,
        CPU_KERNEL,
        SDPA_TILES,
    )
}
AUTOMATIC, REFERENCE = "auto", "reference"
CHOICES = (AUTOMATIC, *BACKENDS, REFERENCE)
BACKEND_VARIABLE = "SPARSEPATH_ATTENTION_BACKEND"

_chosen_backend = os.environ.get(BACKEND_VARIABLE, AUTOMATIC)


def set_block_attention_backend(backend: str) -> None:
    """Chooses what runs `block_sparse` attention in this process, over SPARSEPATH_ATTENTION_BACKEND.

    Args:
        backend: "auto" (the fastest that runs on the tensors' device), "triton" (the kernel for NVIDIA GPUs),
            "cpu_kernel" (the kernel for CPUs, which needs a C compiler), "sdpa_tiles" (tiles of torch SDPA calls, on
            any device) or "reference" (the naive specification; quadratic).

    Raises:
        ValueError: an unknown backend, or one that cannot run on this machine.
    """
    global _chosen_backend
    if backend not in CHOICES:
        raise ValueError(f"backend={backend!r} is unknown: choose one of {', '.join(map(repr, CHOICES))}.")
    if backend in BACKENDS:
        has_cuda = torch.cuda.is_available() and BACKENDS[backend].device_type != "cpu"
        missing = _missing(backend, torch.device("cuda" if has_cuda else "cpu"))
        if missing is not None:
            raise ValueError(f"backend={backend!r} is unavailable: {missing}. Choose 'auto' or 'sdpa_tiles'.")
    _chosen_backend = backend


def block_attention_backend(device: torch.device | str) -> str:
    """The backend that runs `block_sparse` on a device: "triton", "cpu_kernel", "sdpa_tiles" or "reference".

    Raises:
        ValueError: SPARSEPATH_ATTENTION_BACKEND holds no backend, or the chosen one cannot run on the device.
    """
    if _chosen_backend not in CHOICES:
        raise ValueError(
            f"{BACKEND_VARIABLE}={_chosen_backend!r} is unknown: set it to one of {', '.join(CHOICES)}, or unset it."
        )
    device = torch.device(device)
    if _chosen_backend == AUTOMATIC:
        return _automatic_backend(device)
    missing = _missing(_chosen_backend, device) if _chosen_backend in BACKENDS else None
    if missing is not None:
        raise ValueError(
            f"The attention backend {_chosen_backend!r} was chosen and cannot run on {device}: {missing}. Move the "
            f"model, or choose 'auto' with set_block_attention_backend or {BACKEND_VARIABLE}."
        )
    return _chosen_backend


def describe_block_attention_backend(device: torch.device | str) -> str:
    """Which backend would run `block_sparse` on a device, and why, in one line."""
    try:
        name = block_attention_backend(device)
    except ValueError as error:
        return f"none: {error}"
    if name == REFERENCE:
        described = f"{name} (naive reference, quadratic)"
    else:
        described = f"{name} ({BACKENDS[name].description})"
    if _chosen_backend != AUTOMATIC:
        return f"{described}: chosen by {BACKEND_VARIABLE} or set_block_attention_backend"
    return f"{described}: {_reason_against_faster(name, torch.device(device)) or 'the fastest, and it runs here'}"


def backend_for(query: torch.Tensor, dropout: float, has_key_weights: bool = False) -> str:
    """The backend of one call; says once where it is not the one a user would expect.

    Args:
        query: (..., head_dim).
        dropout: share of attention probabilities set to zero.
        has_key_weights: whether keys have weights, or some are context tokens: `TokenGrid.weighs_keys`.

    Raises:
        ValueError: as `block_attention_backend`, or the backend does not take the query's head_dim or dtype.
    """
    name = block_attention_backend(query.device)
    if name == REFERENCE:
        return name
    lacking = _lacking(BACKENDS[name], dropout > 0.0, has_key_weights)
    if lacking:
        fallback = _backend_with_all(query.device, dropout > 0.0, has_key_weights)
        _say_once(
            logging.WARNING,
            f"block_sparse: the {BACKENDS[name].description} has no {lacking}; left to the {fallback.description}.",
        )
        return fallback.name
    BACKENDS[name].check_query(query)
    if _chosen_backend == AUTOMATIC and name != next(iter(BACKENDS)):
        reason, described = _reason_against_faster(name, query.device), BACKENDS[name].description
        level = logging.WARNING if query.is_cuda else logging.INFO
        _say_once(level, f"block_sparse: {reason}; left to the {described}, correct but slower.")
    return name


def _automatic_backend(device: torch.device) -> str:
    for name in BACKENDS:
        if _missing(name, device) is None and _unwanted(name, device) is None:
            return name
    raise ValueError(f"No attention backend runs on {device}: {_reason_against_faster(None, device)}.")


def _lacking(backend: AttentionBackend, needs_dropout: bool, needs_key_weights: bool) -> str:
    """What of the needed a backend does not have, in words; empty where it has all."""
    lacking = []
    if needs_dropout and not backend.has_dropout:
        lacking.append("dropout")
    if needs_key_weights and not backend.takes_key_weights:
        lacking.append("weighted keys (num_context_tokens, num_representatives)")
    return " and no ".join(lacking)


def _backend_with_all(device: torch.device, needs_dropout: bool, needs_key_weights: bool) -> AttentionBackend:
    for name, backend in BACKENDS.items():
        if not _lacking(backend, needs_dropout, needs_key_weights) and _missing(name, device) is None:
            return backend
    raise ValueError(
        f"No attention backend on {device} has all that is needed: set attention_dropout=0.0, num_context_tokens=0 and "
        "num_representatives=0."
    )


def _reason_against_faster(name: str | None, device: torch.device) -> str | None:
    """Why "auto" chooses no backend before the named one; `None` where there is none before it.

    Of backends for another type of device only the first is spoken of, and only where no other reason is left.
    """
    faster = list(itertools.takewhile(lambda other: other != name, BACKENDS))
    of_device = [other for other in faster if BACKENDS[other].device_type in (None, device.type)]
    return "; ".join(_missing(other, device) or _unwanted(other, device) for other in of_device or faster[:1]) or None


@torch.compiler.assume_constant_result
def _missing(name: str, device: torch.device) -> str | None:
    return BACKENDS[name].missing(device)


@torch.compiler.assume_constant_result
def _unwanted(name: str, device: torch.device) -> str | None:
    return BACKENDS[name].unwanted(device)


def _say_once(level: int, message: str) -> None:
    if not torch.compiler.is_compiling():
        _log_once(level, message)


@functools.cache
def _log_once(level: int, message: str) -> None:
    logger.log(level, message)
