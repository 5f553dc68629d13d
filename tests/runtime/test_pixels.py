# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Pixels reach the model as they are, whatever the processor would do by itself."""

import numpy as np
import torch

from sparsepath_vit import SparsePathViTImageProcessor
from sparsepath_vit.runtime.pixels import prepare


def test_neither_resolution_nor_background_of_the_processor_counts():
    processor = SparsePathViTImageProcessor(
        patch_size=4, target_mpp=0.5, do_resize=True, size={"height": 8, "width": 8}, mask_background=True
    )
    image = np.full((16, 24, 3), 255, dtype=np.uint8)
    image[:8, :8] = np.random.default_rng(0).integers(0, 200, (8, 8, 3))
    inputs = prepare(processor, [image])
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    expected = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    assert torch.allclose(inputs["pixel_values"][0], expected, atol=1e-5)
    assert inputs["patch_mask"].all()
    masked = prepare(processor, [image], torch.device("cpu"), mask_background=True)["patch_mask"][0]
    assert masked[:2, :2].all() and masked.sum() == 4


def test_settings_of_the_call_go_through():
    image = torch.zeros(3, 6, 8, dtype=torch.uint8)
    settings = {"input_data_format": "channels_first", "do_normalize": False}
    inputs = prepare(SparsePathViTImageProcessor(patch_size=4), [image], min_patch_coverage=0.9, **settings)
    assert inputs["patch_mask"].tolist() == [[[True, True], [False, False]]]
    assert not inputs["pixel_values"][0, :, :6].any()
