# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""SegPath (Komura et al., Patterns 2023): its tables and images."""

from typing import TYPE_CHECKING

from ...runtime.lazy_loading import lazy_names

if TYPE_CHECKING:
    from .dataset import read_segpath

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "dataset": ("read_segpath",),
    },
)

__all__ = [
    "read_segpath",
]
