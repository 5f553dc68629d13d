# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Encoders of slide2vec, which finds them by its entry point `slide2vec.encoders`: one for each converted checkpoint.

slide2vec names encoders, not files. `sparsepath-tiny` is always there; the environment variable
`SPARSEPATH_CHECKPOINTS` names a folder, of which every subfolder NAME that holds a checkpoint is `sparsepath-NAME`.
"""

import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoImageProcessor

from ..checkpoints import tiny_checkpoint
from .extractor import FeatureExtractor
from .peers import import_peer

CHECKPOINTS_VARIABLE = "SPARSEPATH_CHECKPOINTS"


def register_slide2vec_encoders() -> None:
    """Registers an encoder for each checkpoint; slide2vec calls this when it first looks for encoders.

    Raises:
        ImportError: slide2vec is older than 7.1.
        ValueError: the environment variable names no folder.
    """
    import_peer("slide2vec", "7.1", "slide2vec.encoders")
    folder = os.environ.get(CHECKPOINTS_VARIABLE)
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(
            f"{CHECKPOINTS_VARIABLE}={folder} is no folder: name the one that holds converted checkpoints."
        )
    _register("sparsepath-tiny", tiny_checkpoint())
    for path in sorted(Path(folder).iterdir()) if folder is not None else ():
        if (path / "config.json").exists() and (path / "preprocessor_config.json").exists():
            _register(f"sparsepath-{path.name}", path)


def _register(name: str, source: Path) -> None:
    from slide2vec.encoders import TorchTileEncoder, register_encoder

    config, processor = AutoConfig.from_pretrained(source), AutoImageProcessor.from_pretrained(source)

    @register_encoder(
        name,
        encode_dim=config.pooled_size,
        input_size=config.image_size,
        supports_variable_input_size=True,
        patch_size=config.patch_size,
        supported_spacing_um=processor.target_mpp,
        default_spacing_um=processor.target_mpp or 0.5,
        precision="fp32",
        source=str(source),
    )
    class SparsePathViTEncoder(TorchTileEncoder):
        """A checkpoint as a tile encoder of slide2vec."""

        def __init__(self, *, output_variant: str | None = None) -> None:
            super().__init__(
                FeatureExtractor(source),
                encode_dim=config.pooled_size,
                input_size=config.image_size,
                mean=tuple(processor.image_mean),
                std=tuple(processor.image_std),
                output_variant=output_variant,
            )

        @property
        def patch_size(self) -> tuple[int, int]:
            """(height, width) in pixels."""
            return config.patch_size, config.patch_size

        def encode_tiles_dense(self, batch: torch.Tensor) -> torch.Tensor:
            """(batch, 3, height, width) -> (batch, hidden_size, rows, columns)."""
            return self._model.tokens(batch)[1]
