# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A pretrained DINOv2-S/14 with a free licence, from a package on PyPI, as a Transformers and a SparsePathViT folder."""
