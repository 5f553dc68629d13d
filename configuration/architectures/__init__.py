# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The named architectures, one JSON file each, installed as `sparsepath_vit.architectures`."""
