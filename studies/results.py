# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Result tables as CSV, also such that grow row by row: a stopped run goes on where it was."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsepath_vit.runtime.atomic_files import write_atomically


class ResultsTable:
    """Rows with key columns and value columns; the file is replaced as a whole with each row.

    Args:
        path: the CSV; its folder is made if missing, rows that are there are read.
        keys: columns that say what was measured; no two rows share them.
        values: the columns that follow.

    Raises:
        ValueError: the file holds other columns.
    """

    def __init__(self, path: str | os.PathLike[str], keys: Sequence[str], values: Sequence[str]) -> None:
        self.path, self.keys = Path(path), tuple(keys)
        self.columns = (*keys, *values)
        self.rows: list[dict[str, str]] = []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                self.rows = list(reader)
                if tuple(reader.fieldnames or ()) != self.columns:
                    raise ValueError(
                        f"{self.path} has the columns {reader.fieldnames}, not {list(self.columns)}: it was written by "
                        "another version or for something else. Move it away, or choose another folder."
                    )

    def find(self, key: Mapping[str, Any]) -> dict[str, str] | None:
        """The row with these values of the key columns, None where it is not there."""
        wanted = [_cell(key[name]) for name in self.keys]
        return next((row for row in self.rows if [row[name] for name in self.keys] == wanted), None)

    def has(self, key: Mapping[str, Any]) -> bool:
        """Whether the row with these values of the key columns is there."""
        return self.find(key) is not None

    def holds(self, **values: Any) -> bool:
        """Whether there is a row with these values."""
        return any(_has_values(row, values) for row in self.rows)

    def drop(self, **values: Any) -> int:
        """Forgets the rows with these values and says how many; the file changes with the next row."""
        before = len(self.rows)
        self.rows = [row for row in self.rows if not _has_values(row, values)]
        return before - len(self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row and writes the file; columns that are not given stay empty."""
        self.rows.append({name: _cell(row.get(name)) for name in self.columns})
        write_table(self.path, self.rows)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a CSV file in one go.

    Args:
        path: the file.
        rows: at least one; all have the columns of the first.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    write_atomically(path, text.getvalue())


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows to a CSV; earlier rows stay empty in columns that are new.

    Args:
        path: the file; it and its folder are made where they are missing.
        rows: at least one; all have the columns of the first.

    Raises:
        ValueError: the file has a column that the rows lack.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            earlier = list(csv.DictReader(file))
    unknown = sorted(set(earlier[0] if earlier else ()) - set(rows[0]))
    if unknown:
        raise ValueError(
            f"{path} has the columns {unknown}, which the new rows lack: it was written by another version or for "
            "something else. Move it away, or choose another file."
        )
    write_table(path, [*({name: row.get(name) for name in rows[0]} for row in earlier), *rows])


def _has_values(row: Mapping[str, str], values: Mapping[str, Any]) -> bool:
    return all(row[name] == _cell(value) for name, value in values.items())


def _cell(value: Any) -> str:
    """A value as it stands in the file; numbers with six digits, nothing for None."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
