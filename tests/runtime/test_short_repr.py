# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
from dataclasses import dataclass

import numpy as np
import torch

from sparsepath_vit.runtime.short_repr import ShortRepr
from sparsepath_vit.slides import EmbedSettings, Slide, TissueMask
from sparsepath_vit.slides.store import EmbeddingStore


@dataclass(repr=False)
class Result(ShortRepr):
    numbers: np.ndarray
    tensor: torch.Tensor
    names: list[str]
    count: int = 3
    nothing: None = None


def test_arrays_print_as_shapes_and_long_lists_as_lengths():
    result = Result(np.zeros((3, 4), np.float16), torch.zeros(5), [f"slide {index}" for index in range(99)])
    expected = "Result(numbers=(3, 4) float16, tensor=(5,) float32, names=list of 99, count=3, nothing=None)"
    assert repr(result) == expected


def test_results_of_slides_print_in_a_line(small_slide, tmp_path):
    with Slide(small_slide) as slide:
        assert repr(TissueMask.everywhere(slide)) == "TissueMask(mask=(1, 1) bool, scale=(640.0, 512.0))"
    assert repr(EmbeddingStore(tmp_path, {})) == f"EmbeddingStore({str(tmp_path)!r}, 0 slides)"


def test_settings_take_numbers_of_numpy():
    settings = EmbedSettings(np.float32(0.5), np.int64(448), tile_size=np.int32(224))
    assert [type(value) for value in (settings.mpp, settings.region_size, settings.tile_size)] == [float, int, int]
    assert settings == EmbedSettings(0.5, 448, tile_size=224)
