# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`EmbeddingStore`: a folder with one HDF5 file per slide, which any number of processes fill and can be killed in.

Every file is written under a temporary name and renamed when it is complete, so that a file that exists is whole.
"""

import csv
import io
import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ..runtime.atomic_files import append_row, make_folder, open_temporary, remove_stale_files, write_atomically
from ..runtime.extras import require

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"
FAILURES_FILE = "failures.csv"
LEFT_OUT_FILE = "left_out.csv"
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
        self.settings = json.loads(json.dumps(settings))  # as they will be read back: tuples become lists
        self.folder = make_folder(folder)
        remove_stale_files(self.folder)
        self._claim()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.folder)!r}, {len(list(self.folder.glob('*.h5')))} slides)"

    def _claim(self) -> None:
        path = self.folder / SETTINGS_FILE
        if not path.exists():
            write_atomically(path, json.dumps(self.settings, indent=2, sort_keys=True) + "\n")
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StoreError(f"{path} is damaged ({error}): remove it, or choose another folder.") from error
        if keys := differing_settings(there, self.settings):
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
            StoreError: the file of that name was made from something else. A slide whose content has changed where it
                lies is no other slide: its file is made again.
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
        if differing_settings(settings or {}, self.settings):
            raise StoreError(
                f"{path} was not made with the settings of this folder: remove it, or choose another folder."
            )
        return self._holds(path, there, json.loads(json.dumps(source)))

    def _holds(self, path: Path, there: dict[str, Any], now: dict[str, Any]) -> bool:
        """Whether what was made from `there` is what would be made from `now`; where the slide lies does not matter."""
        differing = {key for key in {*there, *now} if there.get(key) != now.get(key)}
        if "content" not in there and "content" in now:
            differing -= {"content", "place"}
            if not differing:
                logger.warning(
                    "%s does not say what its slide held: an earlier version made it, and compared name and size only. "
                    "It counts as done; remove it to have it made again.", path,
                )  # fmt: skip
        elif "content" in differing and differing <= {"content", "bytes"}:
            logger.warning("%s is made again: its slide has changed since.", path)
            return False
        if differing - {"place"}:
            raise StoreError(
                f"{path} was made from {there}, not from {now}. If these are two slides, give each its own folder; "
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

    def impossible_regions(self, name: str) -> dict[tuple[int, int, int, int], str]:
        """Likewise, of the regions that could not be embedded, and why."""
        with require("h5py").File(self.path_of(name), "r") as file:
            if "impossible_regions" not in file:
                return {}
            boxes = map(tuple, file["impossible_regions"][:].tolist())
            return dict(zip(boxes, file["impossible_region_reasons"].asstr()[:].tolist(), strict=True))

    def labels(self, name: str) -> tuple[str | None, list[str] | None]:
        """The labels in the file of `name`: the slide's, and those of its regions; None where there are none."""
        with require("h5py").File(self.path_of(name), "r") as file:
            of_regions = file["labels"].asstr()[:].tolist() if "labels" in file else None
            return file["features"].attrs.get("label"), of_regions

    def set_labels(self, name: str, of_slide: str | None, of_regions: Sequence[str] | None) -> None:
        """Writes the file of `name` anew with other labels, all else as it is.

        Args:
            name: of the slide.
            of_slide: its label; None for none.
            of_regions: one for each region that the file holds; None for none.

        Raises:
            StoreError: the file holds another number of regions.
            OSError: it cannot be written; the old one stays.
        """
        path = self.path_of(name)
        temporary, descriptor = open_temporary(path)
        try:
            with _DiskFile(descriptor, "r+") as disk:
                with open(path, "rb") as original:
                    shutil.copyfileobj(original, disk)
                disk.check()
                with require("h5py").File(disk, "r+") as file:
                    _replace_labels(file, path, of_slide, of_regions)
                disk.check()
                os.fsync(disk.fileno())
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def failures(self) -> list[tuple[str, str]]:
        """(slide, reason) of every row of `failures.csv`."""
        path = self.folder / FAILURES_FILE
        if not path.exists():
            return []
        with open(path, newline="", encoding="utf-8") as file:
            rows = [tuple(row[:2]) for row in csv.reader(file) if len(row) >= 2]
        return [row for row in rows if row != ("slide", "reason")]

    def record_left_out(self, left_out: Iterable[tuple[str, str]]) -> None:
        """Writes `left_out.csv` with the path and the reason of each entry; no entries, no file. For one process."""
        rows = [_csv_row(*entry) for entry in left_out]
        path = self.folder / LEFT_OUT_FILE
        if rows:
            write_atomically(path, _csv_row("path", "reason") + "".join(rows))
        else:
            path.unlink(missing_ok=True)

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


def differing_settings(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that differ; one that an earlier version did not know was off there."""
    differing = [key for key in sorted({*there, *now}) if there.get(key) != now.get(key)]
    return [key for key in differing if (key in there and key in now) or there.get(key) or now.get(key)]


def read_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What the embeddings in a folder were made with.

    Raises:
        ValueError: its `settings.json` is missing or damaged.
    """
    path = Path(folder) / SETTINGS_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): {folder} is no folder that embed has written.") from error


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

    @property
    def settings(self) -> dict[str, Any]:
        """What the folder says of all its files."""
        return self._attributes["settings"]

    def rows(self, name: str) -> int:
        """How many rows a dataset has so far."""
        return len(self._file[name]) if name in self._file else 0

    def append(self, **rows: np.ndarray) -> None:
        """Adds rows to datasets by name, e.g. `append(features=(N, D), coords=(N, 2))`; the first call makes them."""
        for name, values in rows.items():
            values = np.asarray(values)
            _append(self._file, name, values)
        self._disk.check()

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


def _append(file: Any, name: str, values: np.ndarray) -> None:
    """Adds rows to a dataset of an HDF5 file, which is made if missing."""
    if name not in file:
        row_shape = values.shape[1:]
        row_bytes = max(1, values.dtype.itemsize * int(np.prod(row_shape)))
        kind = require("h5py").string_dtype() if values.dtype.kind in "UO" else values.dtype
        chunk = (max(1, _CHUNK_BYTES // row_bytes), *row_shape)
        file.create_dataset(name, (0, *row_shape), kind, maxshape=(None, *row_shape), chunks=chunk)
    dataset = file[name]
    start = len(dataset)
    dataset.resize(start + len(values), axis=0)
    dataset[start:] = values


def _replace_labels(file: Any, path: Path, of_slide: str | None, of_regions: Sequence[str] | None) -> None:
    features = file["features"]
    regions = len(file.get("region_sizes", features))
    if of_regions is not None and len(of_regions) != regions:
        raise StoreError(f"{path} holds {regions} regions, and {len(of_regions)} labels were given: remove it.")
    features.attrs.pop("label", None)
    if of_slide is not None:
        features.attrs["label"] = of_slide
    if "labels" in file:
        del file["labels"]
    if of_regions is not None:
        _append(file, "labels", np.asarray(of_regions))


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
