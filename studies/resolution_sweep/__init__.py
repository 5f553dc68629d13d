# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Does accuracy grow with resolution, and is it the resolution?"""
