# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""From a slide to embeddings (extra `slides`): reader, tissue, regions, whole-slide forward, store."""

from typing import TYPE_CHECKING

from ..runtime.lazy_loading import lazy_names

if TYPE_CHECKING:
    from .description import SlideDescription, describe
    from .embed import embed_slides
    from .embedder import EmbedSettings
    from .errors import SlideError
    from .estimate import estimate_for
    from .forward import Embedding, embed_regions, embed_slide
    from .heatmap import read_token_values, write_heatmap
    from .inspection import Inspection, inspect_slide
    from .reader import Slide
    from .regions import Region, read_inputs, tissue_regions
    from .report import EmbedReport
    from .scverse import to_anndata
    from .store import EmbeddingStore, StoreError
    from .tiles import TileFeatures, Tiles, pool_tiles
    from .tissue import TissueMask, find_tissue

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "description": ("SlideDescription", "describe"),
        "embed": ("embed_slides",),
        "embedder": ("EmbedSettings",),
        "errors": ("SlideError",),
        "estimate": ("estimate_for",),
        "forward": ("Embedding", "embed_regions", "embed_slide"),
        "heatmap": ("read_token_values", "write_heatmap"),
        "inspection": ("Inspection", "inspect_slide"),
        "reader": ("Slide",),
        "regions": ("Region", "read_inputs", "tissue_regions"),
        "report": ("EmbedReport",),
        "scverse": ("to_anndata",),
        "store": ("EmbeddingStore", "StoreError"),
        "tiles": ("TileFeatures", "Tiles", "pool_tiles"),
        "tissue": ("TissueMask", "find_tissue"),
    },
)

__all__ = [
    "EmbedReport",
    "EmbedSettings",
    "Embedding",
    "EmbeddingStore",
    "Inspection",
    "Region",
    "Slide",
    "SlideDescription",
    "SlideError",
    "StoreError",
    "TileFeatures",
    "Tiles",
    "TissueMask",
    "describe",
    "embed_regions",
    "embed_slide",
    "embed_slides",
    "estimate_for",
    "find_tissue",
    "inspect_slide",
    "pool_tiles",
    "read_inputs",
    "read_token_values",
    "tissue_regions",
    "to_anndata",
    "write_heatmap",
]
