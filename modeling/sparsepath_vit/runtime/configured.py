# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A model with other settings for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..model.pretrained_model import SparsePathViTPreTrainedModel


@contextmanager
def configured(model: "SparsePathViTPreTrainedModel", **settings: Any) -> Iterator[None]:
    """Sets fields of the model's configuration for a while.

    Args:
        model: any model of the family.
        **settings: fields of `SparsePathViTConfig`, for example `window_size=None`.
    """
    previous = {name: getattr(model.config, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(model.config, name, value)
        yield
    finally:
        for name, value in previous.items():
            setattr(model.config, name, value)
