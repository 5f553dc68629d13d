# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What other toolkits load by name: one extractor, and an adapter of a page for each toolkit.

None of them is installed with this package. Nothing of the library imports this folder, and no adapter is imported
before it is asked for.
"""

from typing import TYPE_CHECKING

from ..runtime.lazy_loading import lazy_names

if TYPE_CHECKING:
    from .eva_backbone import eva_backbone
    from .extractor import FeatureExtractor, ImageTransform
    from .lazyslide_model import SparsePathViTImageModel
    from .slide2vec_encoders import register_slide2vec_encoders
    from .trident_encoder import trident_encoder

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "eva_backbone": ("eva_backbone",),
        "extractor": ("FeatureExtractor", "ImageTransform"),
        "lazyslide_model": ("SparsePathViTImageModel",),
        "slide2vec_encoders": ("register_slide2vec_encoders",),
        "trident_encoder": ("trident_encoder",),
    },
)

__all__ = [
    "FeatureExtractor",
    "ImageTransform",
    "SparsePathViTImageModel",
    "eva_backbone",
    "register_slide2vec_encoders",
    "trident_encoder",
]
