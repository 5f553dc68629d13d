# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A foundation model's checkpoint -> a SparsePathViT folder for `from_pretrained`."""

from dataclasses import dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import logging

from ..model.configuration_sparsepath_vit import SparsePathViTConfig
from ..model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
from ..runtime.atomic_files import atomic_folder
from .architectures import Architecture
from .architectures import architecture as find_architecture
from .mapping import MappingPlan, check_parameters, infer_structure, plan_mapping
from .model_card import write_model_card
from .source_config import read_resampling, read_source_config, read_source_normalisation, read_source_structure
from .sources import CheckpointSource, open_source
from .weights import SAFETENSORS_TYPES, StackedTensor, write_safetensors

logger = logging.get_logger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHTS_FILE = "model.safetensors"
# A known model is the same network whether its file stores a position embedding for CLS or has it added to the token,
# and at whatever grid its position embeddings are stored: here the tensors decide.
_FIELDS_OF_THE_FILE = ("num_prefix_position_embeddings", "image_size")


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Args:
        source: the Hub id, or the name of the file or folder.
        output_dir: the new folder.
        known: the known model, if it is one.
        config: the configuration that was written.
        num_parameters: number of weights.
        dtype: their type.
        ignored: source tensors that the backbone has no use for -> why.
    """

    source: str
    output_dir: Path
    known: Architecture | None
    config: SparsePathViTConfig
    num_parameters: int
    dtype: torch.dtype
    ignored: dict[str, str]

    def __str__(self) -> str:
        name = "unknown model" if self.known is None else self.known.title
        lines = [
            f"{self.source} ({name}) -> {self.output_dir}",
            f"  {self.num_parameters:,} parameters in {str(self.dtype).removeprefix('torch.')}, "
            f"{self.config.num_hidden_layers} layers of width {self.config.hidden_size}",
        ]
        lines += [f"  not used: {tensor} ({reason})" for tensor, reason in self.ignored.items()]
        return "\n".join(lines)


def convert_checkpoint(
    source: str | Path,
    output_dir: str | Path,
    *,
    architecture: str | None = None,
    dtype: str | torch.dtype | None = None,
    image_mean: tuple[float, ...] | None = None,
    image_std: tuple[float, ...] | None = None,
    overwrite: bool = False,
    **config_overrides: Any,
) -> ConversionReport:
    """Converts a timm, DINOv2 or Transformers vision transformer into a SparsePathViT folder.

    The weights are renamed (and query, key and value stacked where they come apart), never changed, and every tensor
    is used exactly once. Shapes are read from the tensors; the head count and what else they do not say comes from
    `config_overrides`, the table of known models, or the source's `config.json`, in this order. The output appears
    whole or not at all: weights, configurations, a model card with source and licence, and the model's source files
    for `trust_remote_code=True`. Memory holds one tensor at a time beside the source file's mapping.

    Args:
        source: a `.safetensors`, `.bin`, `.pth` or `.pt` file, a folder with one (shards included), a Hub id, or the
            name of a known model. Pickles are read with `weights_only=True`.
        output_dir: the new folder; must not exist, or be empty.
        architecture: a name of the table of known models; needed for a local file of such a model.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or `None` to keep the source's.
        image_mean: channel means of the normalisation, where the table does not know them.
        image_std: channel standard deviations, likewise.
        overwrite: replace an earlier conversion in `output_dir`.
        **config_overrides: fields of `SparsePathViTConfig`, for example `num_attention_heads=12` or `window_size=None`.

    Raises:
        ValueError: the source cannot be read or is refused, its tensors do not fit, a field contradicts them, the
            architecture is unknown, or `output_dir` is in use. The message lists names and says what to do.
        OSError: the Hub cannot be reached or refuses access; the message says how to authenticate.

    Example:
    ```python
    >>> from sparsepath_vit.conversion import convert_checkpoint

    >>> report = convert_checkpoint("pytorch_model.bin", "uni2-h-sparse", architecture="uni2-h", prune_ratio=0.6)
    ```
    """
    output_dir = Path(output_dir).expanduser()
    _check_output(output_dir, Path(source).expanduser(), overwrite)
    wanted_dtype = _parse_dtype(dtype)
    opened, known = _open_known(source, architecture)
    plan = plan_mapping(opened.shapes)
    config = build_config(opened, plan, known, config_overrides)
    check_parameters(plan, config)
    parameters = _stack_parameters(opened, plan, wanted_dtype)
    config.architectures = ["SparsePathViTModel"]
    # Of mixed types the widest, since loading casts all parameters to it.
    config.dtype = reduce(torch.promote_types, (parameter.dtype for parameter in parameters.values()))
    processor = _image_processor(opened, known, config, image_mean, image_std)
    config.image_mean, config.image_std = list(processor.image_mean), list(processor.image_std)
    with atomic_folder(output_dir) as folder:
        write_safetensors(folder / WEIGHTS_FILE, parameters)
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_model_card(folder, opened.label, known, config, processor, plan.ignored)
    num_parameters = sum(tensor.num_elements for tensor in parameters.values())
    return ConversionReport(opened.label, output_dir, known, config, num_parameters, config.dtype, plan.ignored)


def build_config(
    opened: CheckpointSource, plan: MappingPlan, known: Architecture | None, overrides: dict[str, Any]
) -> SparsePathViTConfig:
    """The configuration of a checkpoint.

    Args:
        opened: the checkpoint.
        plan: the mapping of its tensors.
        known: the known model, if it is one.
        overrides: fields that the caller sets.

    Raises:
        ValueError: a field is unknown, contradicts the tensors, or the head count is known from nowhere.
    """
    possible = {field.name for field in fields(SparsePathViTConfig)}
    unknown = sorted(set(overrides) - possible)
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such field of SparsePathViTConfig.")
    structure = infer_structure(plan, overrides.get("num_prefix_position_embeddings"))
    if known is not None:
        theirs = {name: value for name, value in known.config.items() if name not in _FIELDS_OF_THE_FILE}
        _refuse_contradictions(structure, theirs, f"architecture={known.name!r} says", "Leave the architecture out.")
    else:
        theirs = read_source_structure(opened, plan)
        remedy = "Tensors are missing, or it belongs to another model: then remove it."
        _refuse_contradictions(structure, theirs, f"the config.json of {opened.label} says", remedy)
    _refuse_contradictions(structure, overrides, "the argument says", "Leave it out.")
    known_fields = {} if known is None else {k: v for k, v in known.config.items() if k not in structure}
    source_fields = {} if known is not None else read_source_config(opened, plan, structure)
    values = {**structure, **read_resampling(plan, known), **source_fields, **known_fields, **overrides}
    if "num_attention_heads" not in values:
        raise ValueError(
            f"The head count of {opened.label} is not known: tensors do not say it. Pass architecture=... (`sparsepath "
            "models` lists the known ones), num_attention_heads=..., or put the model's config.json beside the weights."
        )
    try:
        return SparsePathViTConfig(**values)
    except StrictDataclassFieldValidationError as error:
        raise ValueError(f"The configuration of {opened.label} is not possible. {error}") from error


def _refuse_contradictions(structure: dict[str, Any], values: dict[str, Any], who: str, remedy: str) -> None:
    wrong = [
        f"{name}: the tensors say {structure[name]!r}, {who} {values[name]!r}"
        for name in structure
        if name in values and values[name] != structure[name]
    ]
    if wrong:
        raise ValueError(f"The checkpoint is a different model. {'; '.join(wrong)}. {remedy}")


def _open_known(source: str | Path, architecture: str | None) -> tuple[CheckpointSource, Architecture | None]:
    """The opened checkpoint and the known model it is: the one that the caller names, or the one of its Hub id."""
    named = None if architecture is None else find_architecture(architecture)
    opened = open_source(source, named)
    if str(opened.config.get("model_type")).startswith(SparsePathViTConfig.model_type):
        raise ValueError(
            f"source={str(source)!r} is a converted checkpoint already: load it, or convert the file that its "
            "authors publish."
        )
    if named is not None and opened.known is not None and named != opened.known:
        raise ValueError(
            f"architecture={named.name!r} does not fit {opened.label}, which is {opened.known.name!r}: leave it out."
        )
    return opened, named or opened.known


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not possible: choose {', '.join(DTYPES)}, or None to keep the source's.")
    return DTYPES[dtype]


def _image_processor(
    opened: CheckpointSource,
    known: Architecture | None,
    config: SparsePathViTConfig,
    image_mean: tuple[float, ...] | None,
    image_std: tuple[float, ...] | None,
) -> SparsePathViTImageProcessor:
    """The processor with the source's normalisation."""
    mean, std = (known.image_mean, known.image_std) if known is not None else read_source_normalisation(opened)
    mean, std = image_mean or mean, image_std or std
    if mean is None or std is None:
        logger.warning(
            f"The normalisation of {opened.label} is not known; the ImageNet mean and standard deviation are written. "
            "Pass image_mean and image_std if it was trained with others."
        )
        mean, std = mean or IMAGENET_DEFAULT_MEAN, std or IMAGENET_DEFAULT_STD
    return SparsePathViTImageProcessor(image_mean=list(mean), image_std=list(std), patch_size=config.patch_size)


