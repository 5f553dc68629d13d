# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Downstream tasks (extra `train`): data sets as they are published, label rules, probes and metrics."""

from typing import TYPE_CHECKING

from ..runtime.lazy_loading import lazy_names

if TYPE_CHECKING:
    from .bootstrap import bootstrap_interval
    from .recipes import parse_recipe_and_flags

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "bootstrap": ("bootstrap_interval",),
        "recipes": ("parse_recipe_and_flags",),
    },
)

__all__ = [
    "bootstrap_interval",
    "parse_recipe_and_flags",
]
