# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What one forward of a region gives beside its tiles: regions classified, and tokens that lie near a tile's border."""
