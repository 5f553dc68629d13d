# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Trains the tiny checkpoint that comes with the package."""
