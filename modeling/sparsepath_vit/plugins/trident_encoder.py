# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""TRIDENT: a patch encoder for `WSI.extract_patch_features`, and so for HEST and Patho-Bench."""

import os
from typing import TYPE_CHECKING, Any

import torch

from .extractor import FeatureExtractor
from .peers import import_peer

if TYPE_CHECKING:
    from trident.patch_encoder_models.load import CustomInferenceEncoder


def trident_encoder(
    source: str | os.PathLike[str], precision: torch.dtype = torch.float32, **arguments: Any
) -> "CustomInferenceEncoder":
    """A checkpoint as a patch encoder of TRIDENT.

    Args:
        source: folder or Hub id of a converted checkpoint.
        precision: of the autocast that TRIDENT runs it in.
        **arguments: of `FeatureExtractor`.

    Raises:
        ImportError: TRIDENT is missing or older than 0.3.
    """
    encoders = import_peer("trident", "0.3", "trident.patch_encoder_models.load")
    extractor = FeatureExtractor(source, **arguments)
    encoder = encoders.CustomInferenceEncoder(
        enc_name=extractor.name, model=extractor, transforms=extractor.transform, precision=precision
    )
    encoder.embedding_dim = extractor.feature_size  # for slides without a tile
    return encoder.eval()
