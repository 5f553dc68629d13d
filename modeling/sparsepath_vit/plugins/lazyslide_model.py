# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""LazySlide: an image model, by object or, once this module is imported, by the name `sparsepath-vit`.

import sparsepath_vit.plugins.lazyslide_model
zs.tl.feature_extraction(wsi, "sparsepath-vit", model_path="./uni2-h")
"""

import os
from typing import TYPE_CHECKING, Any

import torch

from .extractor import FeatureExtractor, ImageTransform
from .peers import import_peer

if TYPE_CHECKING:
    from lazyslide_models.base import DenseTokens

_base = import_peer("lazyslide-models", "0.1.0", "lazyslide_models.base")
_registry = import_peer("lazyslide-models", "0.1.0", "lazyslide_models._model_registry")


@_registry.register(
    key="sparsepath-vit",
    task=_base.ModelTask.vision,
    license="that of the converted weights",
    description="A pathology foundation model with block-local attention and token pruning, at any size of tile",
    paper_url="https://arxiv.org/abs/2601.12150",
)
class SparsePathViTImageModel(_base.ImageModel):
    """A checkpoint as a vision model of LazySlide; tiles of any size, not resampled.

    Args:
        model_path: folder or Hub id of a converted checkpoint.
        token: LazySlide passes it to every model; not used, the Hub's own login counts.
        tile_size: pixels of a tile's side, which dense features are laid out for; the checkpoint's own by default.
        **arguments: of `FeatureExtractor`.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        token: str | None = None,
        tile_size: int | None = None,
        **arguments: Any,
    ) -> None:
        self.model = FeatureExtractor(model_path, **arguments)
        side = tile_size or self.model.model.config.image_size
        self.grid_size = self.model.grid_size(side, side)[::-1]  # (columns, rows)
        self.patch_size = (self.model.patch_size, self.model.patch_size)

    @property
    def name(self) -> str:
        """Under which LazySlide stores the features."""
        return self.model.name

    def get_transform(self) -> ImageTransform:
        """Without one LazySlide would resize every tile to 224 pixels."""
        return self.model.transform

    @torch.inference_mode()
    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) -> (batch, feature_size)."""
        return self.model(image)

    @torch.inference_mode()
    def encode_image_dense(self, image: torch.Tensor) -> "DenseTokens":
        """(batch, 3, height, width) -> CLS token (batch, hidden_size) and patch tokens (batch, N, hidden_size)."""
        cls_token, maps = self.model.tokens(image)
        self.grid_size = tuple(maps.shape[:1:-1])  # (columns, rows) of this tile
        return _base.DenseTokens(cls_token=cls_token, patch_tokens=maps.flatten(2).transpose(1, 2))
