# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What the trained tiny checkpoint can do and what it cannot."""
