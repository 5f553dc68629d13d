# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Features become float16 in their own memory, and no row is written over before it is read."""

import numpy as np
import pytest
import torch

from sparsepath_vit.slides import float16_rows


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("may_overwrite", [False, True])
@pytest.mark.parametrize("rows_at_once", [1, 7, 4096])
def test_they_are_the_rounded_features(dtype, may_overwrite, rows_at_once, monkeypatch):
    monkeypatch.setattr(float16_rows, "_ROWS_AT_ONCE", rows_at_once)
    tokens = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    features, before = tokens[3:], tokens.clone()
    rows = float16_rows.float16_rows(features, may_overwrite)
    assert rows.dtype == np.float16 and np.array_equal(rows, before[3:].half().numpy())
    assert torch.equal(tokens[:3], before[:3])
    assert (rows.ctypes.data == features.data_ptr()) == may_overwrite
    assert may_overwrite or torch.equal(tokens, before)
