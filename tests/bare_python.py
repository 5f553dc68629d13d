# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Runs code where this package, triton and torchvision are not installed."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import transformers
from packaging.version import Version

ABSENT = ("sparsepath_vit", "__editable__", "triton", "torchvision")
# Without torchvision, Transformers 5.17 has no AutoImageProcessor for any model.
ABSENT_BESIDE_IMAGE_PROCESSOR = ABSENT if Version(transformers.__version__) >= Version("5.18") else ABSENT[:-1]


def run_bare(code, arguments, folder, absent=ABSENT):
    """Runs `code` in a Python that sees all installed packages but the absent ones, and modules lying in `folder`.

    Returns what it printed; fails where the code does.
    """
    packages = folder / "installed_packages"
    packages.mkdir()
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(absent):
            (packages / path.name).symlink_to(path)
    variables = {
        "PYTHONPATH": os.pathsep.join([str(packages), str(folder)]),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
    }
    # -S: without site, hence without the .pth files that put the installed package on the path.
    command = [sys.executable, "-S", "-c", code, *map(str, arguments)]
    run = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, cwd=folder)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout
