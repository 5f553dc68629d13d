# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""C for the CPU of this machine, compiled when it is first needed, as Triton compiles for its GPU.

A library is kept in ~/.cache/sparsepath-vit (or $XDG_CACHE_HOME), under a name made of its source, the compiler's
arguments and what it knows of the CPU, so that machines that share a home directory do not run each other's.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

_COMPILERS = ("cc", "gcc", "clang")
# Vectors are read as arrays of other types.
_OPTIONS = ("-O3", "-fno-math-errno", "-ffp-contract=fast", "-fno-strict-aliasing", "-std=gnu11", "-shared", "-fPIC")
_SECONDS = 120


class CompilationError(RuntimeError):
    """There is no compiler here, or it failed; the message says what is missing in words that follow a colon."""


@functools.cache
def compiled_library(name: str, source: str) -> ctypes.CDLL:
    """The library of some C source, compiled now or by an earlier process.

    Args:
        name: of the files, and for the log.
        source: in C11 with the extensions that GCC and Clang share.

    Raises:
        CompilationError: there is no compiler, it failed, or what it made cannot be loaded.
    """
    command = [_compiler(), *_OPTIONS, option_for_this_cpu()]
    key = hashlib.sha256(repr((source, command, platform.platform(), _macros(command))).encode()).hexdigest()[:16]
    path = _cache_folder() / f"{name}-{key}.so"
    if not path.is_file():
        _compile(command, source, path)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise CompilationError(f"{path} cannot be loaded ({error}); delete it, or set XDG_CACHE_HOME") from error


def option_for_this_cpu() -> str:
    """What tells the compiler to use all that this CPU can do."""
    return "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"


@functools.cache
def start_of_threads() -> int:
    """The address of GOMP_parallel of torch's own OpenMP library: it starts a C function on torch's threads.

    Threads of another library would wait for those of torch, which stay awake for a while after each operation.

    Raises:
        CompilationError: this torch has none.
    """
    folder = Path(torch.__file__).parent / "lib"
    for path in (folder / "libtorch_cpu.so", folder / "libtorch_cpu.dylib"):
        if path.is_file():
            try:
                return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value
            except AttributeError:
                break
    raise CompilationError("this torch was built without OpenMP")


def _compiler() -> str:
    """The C compiler that CC names, or the first that is found."""
    named = os.environ.get("CC")
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is None:
        looked_for = f"CC={named!r} is not a program" if named else f"none of {', '.join(_COMPILERS)} was found"
        raise CompilationError(f"there is no C compiler ({looked_for}; on Debian: apt install gcc)")
    return found


def _cache_folder() -> Path:
    """Where libraries are kept; a fresh folder where the home directory cannot be written to."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    folder = root / "sparsepath-vit" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError as error:
        logger.debug("Compiled libraries are not kept: %s", error)
    return Path(_folder_of_process().name)


@functools.cache
def _folder_of_process() -> tempfile.TemporaryDirectory:
    """It goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="sparsepath-vit-")


def _macros(command: list[str]) -> str:
    """What the compiler defines for this CPU: its version, and a name for each kind of instruction."""
    return _run([*command, "-dM", "-E", "-x", "c", os.devnull]).stdout


def _run(command: list[str]) -> subprocess.CompletedProcess:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilationError(f"the compiler did not run ({error})") from error
    if done.returncode != 0:
        first_error = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
        raise CompilationError(f"{command[0]} failed ({first_error})")
    return done


def _compile(command: list[str], source: str, path: Path) -> None:
    logger.info("Compiling %s for this CPU (some seconds, once; kept in %s).", path.stem, path.parent)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source_path, made = Path(folder, "source.c"), Path(folder, path.name)
        source_path.write_text(source, encoding="utf-8")
        _run([*command, "-o", str(made), str(source_path), "-lm"])
        os.replace(made, path)
