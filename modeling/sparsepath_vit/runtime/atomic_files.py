# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Files that are there in full or not at all, written by any number of processes that may be killed."""

import logging
import os
import re
import socket
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed anyway
    fcntl = None

logger = logging.getLogger(__name__)

_TEMPORARY_NAME = re.compile(r".+\.(h5|json|geojson|csv|png)\.[^.]+-\d+\.tmp")


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file so that it is either there in full or not at all."""
    temporary, descriptor = open_temporary(path)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_row(path: Path, header: str, row: str) -> None:
    """Adds a line to a table that several processes write, and the header where it is the first."""
    with open(path, "a", encoding="utf-8") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        first = "" if os.fstat(file.fileno()).st_size else header
        file.write(first + row)  # one write to a file opened for appending


def remove_stale_files(folder: Path) -> None:
    """Removes the temporary files of processes that are no more; a running one holds a lock on its own."""
    for path in folder.iterdir():
        if not _TEMPORARY_NAME.fullmatch(path.name):
            continue
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:  # finished or removed by another process just now
            continue
        try:
            if _lock(descriptor):
                path.unlink(missing_ok=True)
                logger.info("removed %s, which an interrupted run left behind", path)
        except PermissionError:
            logger.info("%s is in use", path)
        finally:
            os.close(descriptor)


def open_temporary(path: Path) -> tuple[Path, int]:
    """A new locked file beside `path`, named after host and process: its path and descriptor."""
    host = socket.gethostname().replace(".", "-")
    temporary = path.with_name(f"{path.name}.{host}-{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    _lock(descriptor)
    return temporary, descriptor


def _lock(descriptor: int) -> bool:
    """Takes the lock on a file without waiting; False where another process holds it."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
