# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Classification of regions, whatever they show: data sets, features, linear probes, fine-tuning."""
