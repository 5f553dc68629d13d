# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A pretrained DINOv2-S/14 from a package on PyPI, as a folder for Transformers and one for SparsePathViT."""
