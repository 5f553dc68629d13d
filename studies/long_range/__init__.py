# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""How far information can travel, with and without global tokens."""
