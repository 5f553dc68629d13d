# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The sparsepath command: one file a command; each imports the library only when it runs."""
