# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import dataclasses
import importlib.util
import json
import re
import sys
import tomllib

import pytest
import torch
from run_script import load_script

from sparsepath_vit import TokenGrid, block_attention

kernel_repository = load_script("kernel_repository")
KERNEL_NAME, export_kernel = kernel_repository.KERNEL_NAME, kernel_repository.export_kernel


def load_build(repository):
    """What the `kernels` library does with a build: it imports the package under the id of its metadata."""
    build = repository / "build" / "torch-universal"
    metadata = json.loads((build / "metadata.json").read_text())
    package = build / metadata["name"].replace("-", "_") / "__init__.py"
    spec = importlib.util.spec_from_file_location(metadata["id"], package)
    module = importlib.util.module_from_spec(spec)
    sys.modules[metadata["id"]] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return export_kernel(tmp_path_factory.mktemp("export") / "kernel")


def test_the_manifest_and_the_build_name_the_same_kernel(repository):
    general = tomllib.loads((repository / "build.toml").read_text())["general"]
    metadata = json.loads((repository / "build" / "torch-universal" / "metadata.json").read_text())
    assert general["name"] == metadata["name"] == KERNEL_NAME
    assert general["version"] == metadata["version"]
    assert general["license"] == metadata["license"] == "Apache-2.0"
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", KERNEL_NAME)
    assert metadata["id"].isidentifier()
    assert metadata["python-depends"] == []


def test_sources_and_build_are_the_same_and_import_only_torch_and_triton(repository):
    package = KERNEL_NAME.replace("-", "_")
    sources = {path.name: path.read_text() for path in (repository / "torch-ext" / package).iterdir()}
    build = {path.name: path.read_text() for path in (repository / "build" / "torch-universal" / package).iterdir()}
    assert sources == build
    imported = {
        match[1] for text in sources.values() for match in re.finditer(r"^\s*(?:from|import) ([\w.]+)", text, re.M)
    }
    siblings = {f".{name.removesuffix('.py')}" for name in sources}
    packages = {name.split(".")[0] for name in imported - siblings}
    assert packages - sys.stdlib_module_names == {"torch", "triton"}


def test_the_build_computes_what_the_package_computes(repository, monkeypatch):
    triton_attention = pytest.importorskip("sparsepath_vit.model.attention_triton_launch")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not triton_attention.IS_INTERPRETED:
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported")
    module = load_build(repository)
    # By itself it would choose the tiles where the kernel is interpreted.
    monkeypatch.setattr(sys.modules[f"{module.__name__}.attention_backends"], "_chosen_backend", "triton")
    grid = module.TokenGrid.create([(5, 4)], num_global_tokens=2, window_size=2, device=device)
    states = [torch.randn(1, 2, grid.num_tokens, 16, device=device).requires_grad_() for _ in range(3)]
    output = module.block_attention(*states, grid)
    own_grid = TokenGrid.create([(5, 4)], num_global_tokens=2, window_size=2, device=device)
    expected = block_attention(*states, own_grid)
    torch.testing.assert_close(output, expected)
    weights = torch.randn_like(output)
    gradients = torch.autograd.grad(output, states, weights)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, states, weights))


def test_copies_in_one_process_do_not_run_each_others_code(repository, monkeypatch):
    """Two versions may lay the operator's arguments out differently, and torch.library keeps the last of a name."""
    module = load_build(repository)
    copies = [
        sys.modules["sparsepath_vit.model.attention_backends"],
        sys.modules[f"{module.__name__}.attention_backends"],
    ]
    for number, copy in enumerate(copies):
        tiles = copy.BACKENDS["sdpa_tiles"]
        marked = dataclasses.replace(tiles, forward=lambda query, *rest, number=number: (query * 0 + number, None))
        monkeypatch.setitem(copy.BACKENDS, "sdpa_tiles", marked)
        monkeypatch.setattr(copy, "_chosen_backend", "sdpa_tiles")
    for number, package in enumerate((sys.modules["sparsepath_vit"], module)):
        grid = package.TokenGrid.create([(2, 2)], num_global_tokens=1, window_size=2)
        assert (package.block_attention(*[torch.randn(1, 1, 5, 16)] * 3, grid) == number).all()
    assert hasattr(torch.ops.sparsepath_vit, "block_attention")
    assert hasattr(getattr(torch.ops, module.__name__), "block_attention")


def test_the_build_computes_without_a_gpu(repository):
    module = load_build(repository)
    grid = module.TokenGrid.create([(5, 4)], num_global_tokens=2, window_size=2)
    states = torch.randn(3, 1, 2, grid.num_tokens, 16)
    own_grid = TokenGrid.create([(5, 4)], num_global_tokens=2, window_size=2)
    assert torch.equal(module.block_attention(*states, grid), block_attention(*states, own_grid))


def test_the_library_itself_loads_it(repository):
    kernels = pytest.importorskip("kernels")
    assert kernels.get_local_kernel(repository).TokenGrid


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"output_dir='.*' is not empty: remove it, or name another folder"):
        export_kernel(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"output_dir='.*note.txt' is a file: name a folder"):
        export_kernel(tmp_path / "note.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
