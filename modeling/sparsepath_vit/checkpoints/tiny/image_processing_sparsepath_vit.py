# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What `trust_remote_code=True` finds in the installed folder: the package itself, which need not be imported before.

`copy_tiny_checkpoint` puts the code in its place, which needs no package.
"""

from sparsepath_vit import SparsePathViTImageProcessor, SparsePathViTImageProcessorPil

__all__ = ["SparsePathViTImageProcessor", "SparsePathViTImageProcessorPil"]
