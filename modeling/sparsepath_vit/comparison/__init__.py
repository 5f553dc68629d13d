# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""One region through one model, dense, sparse, stratified, pruned: how alike the features are, and what they cost."""

from typing import TYPE_CHECKING

from ..runtime.lazy_loading import lazy_names

if TYPE_CHECKING:
    from .demo import DemoReport, DemoRow, run_demo
    from .fidelity import DenseDoesNotFit, Fidelity, compare_image, compare_to_dense, other_draws, usual_variants

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "demo": ("DemoReport", "DemoRow", "run_demo"),
        "fidelity": (
            "DenseDoesNotFit",
            "Fidelity",
            "compare_image",
            "compare_to_dense",
            "other_draws",
            "usual_variants",
        ),
    },
)

__all__ = [
    "DemoReport",
    "DemoRow",
    "DenseDoesNotFit",
    "Fidelity",
    "compare_image",
    "compare_to_dense",
    "other_draws",
    "run_demo",
    "usual_variants",
]
