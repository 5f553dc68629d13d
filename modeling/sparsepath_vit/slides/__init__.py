# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""From a slide to embeddings (extra `slides`): reader, tissue, regions, whole-slide forward, store."""

from .description import SlideDescription, describe
from .embed import embed_slides
from .embedder import EmbedReport, EmbedSettings
from .errors import SlideError
from .forward import Embedding, embed_regions, embed_slide
from .reader import Slide
from .regions import Region, read_inputs, tissue_regions
from .store import EmbeddingStore, StoreError
from .tissue import TissueMask, find_tissue

__all__ = [
    "EmbedReport",
    "EmbedSettings",
    "Embedding",
    "EmbeddingStore",
    "Region",
    "Slide",
    "SlideDescription",
    "SlideError",
    "StoreError",
    "TissueMask",
    "describe",
    "embed_regions",
    "embed_slide",
    "embed_slides",
    "find_tissue",
    "read_inputs",
    "tissue_regions",
]
