# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Scripts are files, not a package: tests load them by path and call their `main`. Studies are modules."""

import importlib
import importlib.util

from places import SCRIPTS


def load_script(name):
    specification = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def load_study(name):
    """The module that `python -m studies.NAME` runs."""
    return importlib.import_module(f"studies.{name}.__main__")
