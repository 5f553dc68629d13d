# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The structure, read from the source: who may import whom, what is reached from where, and how long files are."""

import ast
import sys
from typing import NamedTuple

import pytest
from bare_python import run_bare
from places import ROOT

from sparsepath_vit.model.remote_code import remote_code_files

LIBRARY = "sparsepath_vit"
MODEL = f"{LIBRARY}.model"
ALWAYS_THERE = {"torch", "numpy", "transformers", "huggingface_hub"}
MAY_BE_MISSING = {"triton", "torchvision", "PIL"}

# Folder -> the folders it may import beside itself; TYPE_CHECKING imports count. "" is the library's own __init__.py.
FOLDERS = {
    "model": set(),
    "version": set(),
    "checkpoints": {"model"},
    "runtime": {"model", "version"},
    "comparison": {"checkpoints", "model", "runtime"},
    "conversion": {"model", "runtime", "version"},
    "slides": {"model", "runtime", "version"},
    "tasks": {"model", "runtime", "slides", "version"},
    "tasks.classification": {"model", "runtime", "slides", "tasks", "version"},
    "tasks.segmentation": {"model", "runtime", "slides", "tasks", "version"},
    "tasks.panda": {"model", "runtime", "slides", "tasks", "tasks.classification"},
    "tasks.segpath": {"model", "runtime", "slides", "tasks", "tasks.segmentation"},
    "plugins": {"checkpoints", "model", "runtime"},
}

# What the lower files of the model may import; a name stands for itself and all names that begin with it and "_".
MODEL_ALLOWED = {
    "remote_code": set(),
    "configuration_sparsepath_vit": {"remote_code"},
    "operator_names": set(),
    "stratified_sampling": {"operator_names"},
    "token_grid": {"stratified_sampling"},
    "token_strips": {"token_grid"},
    "processes": set(),
    "token_shares": {"processes", "token_grid", "token_strips"},
    "context_tokens": {"stratified_sampling", "token_grid"},
    "mean_query_correction": {"token_grid"},
    "token_pruning": {
        *("processes", "prune_score_operator", "stratified_sampling", "token_grid", "token_shares", "token_strips"),
    },
    "prune_score": {
        *("attention_backend", "attention_precision", "fused_elementwise", "operator_names", "prune_score"),
        "token_grid",
    },
    "fused_elementwise": {"attention_precision", "attention_triton", "fused_elementwise"},
    "linear_products": {"attention_precision", "fused_elementwise"},
    "device_memory": set(),
    "host_compiler": set(),
    "attention": {
        *("attention", "context_tokens", "device_memory", "host_compiler", "mean_query_correction", "operator_names"),
        *("processes", "token_grid", "token_strips"),
    },
    "embeddings": {"configuration_sparsepath_vit", "patch_embeddings", "token_grid"},
    "streamed_prune_scores": {"linear_products", "processes", "prune_score_operator", "token_strips"},
    "streamed_context": {"attention", "context_tokens", "linear_products", "token_grid"},
    "streamed_layers": {
        *("attention", "configuration_sparsepath_vit", "embeddings", "linear_products", "streamed_context"),
        *("streamed_prune_scores", "token_grid", "token_shares", "token_strips"),
    },
    "pillow_images": set(),
    "image_inputs": {"pillow_images"},
    "patch_presence": {"image_inputs"},
    "image_settings": set(),
    "pixel_normalisation": set(),
    "image_processing_sparsepath_vit": {
        *("image_inputs", "image_settings", "patch_presence", "pixel_normalisation", "remote_code")
    },
    "patch_embeddings": {"configuration_sparsepath_vit", "pixel_normalisation"},
}

MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 40
MOST_LINES_OF_A_KERNEL = 120


class Import(NamedTuple):
    """One import statement: the absolute name of what is imported, and how it is protected."""

    target: str
    is_guarded: bool  # inside try: or if:
    is_for_types: bool  # inside if TYPE_CHECKING:
    is_at_import: bool  # not inside a function


