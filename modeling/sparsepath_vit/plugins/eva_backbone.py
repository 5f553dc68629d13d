# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A backbone of eva (kaiko-eva), by the name `pathology/sparsepath_vit`.

Import this module, or name `sparsepath_vit.plugins.eva_backbone` as `path` of `ModelFromFunction`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .extractor import FeatureExtractor
from .peers import import_peer

_registry = import_peer("kaiko-eva", "0.4.5", "eva.vision.models.networks.backbones.registry")


class FeatureMaps(nn.Module):
    """Maps of several layers, as eva's segmentation decoders take them.

    Args:
        extractor: the checkpoint.
        out_indices: how many of the last layers, or which ones counted from 0.
    """

    def __init__(self, extractor: FeatureExtractor, out_indices: int | Sequence[int]) -> None:
        super().__init__()
        self.extractor = extractor
        count = extractor.model.config.num_hidden_layers
        indices = range(count - out_indices, count) if isinstance(out_indices, int) else out_indices
        self.layers = [index % count + 1 for index in indices]

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """(batch, 3, height, width) normalised -> a list of (batch, hidden_size, rows, columns)."""
        return self.extractor.feature_maps(pixel_values, self.layers)


@_registry.backbone_registry.register("pathology/sparsepath_vit")
def eva_backbone(
    source: str,
    out_indices: int | tuple[int, ...] | None = None,
    arguments: dict[str, Any] | None = None,
) -> nn.Module:
    """A checkpoint as a backbone of eva.

    eva's registry drops arguments that are not named here without a word, so those of the extractor are one of these.

    Args:
        source: folder or Hub id of a converted checkpoint.
        out_indices: None for pooled features, (batch, feature_size); else how many of the last layers, or which ones
            counted from 0, for a list of (batch, hidden_size, rows, columns).
        arguments: of `FeatureExtractor`, such as `{"prune_ratio": 0.0}`.
    """
    extractor = FeatureExtractor(source, **arguments or {})
    return extractor if out_indices is None else FeatureMaps(extractor, out_indices)
