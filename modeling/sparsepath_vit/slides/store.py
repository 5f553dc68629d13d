# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`EmbeddingStore`: a folder with one HDF5 file per slide, which any number of processes fill and can be killed in.

Every file is written under a temporary name and renamed when it is complete, so that a file that exists is whole.
"""

import csv
import io
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..runtime.atomic_files import append_row, open_temporary, remove_stale_files, write_atomically
from ..runtime.extras import require

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
FAILURES_FILE = "failures.csv"
_CHUNK_BYTES = 2**19


class StoreError(ValueError):
    """A folder holds something else than what is to be written."""


class EmbeddingStore:
    """A folder of embeddings that were all made with the same settings.

    `settings.json` beside the files says which; opening the folder with other settings is refused. Temporary files
    that a killed process left behind are removed, those of running ones stay.

    Args:
        folder: made if missing.
        settings: everything the numbers depend on (model, mpp, region size, ...); plain JSON values.

    Raises:
        StoreError: the folder was filled with other settings; the message names the differences.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = json.loads(json.dumps(settings))  # as they will be read back: tuples become lists
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_stale_files(self.folder)
        self._claim()

    def _claim(self) -> None:
        path = self.folder / SETTINGS_FILE
        if not path.exists():
            write_atomically(path, json.dumps(self.settings, indent=2, sort_keys=True) + "\n")
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"{path} is damaged ({error}): remove it, or choose another folder.") from error
        keys = [key for key in sorted({*there, *self.settings}) if there.get(key) != self.settings.get(key)]
        if keys:
            differences = "; ".join(f"{key}: {there.get(key)!r} there, {self.settings.get(key)!r} now" for key in keys)
            raise StoreError(
                f"{self.folder} holds embeddings made with other settings ({differences}). Files of both would be "
                "mixed: choose another folder, or the same settings."
            )

    def path_of(self, name: str) -> Path:
        """The file of the slide called `name`."""
        return self.folder / f"{name}.h5"

    def is_done(self, name: str, source: dict[str, Any]) -> bool:
        """Whether `name` was embedded from `source` (what identifies the slide file and what was taken of it).

        Raises:
            StoreError: the file of that name was made from something else.
        """
        path = self.path_of(name)
        if not path.exists():
            return False
        h5py = require("h5py")
        try:
            with h5py.File(path, "r") as file:
                there, settings = (json.loads(file.attrs.get(key, "null")) for key in ("source", "settings"))
        except (OSError, ValueError) as error:
            logger.warning("%s cannot be read (%s) and is made again.", path, error)
            return False
        if settings != self.settings:
            raise StoreError(
                f"{path} was not made with the settings of this folder: remove it, or choose another folder."
            )
        if there != json.loads(json.dumps(source)):
            raise StoreError(
                f"{path} was made from {there}, not from {source}. If these are two slides, give each its own folder; "
                "if it is to be replaced, remove the file first."
            )
        return True

    def writer(self, name: str, source: dict[str, Any]) -> "SlideWriter":
        """Where the embeddings of one slide go: a context manager that renames the file at its end."""
        return SlideWriter(self.path_of(name), {"settings": self.settings, "source": source})

    def record_failure(self, slide: str | os.PathLike[str], reason: str) -> None:
        """Adds a row to `failures.csv`; safe with several processes."""
        row = _csv_row(os.fspath(slide), " ".join(reason.split()))
        append_row(self.folder / FAILURES_FILE, _csv_row("slide", "reason"), row)

    def skipped_regions(self, name: str) -> list[tuple[int, int, int, int]]:
        """(x, y, width, height) in level-0 pixels of the regions that the file of `name` says it does not hold."""
        with require("h5py").File(self.path_of(name), "r") as file:
            return [tuple(box) for box in file["skipped_regions"][:].tolist()] if "skipped_regions" in file else []

    def failures(self) -> list[tuple[str, str]]:
        """(slide, reason) of every row of `failures.csv`."""
        path = self.folder / FAILURES_FILE
        if not path.exists():
            return []
        with open(path, newline="", encoding="utf-8") as file:
            rows = [tuple(row[:2]) for row in csv.reader(file) if len(row) >= 2]
        return [row for row in rows if row != ("slide", "reason")]

    def forget_failures(self, slides: Iterable[str | os.PathLike[str]]) -> None:
        """Drops the rows of slides that are tried again. For one process, before the others start."""
        retried = {os.fspath(slide) for slide in slides}
        before = self.failures()
        kept = [row for row in before if row[0] not in retried]
        path = self.folder / FAILURES_FILE
        if kept and len(kept) < len(before):
            write_atomically(path, _csv_row("slide", "reason") + "".join(_csv_row(*row) for row in kept))
        elif before and not kept:
            path.unlink()


class SlideWriter:
    """One slide's HDF5 file while it grows; datasets are appended to row by row.

    Used as a context manager: left normally the file gets its name, left by an exception nothing stays.
    """

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        self._path = path
        self._attributes = attributes

    def __enter__(self) -> "SlideWriter":
        h5py = require("h5py")
        self._temporary, descriptor = open_temporary(self._path)
        self._disk = _DiskFile(descriptor, "r+")
        self._file = h5py.File(self._disk, "w")
        for key, value in self._attributes.items():
            self._file.attrs[key] = json.dumps(value, sort_keys=True)
        return self

    def append(self, **rows: np.ndarray) -> None:
        """Adds rows to datasets by name, e.g. `append(features=(N, D), coords=(N, 2))`; the first call makes them."""
        for name, values in rows.items():
            values = np.asarray(values)
            if name not in self._file:
                self._create(name, values)
            dataset = self._file[name]
            start = len(dataset)
            dataset.resize(start + len(values), axis=0)
            dataset[start:] = values
        self._disk.check()

    def _create(self, name: str, values: np.ndarray) -> None:
        row_shape = values.shape[1:]
        row_bytes = max(1, values.dtype.itemsize * int(np.prod(row_shape)))
        kind = require("h5py").string_dtype() if values.dtype.kind in "UO" else values.dtype
        chunk = (max(1, _CHUNK_BYTES // row_bytes), *row_shape)
        self._file.create_dataset(name, (0, *row_shape), kind, maxshape=(None, *row_shape), chunks=chunk)

    def describe(self, name: str, attributes: dict[str, Any]) -> None:
        """Sets attributes of a dataset."""
        self._file[name].attrs.update(attributes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if kind is None:
                self._disk.check()
                os.fsync(self._disk.fileno())
                os.replace(self._temporary, self._path)
        finally:
            self._temporary.unlink(missing_ok=True)
            self._disk.close()


class _DiskFile(io.FileIO):
    """A file whose failed writes are reported by `check` only.

    HDF5 cannot close a file after a failed write (full disk, quota) and crashes the process at its end. So it is not
    told; who writes asks here after each step, and throws the file away.
    """

    _error: OSError | None = None

    def write(self, data: Any) -> int:
        remaining = memoryview(data).cast("B")
        size = len(remaining)
        try:
            while remaining:
                remaining = remaining[super().write(remaining) :]
        except OSError as error:
            self._error = self._error or error
        return size

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0

    def check(self) -> None:
        """Raises the first error of a write."""
        if self._error is not None:
            raise self._error


def _csv_row(*cells: str) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
