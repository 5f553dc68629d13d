# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""SegPath (Komura et al., Patterns 2023): its tables and images."""
