# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The table of known models: what a checkpoint's tensors do not say about it."""

import difflib
import json
from dataclasses import dataclass, fields
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from ..model.configuration_sparsepath_vit import SparsePathViTConfig

SOURCE_STYLES = ("timm", "transformers", "dinov2")
CONFIG_FIELDS = frozenset(
    {
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "mlp_type",
        "use_layerscale",
        "layer_norm_eps",
        "num_register_tokens",
        "patch_size",
        "image_size",
        "num_prefix_position_embeddings",
        "pooling",
    }
)


@dataclass(frozen=True)
class Architecture:
    """One known model, read from `configuration/architectures/NAME.json`.

    Args:
        name: the name used on the command line; also the file's name.
        title: the name its authors use.
        hub_id: repository on the Hugging Face Hub; `None` for a generic shape without a checkpoint.
        weights_file: the file of that repository that holds the weights, where it is not a standard name.
        licence: licence of the weights as their host declares it; `None` where there are no weights.
        gated: whether the Hub asks for a login and accepted terms; `None` where sources disagree.
        mpp: micrometres per pixel of the training tiles; empty where they are not stated.
        source_style: naming of the published tensors: `"timm"`, `"transformers"` or `"dinov2"` (Meta's own code).
        image_mean: channel means of the normalisation, images in [0, 1].
        image_std: channel standard deviations of the normalisation.
        reference: paper or model card to cite.
        note: what a user should know besides; `None` for nothing.
        config: fields of `SparsePathViTConfig`.
    """

    name: str
    title: str
    hub_id: str | None
    weights_file: str | None
    licence: str | None
    gated: bool | None
    mpp: tuple[float, ...]
    source_style: str | None
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    reference: str | None
    note: str | None
    config: dict[str, Any]

    def __post_init__(self) -> None:
        if self.source_style is not None and self.source_style not in SOURCE_STYLES:
            self._refuse("source_style", f"one of {', '.join(SOURCE_STYLES)} or null")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            self._refuse("image_std", "three means and three positive standard deviations")
        if any(value <= 0 for value in self.mpp):
            self._refuse("mpp", "positive micrometres per pixel")
        if set(self.config) != CONFIG_FIELDS:
            self._refuse("config", f"exactly the fields {', '.join(sorted(CONFIG_FIELDS))}")
        if self.hub_id is not None and None in (self.licence, self.source_style, self.reference):
            self._refuse("hub_id", "a licence, a source_style and a reference beside it")
        self.build_config()

    def _refuse(self, field: str, wanted: str) -> None:
        raise ValueError(
            f"Architecture {self.name!r}: {field}={getattr(self, field)!r} is not possible; wanted {wanted}."
        )

    @property
    def has_checkpoint(self) -> bool:
        """Whether weights are published; `False` for the generic shapes."""
        return self.hub_id is not None

    def build_config(self, **overrides: Any) -> SparsePathViTConfig:
        """The model's configuration, with any field replaced.

        Args:
            **overrides: fields of `SparsePathViTConfig`, for example `prune_ratio=0.6`.

        Raises:
            ValueError: a value is not possible.
        """
        normalisation = {"image_mean": list(self.image_mean), "image_std": list(self.image_std)}
        return SparsePathViTConfig(**{**self.config, **normalisation, **overrides})


def parse_architecture(text: str) -> Architecture:
    """One architecture from the JSON text of its file.

    Args:
        text: the file's content.

    Raises:
        ValueError: not JSON, a field is missing or unknown, or a value is not possible.
    """
    values = json.loads(text)
    wanted = {field.name for field in fields(Architecture)}
    if set(values) != wanted:
        raise ValueError(
            f"Architecture {values.get('name')!r}: missing fields {sorted(wanted - set(values))}, "
            f"unknown fields {sorted(set(values) - wanted)}."
        )
    for name in ("mpp", "image_mean", "image_std"):
        values[name] = tuple(values[name])
    return Architecture(**values)


def _folder() -> Traversable:
    """Where the files are: in the package, or in a checkout that runs without being installed."""
    try:
        return resources.files("sparsepath_vit.architectures")
    except ModuleNotFoundError:
        return Path(__file__).parents[3] / "configuration" / "architectures"


@cache
def _table() -> dict[str, Architecture]:
    table = {}
    for entry in _folder().iterdir():
        if entry.name.endswith(".json"):
            parsed = parse_architecture(entry.read_text(encoding="utf-8"))
            if f"{parsed.name}.json" != entry.name:
                raise ValueError(f"Architecture file {entry.name} names its model {parsed.name!r}: rename one of them.")
            table[parsed.name] = parsed
    return dict(sorted(table.items()))


def known_architectures() -> tuple[Architecture, ...]:
    """Every known model, published checkpoints first, then the generic shapes; by name within each."""
    return tuple(sorted(_table().values(), key=lambda entry: (not entry.has_checkpoint, entry.name)))


def architecture(name: str) -> Architecture:
    """The known model of that name.

    Args:
        name: for example `"uni2-h"`; upper and lower case are the same.

    Raises:
        ValueError: the name is unknown; the message lists close names first, then all.

    Example:
    ```python
    >>> from sparsepath_vit.conversion import architecture

    >>> config = architecture("vit-tiny-14-reg4").build_config(window_size=8)
    ```
    """
    table = _table()
    found = table.get(name.lower())
    if found is None:
        close = difflib.get_close_matches(name.lower(), table, n=3)
        hint = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise ValueError(f"architecture={name!r} is unknown. {hint}Known: {', '.join(table)}.")
    return found


def architecture_of_hub_id(hub_id: str) -> Architecture | None:
    """The known model published under a Hub id, or `None`."""
    matches = (entry for entry in _table().values() if entry.hub_id and entry.hub_id.lower() == hub_id.lower())
    return next(matches, None)
