# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from sparsepath_vit import TokenGrid
from sparsepath_vit.model.attention_checks import check_states


class TestBadInput:
    def states(self, tokens=12):
        return [torch.randn(1, 2, tokens, 16) for _ in range(3)]

    def grid(self, rows=3):
        return TokenGrid.create([(rows, 3)], num_global_tokens=3, window_size=2)

    @pytest.mark.parametrize("index, name", [(0, "query"), (1, "key"), (2, "value")])
    def test_last_dimension_that_is_not_contiguous(self, index, name):
        states = self.states()
        states[index] = torch.randn(1, 2, 16, 12).transpose(2, 3)
        with pytest.raises(ValueError, match=rf"{name} has strides \(.*\): .*head_dim, must be contiguous"):
            check_states(*states, self.grid(), None)

    def test_grid_of_other_tokens(self):
        with pytest.raises(ValueError, match=r"grid describes \(batch, tokens\) = \(1, 15\)"):
            check_states(*self.states(), self.grid(rows=4), None)

    def test_grid_with_wrong_counts(self):
        pruned = self.grid(rows=4).select(torch.arange(5), [9])
        with pytest.raises(ValueError, match=r"grid has 5 patch tokens, but its counts \(9,\) add up to 9"):
            check_states(*self.states(), pruned, None)

    @pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
    def test_scale_that_is_not_positive(self, scale):
        with pytest.raises(ValueError, match=f"scale={scale} is not possible: it takes a positive number"):
            check_states(*self.states(), self.grid(), scale)
