# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""One region through one model, dense, sparse and pruned."""
