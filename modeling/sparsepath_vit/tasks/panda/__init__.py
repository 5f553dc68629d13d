# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""PANDA (prostate biopsies, Kaggle 2020): its tables, masks and regions."""
