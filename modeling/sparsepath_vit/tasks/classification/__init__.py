# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Classification of regions, whatever they show: data sets, features, linear probes, fine-tuning."""

from typing import TYPE_CHECKING

from ...runtime.lazy_loading import lazy_names

if TYPE_CHECKING:
    from .features import FeatureCache, FeatureSettings, compute_features, embed_rois
    from .finetune import RoiCollator, RoiImages, RoiTrainer, with_lora
    from .image_folder import read_image_folder
    from .linear_probe import LinearHead, ProbeResult, ProbeSettings, merge_head, probe
    from .metrics import evaluate_predictions
    from .roi_files import load_labelled_rois, load_roi_dataset, save_roi_dataset
    from .rois import Roi, RoiDataset
    from .slide_bags import SlideBags, read_bags, read_labelled_bags
    from .slide_classifier import (
        SlideClassifier,
        load_slide_classifier,
        predict_slides,
        save_slide_classifier,
        train_slide_classifier,
    )

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "features": ("FeatureCache", "FeatureSettings", "compute_features", "embed_rois"),
        "finetune": ("RoiCollator", "RoiImages", "RoiTrainer", "with_lora"),
        "image_folder": ("read_image_folder",),
        "linear_probe": ("LinearHead", "ProbeResult", "ProbeSettings", "merge_head", "probe"),
        "metrics": ("evaluate_predictions",),
        "roi_files": ("load_labelled_rois", "load_roi_dataset", "save_roi_dataset"),
        "rois": ("Roi", "RoiDataset"),
        "slide_bags": ("SlideBags", "read_bags", "read_labelled_bags"),
        "slide_classifier": (
            "SlideClassifier",
            "load_slide_classifier",
            "predict_slides",
            "save_slide_classifier",
            "train_slide_classifier",
        ),
    },
)

__all__ = [
    "FeatureCache",
    "FeatureSettings",
    "LinearHead",
    "ProbeResult",
    "ProbeSettings",
    "Roi",
    "RoiCollator",
    "RoiDataset",
    "RoiImages",
    "RoiTrainer",
    "SlideBags",
    "SlideClassifier",
    "compute_features",
    "embed_rois",
    "evaluate_predictions",
    "load_labelled_rois",
    "load_roi_dataset",
    "load_slide_classifier",
    "merge_head",
    "predict_slides",
    "probe",
    "read_bags",
    "read_image_folder",
    "read_labelled_bags",
    "save_roi_dataset",
    "save_slide_classifier",
    "train_slide_classifier",
    "with_lora",
]
