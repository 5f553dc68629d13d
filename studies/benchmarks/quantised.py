# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""torchao's quantised weights through `from_pretrained`: how far from the checkpoint, how fast, how much memory."""

import dataclasses
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType

import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cosine_similarity
from tqdm import tqdm
from transformers import TorchAoConfig

from sparsepath_vit.comparison.images import bundled_image, resized
from sparsepath_vit.model.modeling_outputs_sparsepath_vit import SparsePathViTModelOutput
from sparsepath_vit.runtime.load_model import load_model
from sparsepath_vit.runtime.measure import describe_run, describe_seconds, measured
from sparsepath_vit.runtime.model_identity import encoder_name

logger = logging.getLogger(__name__)

# By the names of torchao's configurations; "none" is the checkpoint as it is, in the dtype of the run.
KINDS = {
    "none": None,
    "int8-weights": "Int8WeightOnlyConfig",
    "int8": "Int8DynamicActivationInt8WeightConfig",
    "float8-weights": "Float8WeightOnlyConfig",
    "float8": "Float8DynamicActivationFloat8WeightConfig",
}


@dataclasses.dataclass(frozen=True)
class QuantisedBenchmark:
    """What is run, without pruning, so that all compute the same tokens.

    Attributes:
        checkpoint: folder or Hub id.
        image: a file; None for the image that comes with scikit-image.
        sizes: pixels of the image's longer side.
        kinds: of `KINDS`.
        dtype: of what is not quantised.
        device: where it runs.
        repeats: timed runs of each, after one that is not timed.
        compiles: whether `torch.compile` runs the models.
    """

    checkpoint: str | os.PathLike[str]
    image: Path | None
    sizes: tuple[int, ...]
    kinds: tuple[str, ...]
    dtype: torch.dtype
    device: str
    repeats: int
    compiles: bool


@torch.inference_mode()
def benchmark_quantised(settings: QuantisedBenchmark) -> Iterator[dict[str, object]]:
    """Compares features with those of the checkpoint in float32, then times; a kind the device lacks is passed over.

    Yields:
        One row a kind and size.

    Raises:
        ValueError: an unknown kind.
        ImportError: torchao is missing.
    """
    if unknown := set(settings.kinds) - set(KINDS):
        raise ValueError(f"kinds holds {', '.join(sorted(unknown))}: it takes {', '.join(KINDS)}.")
    torchao = _torchao()
    image = bundled_image() if settings.image is None else Image.open(settings.image)
    reference, processor = load_model(settings.checkpoint, settings.device, torch.float32, prune_ratio=0.0)
    name = encoder_name(reference)
    batches = [processor(resized(image, size), do_resize=False, return_tensors="pt") for size in settings.sizes]
    batches = [batch.to(settings.device) for batch in batches]
    expected = [reference(**batch) for batch in batches]
    for kind in tqdm(settings.kinds, unit="kind"):
        model = _load(kind, settings)
        if model is None:
            continue
        run = torch.compile(model) if settings.compiles else model
        for size, batch, reference_outputs in zip(settings.sizes, batches, expected, strict=True):
            outputs = run(**batch)  # the run that is not timed
            yield {
                "checkpoint": name,
                "size": size,
                "quantised": kind,
                "dtype": str(settings.dtype).removeprefix("torch."),
                "compiled": settings.compiles,
                **_cosines(outputs, reference_outputs, model.config.num_global_tokens),
                **describe_seconds([_seconds(run, batch, settings.device) for _ in range(settings.repeats)]),
                "torchao": torchao.__version__,
                **describe_run(settings.device),
            }


def _torchao() -> ModuleType:
    try:
        return importlib.import_module("torchao")
    except ImportError as error:
        raise ImportError("torchao is needed to quantise: pip install torchao") from error


def _load(kind: str, settings: QuantisedBenchmark) -> nn.Module | None:
    """The checkpoint with its linear layers quantised; None, with the reason in the log, where the device cannot."""
    options = {}
    if KINDS[kind] is not None:
        quantization = importlib.import_module("torchao.quantization")
        configuration = getattr(quantization, KINDS[kind])()
        try:  # on one layer: Transformers would report a failure for each of them
            quantization.quantize_(nn.Linear(64, 64, device=settings.device, dtype=settings.dtype), configuration)
        except (AssertionError, RuntimeError, NotImplementedError) as error:
            logger.warning("%s is not possible here: %s", kind, error)
            return None
        options["quantization_config"] = TorchAoConfig(configuration)
    return load_model(settings.checkpoint, settings.device, settings.dtype, prune_ratio=0.0, **options)[0]


def _cosines(
    outputs: SparsePathViTModelOutput, expected: SparsePathViTModelOutput, num_global_tokens: int
) -> dict[str, float]:
    pooled = cosine_similarity(outputs.pooler_output.float(), expected.pooler_output, dim=1)
    tokens, expected_tokens = (found.last_hidden_state[0, num_global_tokens:].float() for found in (outputs, expected))
    mean = expected_tokens.mean(dim=0)  # without what all tokens have in common, see `sparsepath fidelity`
    centred = cosine_similarity(tokens - mean, expected_tokens - mean, dim=1)
    return {
        "pooled_cosine": round(pooled.mean().item(), 6),
        "centred_patch_cosine": round(centred.mean().item(), 6),
        "centred_patch_cosine_p5": round(centred.quantile(0.05).item(), 6),
    }


def _seconds(run: Callable[..., object], batch: Mapping[str, torch.Tensor], device: str) -> float:
    with measured(device) as measurement:
        run(**batch)
    return measurement.seconds
