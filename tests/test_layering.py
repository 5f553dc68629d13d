# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Who may import whom, read from the source; and that the shipped files load without triton and torchvision."""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from bare_python import run_bare

import sparsepath_vit
from sparsepath_vit.remote_code import remote_code_files

PACKAGE = Path(sparsepath_vit.__file__).parent
SHIPPED = {file.stem for file in remote_code_files()}
MODEL_FILES = {"embeddings", "encoder_sparsepath_vit", "modeling_outputs_sparsepath_vit", "modeling_sparsepath_vit"}
MODEL_FILES |= {name for name in SHIPPED if "segmentation" in name or "modeling" in name}
ALWAYS_THERE = {"torch", "numpy", "transformers", "huggingface_hub"}

# What the lower layers may import of this package; a name stands for itself and all names that begin with it and "_".
ALLOWED = {
    "configuration_sparsepath_vit": set(),
    "token_grid": set(),
    "token_pruning": {"token_grid"},
    "block_attention": {"block_attention", "token_grid"},
    "embeddings": {"configuration_sparsepath_vit", "token_grid"},
    "image_inputs": set(),
    "patch_presence": {"image_inputs"},
    "image_processing_sparsepath_vit": {"image_inputs", "patch_presence"},
}


class Import(NamedTuple):
    """One import statement: the absolute name of what is imported, and how it is protected."""

    target: str
    is_guarded: bool  # inside try: or if:
    is_for_types: bool  # inside if TYPE_CHECKING:
    is_at_import: bool  # not inside a function


def module_name(file):
    """`slides.reader` for slides/reader.py, `slides` for slides/__init__.py, nothing for the package's own."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


FILES = {module_name(file): file for file in PACKAGE.rglob("*.py") if "__pycache__" not in file.parts}


def targets_of(node, file):
    """What an import statement imports; modules of this package by their name in it, with a leading dot."""
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    if node.level:
        folder = file.relative_to(PACKAGE).parent.parts
        module = ".".join([*folder[: len(folder) - node.level + 1], *filter(None, [node.module])])
    elif node.module.split(".")[0] == "sparsepath_vit":
        module = node.module.removeprefix("sparsepath_vit").removeprefix(".")
    else:
        return [node.module]
    modules = [f"{module}.{name.name}".removeprefix(".") for name in node.names]
    return ["." + (inner if inner in FILES else module) for inner in modules]


def imports_of(file):
    """All imports of a file."""
    found = []

    def visit(node, guarded, types, at_import):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.extend(Import(target, guarded, types, at_import) for target in targets_of(node, file))
        is_type_check = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            visit(
                child,
                guarded or isinstance(node, ast.If | ast.Try),
                types or is_type_check,
                at_import and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef),
            )

    visit(ast.parse(file.read_text()), False, False, True)
    return found


INNER = {
    name: {entry.target[1:] for entry in imports_of(file) if entry.target.startswith(".") and not entry.is_for_types}
    for name, file in FILES.items()
}


def is_one_of(name, allowed):
    return any(name == other or name.startswith(f"{other}_") for other in allowed)


def test_the_shipped_files_are_found():
    assert {"configuration_sparsepath_vit", "token_grid", "block_attention_triton", "image_inputs"} <= SHIPPED
    assert {"modeling_sparsepath_vit", "token_pruning"} <= INNER[""] | INNER["encoder_sparsepath_vit"]
    assert "slides.backends" in INNER["slides.reader"]


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_files_import_only_each_other_and_what_is_always_there(name):
    for entry in imports_of(FILES[name]):
        root = entry.target.split(".")[0]
        if entry.target.startswith("."):
            assert entry.target[1:] in SHIPPED, f"{name} imports {entry.target}, which is not shipped with it"
            assert entry.target.count(".") == 1
        elif root not in sys.stdlib_module_names and root not in ALWAYS_THERE:
            assert entry.is_guarded, f"{name} imports {entry.target} without try: or if:"
            assert root in {"triton", "torchvision", "PIL"}


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_shipped_files_name_their_siblings_as_the_remote_code_scanner_can_read(name):
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1
            assert node.level == 0 or (node.module and "." not in node.module)
            assert (node.module or "").split(".")[0] != "sparsepath_vit"
    docstrings = [node.value for node in ast.walk(ast.parse(FILES[name].read_text())) if isinstance(node, ast.Constant)]
    lines = [line.strip() for text in docstrings if isinstance(text, str) for line in text.splitlines()]
    assert not [line for line in lines if line.startswith(("from .", "import ."))]


@pytest.mark.parametrize("lower", sorted(ALLOWED))
def test_lower_layers_import_only_what_lies_below_them(lower):
    names = [name for name in FILES if is_one_of(name, {lower})]
    assert names
    for name in names:
        forbidden = [other for other in INNER[name] if not is_one_of(other, ALLOWED[lower])]
        assert not forbidden, f"{name} imports {forbidden}"


def test_slides_and_image_processing_do_not_need_the_model():
    for name in FILES:
        if name.startswith(("slides", "image_", "patch_presence")):
            assert not INNER[name] & MODEL_FILES, name


def test_nothing_imports_the_command_line_or_the_scripts():
    for name, others in INNER.items():
        assert name == "cli" or "cli" not in others, name
    for file in FILES.values():
        assert not [entry.target for entry in imports_of(file) if entry.target.split(".")[0] in {"scripts", "tests"}]


def test_no_module_imports_itself_in_a_circle():
    edges = {}
    for name, file in FILES.items():
        entries = [entry for entry in imports_of(file) if entry.target.startswith(".") and entry.is_at_import]
        edges[name] = {entry.target[1:] for entry in entries if not entry.is_for_types} - {""}
    finished = set()

    def follow(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in finished:
            for other in edges.get(name, ()):
                follow(other, [*path, name])
            finished.add(name)

    for name in edges:
        follow(name, [])


def test_source_files_stay_readable():
    """DESIGN: files under about 400 lines."""
    long_files = {name: len(file.read_text().splitlines()) for name, file in FILES.items()}
    assert not {name: lines for name, lines in long_files.items() if lines > 500}


IMPORT_EACH = """
import importlib, sys
from shipped import block_attention
for name in sys.argv[1:]:
    try:
        importlib.import_module(f"shipped.{name}")
    except ImportError as error:
        assert name in ("block_attention_triton", "block_attention_kernels") and "triton" in str(error).lower(), error
print(block_attention.describe_block_attention_backend("cpu"))
assert not {"triton", "torchvision"} & set(sys.modules)
"""


def test_shipped_files_load_without_triton_and_torchvision(tmp_path):
    (tmp_path / "shipped").mkdir()
    for file in remote_code_files():
        (tmp_path / "shipped" / file.name).symlink_to(file)
    assert "Triton is not installed" in run_bare(IMPORT_EACH, sorted(SHIPPED), tmp_path)
