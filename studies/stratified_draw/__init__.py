# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Which draw of context tokens and representatives comes nearest to dense attention, for as many keys."""
