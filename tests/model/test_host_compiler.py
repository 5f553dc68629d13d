# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""C that is compiled on the machine it runs on: kept, shared between processes, and what is said where it cannot be."""

import ctypes
import os
import stat
import subprocess
import sys

import pytest

from sparsepath_vit.model import attention_backends, attention_cpu, host_compiler
from sparsepath_vit.model.host_compiler import CompilationError, compiled_library, start_of_threads

SOURCE = "int twice(int number) { return 2 * number; }"
compiled_anew = compiled_library.__wrapped__


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sparsepath-vit" / "compiled"


@pytest.fixture
def compiler():
    try:
        return host_compiler._compiler()
    except CompilationError as error:
        pytest.skip(str(error))


def test_it_is_compiled_once_and_nothing_else_is_left(compiler, cache, monkeypatch):
    assert compiled_anew("numbers", SOURCE).twice(21) == 42
    (kept,) = cache.iterdir()
    assert kept.name.startswith("numbers-") and stat.S_IMODE(cache.stat().st_mode) == 0o700
    monkeypatch.setattr(host_compiler, "_compile", lambda *rest: pytest.fail("compiled again"))
    assert compiled_anew("numbers", SOURCE).twice(4) == 8


def test_another_source_and_another_cpu_have_their_own(compiler, cache, monkeypatch):
    compiled_anew("numbers", SOURCE)
    compiled_anew("numbers", SOURCE.replace("2 *", "3 *"))
    monkeypatch.setattr(host_compiler, "_macros", lambda command: "#define __another_cpu__ 1")
    compiled_anew("numbers", SOURCE)
    assert len(list(cache.iterdir())) == 3


def test_what_the_compiler_says_is_said_and_nothing_is_kept(compiler, cache):
    with pytest.raises(CompilationError, match=r"failed \(.*error.*nothing"):
        compiled_anew("numbers", "int twice(int number) { return nothing; }")
    assert not list(cache.iterdir())


def test_a_file_that_is_no_library_is_an_error(compiler, monkeypatch):
    monkeypatch.setattr(host_compiler, "_compile", lambda command, source, path: path.write_bytes(b"no library"))
    with pytest.raises(CompilationError, match=r"cannot be loaded .*delete"):
        compiled_anew("numbers", SOURCE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written_to_is_no_obstacle(compiler, cache):
    cache.mkdir(parents=True)
    cache.chmod(0o500)
    assert compiled_anew("numbers", SOURCE).twice(1) == 2
    assert not list(cache.iterdir())


def test_a_cache_that_is_a_file_is_no_obstacle(compiler, tmp_path):
    (tmp_path / "sparsepath-vit").write_text("a file")
    assert compiled_anew("numbers", SOURCE).twice(1) == 2


def test_without_a_compiler_the_tiles_run_and_the_reason_is_said(monkeypatch, caplog):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(CompilationError, match=r"no C compiler \(CC='no-such-compiler' is not a program"):
        compiled_anew("numbers", SOURCE)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CompilationError, match=r"none of cc, gcc, clang was found; on Debian: apt install gcc"):
        compiled_anew("numbers", SOURCE)
    program = (
        "import torch, logging; logging.basicConfig(level=logging.INFO);"
        "from sparsepath_vit import TokenGrid, block_attention;"
        "grid = TokenGrid.create([(2, 2)], num_global_tokens=1, window_size=2);"
        "block_attention(*[torch.randn(1, 1, 5, 16)] * 3, grid)"
    )
    environment = {**os.environ, "PATH": "", "TRITON_INTERPRET": "0"}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True).stderr
    assert "left to the tiles of SDPA calls, correct but slower" in said and "apt install gcc" in said


def test_the_doctor_names_the_kernel_or_why_there_is_none(monkeypatch):
    monkeypatch.setattr(attention_cpu, "_reason_against", lambda: None)
    assert attention_backends.describe_block_attention_backend("cpu").startswith("cpu_kernel (compiled CPU kernel)")
    monkeypatch.setattr(attention_cpu, "_reason_against", lambda: "there is no C compiler")
    described = attention_backends.describe_block_attention_backend("cpu")
    assert described == "sdpa_tiles (tiles of SDPA calls): there is no C compiler"
    with pytest.raises(ValueError, match=r"backend='cpu_kernel' is unavailable: there is no C compiler"):
        attention_backends.set_block_attention_backend("cpu_kernel")


def test_threads_are_those_of_torch(compiler, monkeypatch):
    """A function that counts runs once on each of them."""
    source = "void count(void *number) { __atomic_fetch_add((int *)number, 1, __ATOMIC_RELAXED); }"
    counted = ctypes.c_int(0)
    start = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(start_of_threads())
    count = ctypes.cast(compiled_anew("threads", source).count, ctypes.c_void_p)
    start(count, ctypes.addressof(counted), 3, 0)
    assert counted.value == 3
