# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The package version, in one place."""

__version__ = "0.1.0"
