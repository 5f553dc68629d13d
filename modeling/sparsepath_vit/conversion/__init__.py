# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of pathology foundation models -> SparsePathViT, with a parity report."""

from typing import TYPE_CHECKING

from ..runtime.lazy_loading import lazy_names

if TYPE_CHECKING:
    from .architectures import Architecture, architecture, known_architectures
    from .convert import ConversionReport, convert_checkpoint
    from .export import export_onnx, export_program
    from .verify import Parity, verify_conversion

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "architectures": ("Architecture", "architecture", "known_architectures"),
        "convert": ("ConversionReport", "convert_checkpoint"),
        "export": ("export_onnx", "export_program"),
        "verify": ("Parity", "verify_conversion"),
    },
)

__all__ = [
    "Architecture",
    "ConversionReport",
    "Parity",
    "architecture",
    "convert_checkpoint",
    "export_onnx",
    "export_program",
    "known_architectures",
    "verify_conversion",
]
