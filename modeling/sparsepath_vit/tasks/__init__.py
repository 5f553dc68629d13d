# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Downstream tasks (extra `train`): data sets as they are published, label rules, probes and metrics."""
