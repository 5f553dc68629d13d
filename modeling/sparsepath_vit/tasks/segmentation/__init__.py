# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Segmentation of regions, whatever is marked in them: data, training, prediction of any size."""

from typing import TYPE_CHECKING

from ...runtime.lazy_loading import lazy_names

if TYPE_CHECKING:
    from .baselines import evaluate_baselines
    from .data import SegmentationCollator, SegmentationImages, augmentation
    from .figures import example_figure
    from .file_segmentation import SegmentSettings, segment_file
    from .metrics import evaluate_segmentation
    from .pairs import SegmentationPair, SegmentationPairs, read_pairs
    from .regions import RegionSegmenter, load_segmenter
    from .sliding_window import WindowGrid, seam_report
    from .training import SegmentationTrainer

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "baselines": ("evaluate_baselines",),
        "data": ("SegmentationCollator", "SegmentationImages", "augmentation"),
        "figures": ("example_figure",),
        "file_segmentation": ("SegmentSettings", "segment_file"),
        "metrics": ("evaluate_segmentation",),
        "pairs": ("SegmentationPair", "SegmentationPairs", "read_pairs"),
        "regions": ("RegionSegmenter", "load_segmenter"),
        "sliding_window": ("WindowGrid", "seam_report"),
        "training": ("SegmentationTrainer",),
    },
)

__all__ = [
    "RegionSegmenter",
    "SegmentSettings",
    "SegmentationCollator",
    "SegmentationImages",
    "SegmentationPair",
    "SegmentationPairs",
    "SegmentationTrainer",
    "WindowGrid",
    "augmentation",
    "evaluate_baselines",
    "evaluate_segmentation",
    "example_figure",
    "load_segmenter",
    "read_pairs",
    "seam_report",
    "segment_file",
]
