# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Measurements that the documentation quotes, run from a checkout: python -m studies.NAME. Not installed."""
