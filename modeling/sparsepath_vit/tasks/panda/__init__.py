# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""PANDA (prostate biopsies, Kaggle 2020): its tables, masks and regions."""

from typing import TYPE_CHECKING

from ...runtime.lazy_loading import lazy_names

if TYPE_CHECKING:
    from .dataset import PandaSlide, PandaTask, read_panda_folder
    from .label_mask import LabelMask
    from .rois import PandaSettings, prepare_panda

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "dataset": ("PandaSlide", "PandaTask", "read_panda_folder"),
        "label_mask": ("LabelMask",),
        "rois": ("PandaSettings", "prepare_panda"),
    },
)

__all__ = [
    "LabelMask",
    "PandaSettings",
    "PandaSlide",
    "PandaTask",
    "prepare_panda",
    "read_panda_folder",
]
