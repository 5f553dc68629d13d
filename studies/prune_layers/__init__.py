# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What the prune score finds, layer by layer: tissue, nuclei, tumour cells."""
