# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Without an extra's libraries every script and study says which extra is missing and how to install it."""

from pathlib import Path

import pytest
from bare_python import run_bare
from places import ROOT, SCRIPTS

import sparsepath_vit
from sparsepath_vit.runtime.extras import imports_of_extra

# The libraries of pyproject.toml's extras, as they are imported.
EXTRAS = ("datasets", "evaluate", "matplotlib", "peft", "scipy", "skimage", "sklearn", "torchmetrics")
EXTRAS += ("h5py", "imagecodecs", "onnx", "openslide", "tifffile", "timm")
NEEDS_NO_EXTRA = {"studies.stratified_draw", "gpu_acceptance", "kernel_repository", "benchmark", "push_to_hub"}
NEEDS_NO_EXTRA |= {"interop_tests"}
OTHER_EXTRAS = {"studies.real_weights": "studies", "benchmark_viewer": "view"}  # not `train`

ASK_EACH_FOR_HELP = """
import contextlib, io, runpy, sys
for name in sys.argv[1:]:
    sys.argv = [name, "--help"]
    printed = io.StringIO()
    run = runpy.run_path if name.endswith(".py") else runpy.run_module
    try:
        with contextlib.redirect_stdout(printed):
            run(name, run_name="__main__")
    except SystemExit as ending:
        print(name, "|", ending.code or printed.getvalue().split()[0])
"""


def test_every_script_and_study_names_the_missing_extra_and_its_command(tmp_path):
    """Regression: scripts ended in the traceback of a ModuleNotFoundError, also when asked for --help."""
    (tmp_path / "sparsepath_vit").symlink_to(Path(sparsepath_vit.__file__).parent)
    (tmp_path / "studies").symlink_to(ROOT / "studies")
    studies = sorted(f"studies.{path.parent.name}" for path in (ROOT / "studies").glob("*/__main__.py"))
    scripts = [*sorted(SCRIPTS.glob("*.py")), *studies, "studies.make_figures"]
    absent = ("sparsepath_vit", "__editable__", *EXTRAS)
    lines = run_bare(ASK_EACH_FOR_HELP, scripts, tmp_path, absent).splitlines()
    said = dict(line.split(" | ") for line in lines)
    assert said.keys() == set(map(str, scripts))
    for name, message in said.items():
        if {name, Path(name).stem} & NEEDS_NO_EXTRA:
            assert message == "usage:"
        else:
            extra = next((OTHER_EXTRAS[key] for key in (name, Path(name).stem) if key in OTHER_EXTRAS), "train")
            assert message.startswith(f"error: this script needs the extra '{extra}', and ")
            assert message.endswith(f'Install it with: pip install "sparsepath-vit[{extra}]"')


def test_modules_that_are_used_later_are_asked_for_at_once():
    wanted = r"no_such_module cannot be imported.*pip install .sparsepath-vit\[slides\]"
    with pytest.raises(SystemExit, match=wanted), imports_of_extra("slides", "json", "no_such_module"):
        pass


def test_a_fault_of_this_package_is_not_taken_for_a_missing_library():
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), imports_of_extra("train"):
        import sparsepath_vit.no_such_module  # noqa: F401
