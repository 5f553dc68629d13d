# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Scripts are files, not a package: tests load them by path and call their `main` with arguments."""

import importlib.util
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load_script(name):
    specification = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
