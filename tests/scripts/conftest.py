# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import sys

import pytest


@pytest.fixture
def run_script(monkeypatch):
    """Runs a loaded script's `main` with command-line arguments."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
        script.main()

    return run
