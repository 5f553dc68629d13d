# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Segmenting needs the model and no training code."""

import subprocess
import sys

IMPORT_PREDICTION = """
import sys
import sparsepath_vit.tasks.segmentation.regions
print(sorted({"transformers.trainer", "sparsepath_vit.tasks.segmentation.training"} & set(sys.modules)))
"""


def test_prediction_does_not_import_the_trainer():
    ran = subprocess.run([sys.executable, "-c", IMPORT_PREDICTION], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
