# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Results that print as what they hold, not as pages of numbers."""

import dataclasses
from typing import Any

_LONGEST = 60


class ShortRepr:
    """For a dataclass with arrays: its `repr` names shapes and types of arrays, and cuts other long values off.

    Example:
    ```python
    >>> embedding
    Embedding(pooled=(1536,) float32, patch_features=None, patch_positions=(4201, 2) int32, ...)
    ```
    """

    def __repr__(self) -> str:
        fields = ", ".join(f"{field.name}={_short(getattr(self, field.name))}" for field in dataclasses.fields(self))
        return f"{type(self).__name__}({fields})"


def _short(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}" if value.shape else repr(value)
    if isinstance(value, list | tuple) and len(repr(value)) > _LONGEST:
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
