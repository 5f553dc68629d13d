# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Segmentation of regions, whatever is marked in them: data, training, prediction of any size."""
