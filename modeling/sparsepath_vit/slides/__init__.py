# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""From a slide to embeddings: reader, tissue, regions and the embedding store (extra `slides`)."""

from .backends import SlideError
from .reader import Slide

__all__ = ["Slide", "SlideError"]