def module_name(file):
    """`sparsepath_vit.slides.reader` for its file, `sparsepath_vit.slides` for its __init__.py."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[1:] if parts[0] == "modeling" else parts).removesuffix(".__init__")


def python_files(*folders):
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    # What lies beside the tiny checkpoint is data that Transformers reads, no module of the package.
    return {module_name(file): file for file in sorted(files) if not {"__pycache__", "tiny"} & set(file.parts)}


WHEEL = python_files("modeling/sparsepath_vit", "modeling/sparsepath")
BESIDE = python_files("scripts", "studies")
FILES = WHEEL | BESIDE


def targets_of(node, name, file):
    """What an import statement of the module `name` imports, by absolute names; modules of ours where they are."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    module = node.module or ""
    if node.level:
        package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
        module = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
    inner = [f"{module}.{alias.name}" for alias in node.names]
    return [target if target in FILES else module for target in inner]


def imports_of(name):
    """All imports of a module."""
    found, file = [], FILES[name]

    def visit(node, guarded, types, at_import):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.extend(Import(target, guarded, types, at_import) for target in targets_of(node, name, file))
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


IMPORTS = {name: imports_of(name) for name in FILES}
INNER = {name: {entry.target for entry in entries if entry.target in FILES} for name, entries in IMPORTS.items()}
SHIPPED = sorted(name.removeprefix(f"{MODEL}.") for name in WHEEL if name.startswith(f"{MODEL}."))


def folder_of(name):
    """The folder of `FOLDERS` a module of the library lies in."""
    inner = name.removeprefix(LIBRARY).removeprefix(".")
    return max((folder for folder in FOLDERS if f"{inner}.".startswith(f"{folder}.")), key=len, default="")


def is_one_of(name, allowed):
    return any(name == other or name.startswith(f"{other}_") for other in allowed)


def test_the_modules_are_found():
    assert {"configuration_sparsepath_vit", "token_grid", "attention_triton", "image_inputs"} <= set(SHIPPED)
    assert f"{LIBRARY}.slides.backends" in INNER[f"{LIBRARY}.slides.reader"]
    assert folder_of(f"{LIBRARY}.tasks.panda.rois") == "tasks.panda"
    assert "sparsepath.app" in INNER["sparsepath.__main__"]


