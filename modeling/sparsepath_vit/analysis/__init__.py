# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a run costs, what sparsity changes, and pictures of both."""
