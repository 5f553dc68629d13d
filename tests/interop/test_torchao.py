# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""int8 and float8 of torchao through `from_pretrained`, in an environment of its own: where it is, it is imported."""

import pytest
import torch
from small_models import random_pixels

pytest.importorskip("torchao", reason="torchao is not installed: make interop tries it")

from torchao import quantization
from transformers import AutoModel, TorchAoConfig

from sparsepath_vit import tiny_checkpoint
from studies.benchmarks.quantised import KINDS, QuantisedBenchmark, benchmark_quantised

NAMES = ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Float8WeightOnlyConfig"]


@pytest.mark.parametrize("name", NAMES)
def test_quantised_through_from_pretrained_stays_close(name):
    pixels = random_pixels(1, 16, 16, patch_size=14)
    folder = tiny_checkpoint()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    config = TorchAoConfig(getattr(quantization, name)())
    quantized = AutoModel.from_pretrained(folder, dtype=torch.float32, quantization_config=config).eval()
    weight = quantized.encoder.layers[0].attention.qkv.weight
    assert type(weight).__name__ != "Parameter" and name[:4] in type(weight).__name__  # Int8Tensor, Float8Tensor
    with torch.no_grad():
        expected, found = model(pixels).pooler_output, quantized(pixels).pooler_output
    similarity = torch.nn.functional.cosine_similarity(expected, found).item()
    assert similarity > 0.999 and not torch.equal(expected, found)


def test_the_benchmark_says_how_far_and_passes_over_what_the_device_lacks(caplog):
    settings = QuantisedBenchmark(tiny_checkpoint(), None, (112,), tuple(KINDS), torch.float32, "cpu", 1, False)
    rows = {row["quantised"]: row for row in benchmark_quantised(settings)}
    assert list(rows) == [kind for kind in KINDS if kind != "float8"]
    assert "float8 is not possible here: Float8 dynamic quantization requires CUDA" in caplog.text
    assert rows["none"]["pooled_cosine"] == 1.0
    for kind in ("int8-weights", "int8", "float8-weights"):
        assert 0.99 < rows[kind]["centred_patch_cosine_p5"] < 1 and rows[kind]["seconds_median"] > 0


def test_the_snippet_of_the_page_runs(run_snippet):
    run_snippet("torchao")
