# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""One region through one model, dense, sparse and pruned."""

from typing import TYPE_CHECKING

from ..runtime.lazy_loading import lazy_names

if TYPE_CHECKING:
    from .demo import DemoReport, DemoRow, run_demo

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "demo": ("DemoReport", "DemoRow", "run_demo"),
    },
)

__all__ = [
    "DemoReport",
    "DemoRow",
    "run_demo",
]
