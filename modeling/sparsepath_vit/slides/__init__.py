# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""From a slide to embeddings (extra `slides`): reader, tissue, regions, whole-slide forward, store."""

from typing import TYPE_CHECKING

from ..runtime.lazy_loading import lazy_names

if TYPE_CHECKING:
    from .description import SlideDescription, describe
    from .embed import embed_slides
    from .embedded_slide import EmbeddedSlide
    from .embedder import EmbedSettings
    from .errors import SlideError
    from .estimate import estimate_for
    from .forward import Embedding, embed_regions, embed_slide
    from .heatmap import write_heatmap
    from .inspection import Inspection, inspect_slide
    from .polygon_features import PolygonFeatures, pool_polygon
    from .reader import Slide
    from .regions import Region, read_inputs, tissue_regions
    from .report import EmbedReport
    from .scverse import to_anndata
    from .similarity import SimilarPlace, similar_places, token_similarity
    from .store import EmbeddingStore, StoreError
    from .tiles import TileFeatures, Tiles, pool_tiles
    from .tissue import TissueMask, find_tissue
    from .token_values import TokenValues, read_token_values

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "description": ("SlideDescription", "describe"),
        "embed": ("embed_slides",),
        "embedded_slide": ("EmbeddedSlide",),
        "embedder": ("EmbedSettings",),
        "errors": ("SlideError",),
        "estimate": ("estimate_for",),
        "forward": ("Embedding", "embed_regions", "embed_slide"),
        "heatmap": ("write_heatmap",),
        "inspection": ("Inspection", "inspect_slide"),
        "polygon_features": ("PolygonFeatures", "pool_polygon"),
        "reader": ("Slide",),
        "regions": ("Region", "read_inputs", "tissue_regions"),
        "report": ("EmbedReport",),
        "similarity": ("SimilarPlace", "similar_places", "token_similarity"),
        "scverse": ("to_anndata",),
        "store": ("EmbeddingStore", "StoreError"),
        "tiles": ("TileFeatures", "Tiles", "pool_tiles"),
        "tissue": ("TissueMask", "find_tissue"),
        "token_values": ("TokenValues", "read_token_values"),
    },
)

__all__ = [
    "EmbedReport",
    "EmbedSettings",
    "EmbeddedSlide",
    "Embedding",
    "EmbeddingStore",
    "Inspection",
    "PolygonFeatures",
    "Region",
    "SimilarPlace",
    "Slide",
    "SlideDescription",
    "SlideError",
    "StoreError",
    "TileFeatures",
    "Tiles",
    "TissueMask",
    "TokenValues",
    "describe",
    "embed_regions",
    "embed_slide",
    "embed_slides",
    "estimate_for",
    "find_tissue",
    "inspect_slide",
    "pool_polygon",
    "pool_tiles",
    "read_inputs",
    "read_token_values",
    "similar_places",
    "tissue_regions",
    "to_anndata",
    "token_similarity",
    "write_heatmap",
]
