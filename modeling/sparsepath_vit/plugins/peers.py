# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The modules of other toolkits, and what a user reads where one is missing or of another version."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from packaging.version import Version


def import_peer(distribution: str, minimum: str, module: str) -> ModuleType:
    """Imports a module of another toolkit.

    Args:
        distribution: the toolkit's name on the package index.
        minimum: the oldest version that the adapter was tried with.
        module: what to import of it.

    Raises:
        ImportError: it is missing, older, or has no such module; the message says which version the adapter takes.
    """
    try:
        found = version(distribution)
    except PackageNotFoundError as error:
        raise ImportError(
            f"{distribution} is not installed, and this adapter is for {distribution}>={minimum}: see docs/interop.md."
        ) from error
    if Version(found) < Version(minimum):
        raise ImportError(f"{distribution} {found} is installed, and this adapter takes {distribution}>={minimum}.")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{distribution} {found} is installed, and {module}, which this adapter was written for with "
            f"{distribution} {minimum}, cannot be imported from it ({error})."
        ) from error
