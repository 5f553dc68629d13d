# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The model card of a converted checkpoint: where the weights come from and under which licence."""

import json
from pathlib import Path

from ..model.configuration_sparsepath_vit import SparsePathViTConfig
from ..model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
from ..runtime.atomic_files import write_atomically
from .architectures import Architecture

# Licences that the Hub knows by identifier; the others are declared as "other" with their name.
HUB_LICENCES = frozenset({"apache-2.0", "mit", "cc-by-nc-nd-4.0"})

_TEMPLATE = """---
{metadata}
---

# {title}, converted to SparsePathViT

The weights of **{title}** ({origin}), renamed for SparsePathViT: block-local attention and token pruning for regions
of thousands of pixels. No weight was changed. With `window_size=None` and `prune_ratio=0` the model computes what the
source computes.

## Source and licence

| | |
|---|---|
| source | {origin} |
| licence of the weights | {licence} |
| reference | {reference} |
| training resolution | {mpp} |

{terms}
The model's source files in this folder are licensed under Apache-2.0.
{note}
## Use

```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("PATH_TO_THIS_FOLDER", trust_remote_code=True)
model = AutoModel.from_pretrained("PATH_TO_THIS_FOLDER", trust_remote_code=True)
outputs = model(**processor(image, return_tensors="pt"))
outputs.pooler_output  # (1, {pooled_size})
```

`trust_remote_code=True` is not needed where the `sparsepath-vit` package is installed and imported.

## Model

| | |
|---|---|
| layers, width, heads | {config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads} |
| MLP | {config.mlp_type}, {config.intermediate_size} wide |
| patch size, stored position grid | {config.patch_size} px, {grid} x {grid} |
| position embeddings at other sizes | {resampling} |
| global tokens | CLS and {config.num_register_tokens} registers |
| pooling | {config.pooling} |
| attention | {attention} |
| pruning | {pruning} |
| normalisation | mean {mean}, standard deviation {std} |

{ignored}
"""


def write_model_card(
    folder: Path,
    source: str,
    known: Architecture | None,
    config: SparsePathViTConfig,
    processor: SparsePathViTImageProcessor,
    ignored: dict[str, str],
) -> Path:
    """Writes README.md into the folder of a converted checkpoint.

    Args:
        folder: the checkpoint's folder.
        source: the Hub id, or the name of the file or folder that was converted.
        known: the known model, if it is one.
        config: the configuration that was written.
        processor: the image processor that was written.
        ignored: source tensors that were not used -> why.

    Returns:
        `Path`: the file.
    """
    origin = source if known is None or known.hub_id in (None, source) else f"{source}, published as {known.hub_id}"
    card = _TEMPLATE.format(
        metadata=_metadata(known),
        title=source if known is None else known.title,
        origin=f"`{origin}`",
        licence=_or_unknown(known and known.licence),
        reference=_or_unknown(known and known.reference),
        mpp=_resolution(known),
        terms=_terms(known),
        note="" if known is None or known.note is None else f"\n{known.note}\n",
        config=config,
        pooled_size=config.pooled_size,
        grid=config.image_size // config.patch_size,
        resampling=_resampling(config),
        attention=_attention(config),
        pruning=_pruning(config),
        mean=", ".join(map(str, processor.image_mean)),
        std=", ".join(map(str, processor.image_std)),
        ignored=_ignored(ignored),
    )
    path = folder / "README.md"
    path.write_text(card, encoding="utf-8")
    return path


def add_section(folder: Path, title: str, text: str) -> Path:
    """Puts a section at the end of a checkpoint's card, in place of one of the same title.

    Args:
        folder: the checkpoint's folder.
        title: of the section.
        text: Markdown below it.

    Returns:
        `Path`: the card.
    """
    path, heading = folder / "README.md", f"## {title}\n"
    before, _, rest = path.read_text(encoding="utf-8").partition(f"\n{heading}")
    _, next_heading, after = rest.partition("\n## ")
    write_atomically(path, f"{before.rstrip()}\n\n{heading}\n{text.strip()}\n{next_heading}{after}")
    return path


def _metadata(known: Architecture | None) -> str:
    fields: dict[str, str | list[str]] = {"library_name": "transformers", "pipeline_tag": "image-feature-extraction"}
    if known is None or known.licence is None:
        fields["license"] = "unknown"
    elif known.licence in HUB_LICENCES:
        fields["license"] = known.licence
    else:
        fields |= {"license": "other", "license_name": known.licence}
    if known is not None and known.hub_id is not None:
        fields["base_model"] = known.hub_id
    fields["tags"] = ["pathology", "sparsepath_vit", "sparse-attention"]
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in fields.items())


def _or_unknown(value: str | None) -> str:
    return value or "not known; look it up where the weights come from"


def _resolution(known: Architecture | None) -> str:
    if known is None or not known.mpp:
        return "not stated"
    return f"{', '.join(map(str, known.mpp))} micrometres per pixel"


def _terms(known: Architecture | None) -> str:
    if known is None or known.licence is None:
        return "The licence of the source governs these weights: find it before you use or pass them on."
    gated = " Its publisher asks every user to accept the terms." if known.gated else ""
    return (
        f"The licence of the source ({known.licence}) governs these weights.{gated} Most licences of pathology "
        "foundation models forbid redistribution: convert locally, and do not publish this folder unless the licence "
        "allows it."
    )


def _resampling(config: SparsePathViTConfig) -> str:
    antialiasing = "with" if config.position_antialias else "without"
    offset = config.position_interpolation_offset
    return f"bicubic, {antialiasing} antialiasing" + (f", with an offset of {offset:g} patches" if offset else "")


def _attention(config: SparsePathViTConfig) -> str:
    if config.window_size is None:
        return "dense"
    return (
        f"blocks of {config.window_size} x {config.window_size} patch tokens, neighbour radius {config.neighbor_radius}"
    )


def _pruning(config: SparsePathViTConfig) -> str:
    if not config.prunes:
        return "none"
    return f"{config.prune_ratio:.0%} of the patch tokens after layer {config.prune_after_layer}"


def _ignored(ignored: dict[str, str]) -> str:
    if not ignored:
        return "Every tensor of the source was used."
    return "Tensors of the source that were not used:\n\n" + "\n".join(
        f"- `{name}`: {reason}" for name, reason in ignored.items()
    )
