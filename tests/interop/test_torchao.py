# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""torchao's int8 through `from_pretrained`. It has an environment of its own: where it is, Transformers imports it."""

import pytest
import torch
from small_models import random_pixels

pytest.importorskip("torchao", reason="torchao is not installed: make interop tries it")

from torchao import quantization
from transformers import AutoModel, TorchAoConfig

from sparsepath_vit import tiny_checkpoint


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_int8_through_from_pretrained_stays_close(name):
    pixels = random_pixels(1, 16, 16, patch_size=14)
    folder = tiny_checkpoint()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    config = TorchAoConfig(getattr(quantization, name)())
    quantized = AutoModel.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()
    weight = quantized.encoder.layers[0].attention.qkv.weight
    assert type(weight).__name__ != "Parameter" and "Int8" in type(weight).__name__
    with torch.no_grad():
        expected, found = model(pixels).pooler_output, quantized(pixels).pooler_output
    similarity = torch.nn.functional.cosine_similarity(expected, found).item()
    assert similarity > 0.999 and not torch.equal(expected, found)


def test_the_snippet_of_the_page_runs(run_snippet):
    run_snippet("torchao")
