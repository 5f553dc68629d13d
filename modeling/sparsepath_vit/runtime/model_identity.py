# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a model computes, told apart from what any other computes: weights, configuration, numerics, preprocessing.

Whatever keeps results of a model beside each other (a folder of embeddings, a cache of features, a table of evidence)
asks here whether two models are the same. A field of the configuration or of the image processor counts unless it is
listed below, so that one that is added later counts from the start.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..model.image_processing_sparsepath_vit import SparsePathViTImageProcessor

# Raised when a change of this package makes a checkpoint compute other numbers, beyond rounding. The versions of
# libraries are left out: what they change is rounding, and every upgrade would part a folder from its own slides.
NUMERICS_REVISION = 1

# What a forward in evaluation mode does not depend on: training, initial weights (those there are count themselves),
# how many tokens a layer takes at once, what follows from the number of layers, and the normalisation of raw pixels,
# which get to a model only where the image processor has the same.
HARMLESS_CONFIG_FIELDS = frozenset(
    {
        "attention_dropout",
        "auto_map",
        "chunk_size_feed_forward",  # of checkpoints from before `tokens_per_strip`
        "drop_path_rate",
        "hidden_dropout",
        "image_mean",
        "image_std",
        "initializer_range",
        "layerscale_value",
        "reshape_hidden_states",
        "stage_names",
        "tokens_per_strip",
    }
)
# What only refuses images, names classes, or moves the same numbers elsewhere.
HARMLESS_PROCESSOR_FIELDS = frozenset(
    {"auto_map", "device", "disable_grouping", "input_data_format", "max_pixels", "processor_class", "return_tensors"}
)


def model_identity(
    model: "PreTrainedModel", processor: "SparsePathViTImageProcessor | None" = None
) -> dict[str, str | int | float | bool | list | dict | None]:
    """Everything the numbers of a model depend on, by name, as plain JSON values.

    It survives saving and loading. In 16 bits the type of device counts, since sums are then rounded in another order
    to a percent; in float32 it does not, but reduced-precision matrix products (TF32) do.

    Args:
        model: in the dtype and on the device it will run in; all of its weights are read.
        processor: its image processor, where pixels go through one.

    Returns:
        Fields of the configuration under their own names, those of the processor as `processor.NAME`, and `weights`,
        `dtype`, `attention`, `device`, `float32_precision` and `numerics_revision`.
    """
    is_float32 = model.dtype == torch.float32
    identity: dict[str, Any] = {
        **_config_fields(model.config),
        "weights": weights_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "device": None if is_float32 else model.device.type,
        "float32_precision": _float32_precision(model.device.type) if is_float32 else None,
        "numerics_revision": NUMERICS_REVISION,
    }
    if processor is not None:
        fields = processor.to_dict()
        identity |= {f"processor.{name}": fields[name] for name in sorted(set(fields) - HARMLESS_PROCESSOR_FIELDS)}
    return json.loads(json.dumps(identity, default=str))  # as it will be read back: tuples become lists


def identity_digest(identity: dict[str, Any]) -> str:
    """32 hexadecimal digits that stand for an identity, or for one with further settings beside it."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:32]


def encoder_name(model: "PreTrainedModel", digest: str | None = None) -> str:
    """A name that people know a checkpoint by and that no other weights share: of its folder or on the Hub, and a hash.

    Args:
        model: the model.
        digest: of its weights, where it is known.
    """
    name = Path(model.config.name_or_path or model.config.model_type).name
    return f"{name}-{(digest or weights_digest(model))[:8]}"


def weights_digest(model: torch.nn.Module) -> str:
    """Hash of name, shape, dtype and every value of all parameters, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _config_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that count, of a configuration and of those inside it (a segmentation model's backbone).

    Those that Transformers gives every configuration (label names, what is returned, its own version) change no number.
    """
    ignored = HARMLESS_CONFIG_FIELDS | set(PreTrainedConfig().to_dict())

    def counted(fields: dict[str, Any]) -> dict[str, Any]:
        return {
            name: counted(value) if isinstance(value, dict) else value
            for name, value in fields.items()
            if name not in ignored
        }

    return counted(config.to_dict())


def _float32_precision(device_type: str) -> str:
    """How matrix products of float32 are computed on a type of device: "ieee" unless reduced precision is allowed."""
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    precision = backend.matmul.fp32_precision
    return "ieee" if precision == "none" else precision
