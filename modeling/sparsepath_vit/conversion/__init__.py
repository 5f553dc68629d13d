# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of pathology foundation models -> SparsePathViT, with a parity report."""

from .architectures import Architecture, architecture, known_architectures
from .convert import ConversionReport, convert_checkpoint
from .verify import Parity, verify_conversion

__all__ = [
    "Architecture",
    "ConversionReport",
    "Parity",
    "architecture",
    "convert_checkpoint",
    "known_architectures",
    "verify_conversion",
]
