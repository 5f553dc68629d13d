# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import logging
import os
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from hypothesis import HealthCheck, settings
from packaging.version import Version

# Triton 3.6, which torch 2.11 requires, reads loop bounds in its interpreter in a way NumPy 2.4 refuses.
interpreter_works = find_spec("triton") and (
    Version(version("triton")) >= Version("3.7") or Version(version("numpy")) < Version("2.4")
)
# Without a GPU the Triton kernels run interpreted. Triton asks for this once, when it is imported.
if interpreter_works and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples in every run: a failure in CI is a failure on every machine.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def same_start():
    # Threads of small operations wait for each other, on a busy machine for longer than they compute.
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def warnings_said(caplog):
    """Calls a function and returns the warnings it logged, as if nothing had been warned of before."""

    def said_by(function):
        logging.Logger.warning_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            function()
        return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]

    yield said_by
    logging.Logger.warning_once.cache_clear()


@pytest.fixture
def block_attention_backend():
    """Sets the backend of block_sparse attention for one test."""
    from sparsepath_vit import set_block_attention_backend

    yield set_block_attention_backend
    set_block_attention_backend("auto")