def test_exactly_the_model_folder_travels_to_the_hub():
    assert sorted(file.stem for file in remote_code_files()) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_import_only_each_other_and_what_is_always_there(name):
    for entry in IMPORTS[f"{MODEL}.{name}"]:
        root = entry.target.split(".")[0]
        if root == LIBRARY:
            assert entry.target.removeprefix(f"{MODEL}.") in SHIPPED, f"{name} imports {entry.target}"
        elif root not in sys.stdlib_module_names and root not in ALWAYS_THERE:
            assert entry.is_guarded, f"{name} imports {entry.target} without try: or if:"
            assert root in MAY_BE_MISSING


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_name_their_siblings_as_the_remote_code_scanner_can_read(name):
    tree = ast.parse(FILES[f"{MODEL}.{name}"].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1
            assert node.level == 0 or (node.module and "." not in node.module)
            assert (node.module or "").split(".")[0] != LIBRARY
    docstrings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    lines = [line.strip() for text in docstrings if isinstance(text, str) for line in text.splitlines()]
    assert not [line for line in lines if line.startswith(("from .", "import ."))]


@pytest.mark.parametrize("lower", sorted(MODEL_ALLOWED))
def test_lower_files_of_the_model_import_only_what_lies_below_them(lower):
    names = [name for name in SHIPPED if is_one_of(name, {lower})]
    assert names
    for name in names:
        others = {other.removeprefix(f"{MODEL}.") for other in INNER[f"{MODEL}.{name}"]}
        forbidden = [other for other in others if not is_one_of(other, MODEL_ALLOWED[lower])]
        assert not forbidden, f"{name} imports {forbidden}"


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_a_folder_imports_only_the_folders_it_may(folder):
    names = [name for name in WHEEL if name.startswith(LIBRARY) and folder_of(name) == folder]
    assert names, "FOLDERS names a folder that is no more"
    for name in names:
        forbidden = {
            other
            for other in INNER[name]
            if not other.startswith(LIBRARY) or folder_of(other) not in FOLDERS[folder] | {folder}
        }
        assert not forbidden - {LIBRARY}, f"{name} imports {forbidden}"
        assert LIBRARY not in INNER[name], f"{name} imports the package it is part of"


def test_every_folder_has_a_rule_and_folders_form_no_circle():
    assert {folder_of(name) for name in WHEEL if name.startswith(f"{LIBRARY}.")} == set(FOLDERS)
    finished = set()

    def follow(folder, path):
        assert folder not in path, " -> ".join([*path, folder])
        if folder not in finished:
            for other in FOLDERS[folder]:
                follow(other, [*path, folder])
            finished.add(folder)

    for folder in FOLDERS:
        follow(folder, [])


def test_nothing_imports_the_command_line_the_scripts_the_studies_or_the_tests():
    for name in WHEEL:
        roots = {entry.target.split(".")[0] for entry in IMPORTS[name]}
        assert not roots & {"scripts", "studies", "tests"}, name
        assert name.startswith("sparsepath.") or name == "sparsepath" or "sparsepath" not in roots, name


def test_no_module_imports_itself_in_a_circle():
    edges = {
        name: {entry.target for entry in IMPORTS[name] if entry.target in FILES and entry.is_at_import}
        for name in FILES
    }
    types_only = {name: {entry.target for entry in IMPORTS[name] if entry.is_for_types} for name in FILES}
    finished = set()

    def follow(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in finished:
            for other in edges[name] - types_only[name] - {name}:
                follow(other, [*path, name])
            finished.add(name)

    for name in edges:
        follow(name, [])


def programs_of(name):
    """Modules that a module names in a text: programs that it starts in another process."""
    texts = [node.value for node in ast.walk(ast.parse(FILES[name].read_text())) if isinstance(node, ast.Constant)]
    words = {word for text in texts if isinstance(text, str) for word in text.split()}
    return words & set(WHEEL)


def test_every_module_of_the_wheel_is_reached_from_the_public_names_the_command_line_or_the_tasks():
    roots = {name for name in WHEEL if FILES[name].name == "__init__.py"} | {"sparsepath.__main__"}
    reached, waiting = set(), list(roots)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += INNER[name] | programs_of(name)
    assert not sorted(set(WHEEL) - reached)


def test_no_name_of_a_package_hides_a_module_of_it():
    """`import package.thing as module` would give the other thing."""
    for name, file in FILES.items():
        if file.name == "__init__.py":
            inner = {other.removeprefix(f"{name}.") for other in FILES if other.startswith(f"{name}.")}
            body = ast.parse(file.read_text()).body
            imported = [alias for node in body if isinstance(node, ast.ImportFrom) for alias in node.names]
            names = {alias.asname or alias.name for alias in imported}
            names |= {node.name for node in body if isinstance(node, ast.FunctionDef)}
            assert not inner & names, name


def functions_of(name):
    """(name, lines, is a kernel) of the functions of a module."""
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            # What a reader has to hold in mind: the statements, not the documentation of the arguments.
            has_docstring = ast.get_docstring(node) is not None
            documentation = node.body[0].end_lineno - node.body[0].lineno + 1 if has_docstring else 0
            yield node.name, node.end_lineno - node.lineno + 1 - documentation, is_kernel


@pytest.mark.parametrize("name", sorted(FILES))
def test_source_files_stay_readable(name):
    assert len(FILES[name].read_text().splitlines()) <= MOST_LINES_OF_A_FILE
    for function, lines, is_kernel in functions_of(name):
        assert lines <= (MOST_LINES_OF_A_KERNEL if is_kernel else MOST_LINES_OF_A_FUNCTION), f"{function}: {lines}"


IMPORT_EACH = """
import importlib, sys
from shipped import attention_backends
for name in sys.argv[1:]:
    try:
        importlib.import_module(f"shipped.{name}")
    except ImportError as error:
        assert name.startswith("attention_triton_") or name.endswith("_triton"), error
        assert "triton" in str(error).lower(), error
print(attention_backends.describe_block_attention_backend("cpu"))
assert not {"triton", "torchvision"} & set(sys.modules)
"""


def test_shipped_files_load_without_triton_and_torchvision(tmp_path):
    (tmp_path / "shipped").mkdir()
    for file in remote_code_files():
        (tmp_path / "shipped" / file.name).symlink_to(file)
    assert "Triton is not installed" in run_bare(IMPORT_EACH, SHIPPED, tmp_path)
