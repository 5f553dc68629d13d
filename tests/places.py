# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Where the checkout's own folders are, and the real data beside it, which may be absent."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
SHARED_DATA = ROOT.parent / "shared" / "data"
