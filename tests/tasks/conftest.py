# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "slides")]  # small_models, slide_files
