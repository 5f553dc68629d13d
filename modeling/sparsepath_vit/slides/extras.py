# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Libraries of the `slides` extra are imported where they are used, with one error for all of them."""

import importlib
from types import ModuleType

from ..extras import install_command


def require(module: str) -> ModuleType:
    """Imports `module`, which the `slides` extra installs.

    Raises:
        ImportError: it is missing or its shared library does not load; the message gives the install command.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # openslide raises OSError-like errors where its library is missing
        raise ImportError(
            f"{module} is needed to work on slides and cannot be imported ({error}). "
            f"Install it with: {install_command('slides')}"
        ) from error
