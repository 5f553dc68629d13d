# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Time and memory against peers; run by scripts/benchmark.py."""
