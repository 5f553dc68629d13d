# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Public names of a package that are imported when they are used (PEP 562)."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package whose names lie in its modules.

    The package also imports the names under `TYPE_CHECKING`, so that type checkers, editors and
    tests/test_layering.py see them.

    Args:
        package: its `__name__`.
        names: module of the package, relative to it (`"reader"`, `"model.token_grid"`) -> the names it defines.

    Example:
    ```python
    >>> __getattr__, __dir__ = lazy_names(__name__, {"reader": ("Slide",)})
    ```
    """
    module_of = {name: module for module, defined in names.items() for name in defined}

    def load(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{module_of[name]}", package), name)
        setattr(sys.modules[package], name, value)  # the next time it is found without this function
        return value

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return load, list_names