def _stack_parameters(
    opened: CheckpointSource, plan: MappingPlan, dtype: torch.dtype | None
) -> dict[str, StackedTensor]:
    """Every parameter of the model, still as the source's own tensors."""
    used = [name for names in plan.sources.values() for name in names]
    quantised = [name for name in used if opened.tensors[name].dtype not in SAFETENSORS_TYPES]
    if quantised:
        more = f" and {len(quantised) - 1} more tensors" if len(quantised) > 1 else ""
        raise ValueError(
            f"{quantised[0]}{more} is {opened.tensors[quantised[0]].dtype}: quantised weights cannot be converted. "
            "Take the original ones."
        )
    absent = [name for name in used if opened.tensors[name].layout != torch.strided or opened.tensors[name].is_meta]
    if absent:
        raise ValueError(f"{', '.join(absent[:20])}: sparse or without content, not plain tensors of weights.")
    parameters = {}
    for target, names in plan.sources.items():
        parts = tuple(opened.tensors[name] for name in names)
        parameters[target] = StackedTensor(parts, dtype or reduce(torch.promote_types, (part.dtype for part in parts)))
    return parameters


def _check_output(output_dir: Path, source: Path, overwrite: bool) -> None:
    if not output_dir.exists():
        return
    if not output_dir.is_dir():
        raise ValueError(f"output_dir={output_dir.name!r} is a file: name a folder.")
    if source.exists() and output_dir.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"output_dir={output_dir.name!r} holds the source: name another folder.")
    if not any(output_dir.iterdir()):
        return
    if not overwrite:
        raise ValueError(
            f"output_dir={output_dir.name!r} exists and is not empty: name another, or pass overwrite=True."
        )
    if not (output_dir / "config.json").is_file() or not (output_dir / WEIGHTS_FILE).is_file():
        raise ValueError(
            f"output_dir={output_dir.name!r} is no earlier conversion (no config.json with {WEIGHTS_FILE}), so it is "
            "not overwritten: empty it yourself or name another."
        )
