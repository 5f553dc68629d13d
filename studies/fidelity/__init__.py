# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""How far sparse and pruned outputs are from the dense model's."""
