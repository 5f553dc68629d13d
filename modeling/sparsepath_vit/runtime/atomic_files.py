# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that are there in full or not at all, written by any number of processes that may be killed.

What is being written is called NAME.HOST-PROCESS.tmp and locked by its process; a folder that a new one is about to
replace is called NAME.HOST-PROCESS.old for a moment. Whatever carries such a name and is not locked was left behind.
"""

import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed anyway
    fcntl = None

logger = logging.getLogger(__name__)

_TEMPORARY_NAME = re.compile(r"(?P<name>.+)\.[^.]+-\d+\.(?P<kind>tmp|old)")


def make_folder(path: str | os.PathLike[str], argument: str = "out") -> Path:
    """The folder, made with its parents where it is missing.

    Args:
        path: as a user wrote it.
        argument: what messages call it.

    Raises:
        NotADirectoryError: it or one of its parents is a file.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(parent for parent in (folder, *folder.parents) if parent.exists())
        raise NotADirectoryError(f"{argument}={str(path)!r} is no folder: {file} is a file. Name a folder.") from error
    return folder


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name when the block ends, and is gone after an error.

    Args:
        path: the file; its folder must exist.

    Yields:
        An empty file to write to, in place: what renames another file over it loses the lock.

    Example:
    ```python
    >>> with atomic_path(folder / "map.png") as temporary:
    ...     image.save(temporary, format="PNG")
    ```
    """
    path = Path(path)
    temporary, descriptor = open_temporary(path)
    try:
        yield temporary
        os.fsync(descriptor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends, and is gone after an error.

    A folder that is at `path` stays until the new one is complete. Should the process be killed between the two
    renames, `restore_folder` brings it back. What killed processes left beside `path` for it is removed.

    Args:
        path: the folder; the one it lies in is made if missing.

    Yields:
        An empty folder to fill.

    Raises:
        FileExistsError: this process is writing the same folder already.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    restore_folder(path)
    remove_stale_files(path.parent, path.name)
    temporary = _temporary_name(path)
    temporary.mkdir()
    replaced = temporary.with_suffix(".old")
    descriptor = _open_and_lock(temporary)
    try:
        yield temporary
        if path.exists():
            os.replace(path, replaced)
        os.replace(temporary, path)
    finally:
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def restore_folder(path: Path) -> None:
    """Brings back the folder `path` where a process was killed while it replaced it."""
    if path.exists() or not path.parent.is_dir():
        return
    aside = [entry for entry in path.parent.iterdir() if _target_and_kind(entry) == (path.name, "old")]
    if aside:
        newest = max(aside, key=lambda entry: entry.stat().st_mtime_ns)
        os.replace(newest, path)
        logger.info("brought %s back, which an interrupted run had moved aside", path)


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file so that it is either there in full or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_row(path: Path, header: str, row: str) -> None:
    """Adds a line to a table that several processes write, and the header where it is the first."""
    with open(path, "a", encoding="utf-8") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        first = "" if os.fstat(file.fileno()).st_size else header
        file.write(first + row)  # one write to a file opened for appending


def remove_stale_files(folder: Path, name: str | None = None) -> None:
    """Removes what processes that are no more were writing; a running one holds a lock on its own.

    Args:
        folder: where to look.
        name: of the file or folder that was to be made; any by default.
    """
    for path in folder.iterdir():
        target, kind = _target_and_kind(path)
        if target is None or name not in (None, target) or (kind == "old" and not (folder / target).exists()):
            continue  # of a folder that was moved aside and never replaced this is all there is
        try:
            descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        except FileNotFoundError:  # finished or removed by another process just now
            continue
        try:
            if _lock(descriptor):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                logger.info("removed %s, which an interrupted run left behind", path)
        except PermissionError:
            logger.info("%s is in use", path)
        finally:
            os.close(descriptor)


def open_temporary(path: Path) -> tuple[Path, int]:
    """A new locked file beside `path`, named after host and process: its path and descriptor."""
    temporary = _temporary_name(path)
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    _lock(descriptor)
    return temporary, descriptor


def _temporary_name(path: Path) -> Path:
    host = socket.gethostname().replace(".", "-")
    return path.with_name(f"{path.name}.{host}-{os.getpid()}.tmp")


def _target_and_kind(path: Path) -> tuple[str | None, str | None]:
    """What a temporary name stands for, and whether it is being written ("tmp") or replaced ("old")."""
    match = _TEMPORARY_NAME.fullmatch(path.name)
    return (match["name"], match["kind"]) if match else (None, None)


def _open_and_lock(folder: Path) -> int | None:
    """A descriptor that holds the lock on a folder; None where a system cannot open folders."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    _lock(descriptor)
    return descriptor


def _lock(descriptor: int) -> bool:
    """Takes the lock on a file or folder without waiting; False where another process holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
