# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Attention computes in the dtype of its arguments, probabilities in at least float32: autocast has no say in it."""

import contextlib

import torch

# Of the Triton kernels: a product and a sum round once. Said to every launch, since the default is the environment's.
FP_FUSION = True


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a device type, such as "cuda"; "meta" has none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Switches autocast off for a device type; does nothing where it is off, so that compiled graphs stay free of it.

    Args:
        device_type: such as "cuda".
    """
    if autocasts(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
