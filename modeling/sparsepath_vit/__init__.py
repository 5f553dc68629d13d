# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
from .configuration_sparsepath_vit import SparsePathViTConfig
from .version import __version__

__all__ = ["SparsePathViTConfig", "__version__"]
