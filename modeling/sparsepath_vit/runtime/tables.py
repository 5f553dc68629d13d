# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""CSV tables as people and spreadsheets write them: read as they are meant, or refused by name and line."""

import csv
import difflib
import gzip
import io
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_BYTE_ORDER_MARKS = ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
_SIMILARITY = 0.75  # of a misspelt name: "widht" has 0.8, "level" for "label" 0.6
_SHORTEST_MISSPELT = 3  # letters; any two names of one letter are alike


class TableRow(NamedTuple):
    """One row: the line of the file in which it ends, counted from 1, and its cells by column."""

    line: int
    cells: dict[str, str]


class Table(NamedTuple):
    """A table: the names of its columns as they stand there, without spaces around them, and its rows."""

    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]


def read_table(
    path: str | os.PathLike[str],
    required: Sequence[str],
    optional: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> Table:
    """Reads a CSV file with a header.

    A byte order mark and spaces around names and cells mean nothing, nor do capitals in a known column's name. Between
    cells stand commas, or semicolons or tabs where the header says so. Rows without any content are passed over, and
    cells that a row lacks at its end are empty. A file ending in `.gz` is unpacked.

    Args:
        path: the file.
        required: columns that must be there.
        optional: other columns whose meaning is known. Any further column is kept and means nothing here.
        aliases: what others call known columns; such a name stands for the column where that is not there itself.

    Returns:
        The table; known columns have the name that they have here.

    Raises:
        ValueError: the file is missing, no text in UTF-8 or damaged; a column is missing, there twice or almost called
            like a missing one; a row has more cells than the header; or numbers are written with decimal commas.
    """
    path, known = Path(path), (*required, *optional)
    text = _text_of(path)
    delimiter = _delimiter_of(text, known)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as a table: line {reader.line_num}: {error}.") from error
    rows = [(line, cells) for line, cells in rows if any(cells)]
    header = _own_names(rows[0][1], known, aliases or {}) if rows else []
    while header and not header[-1]:  # a spreadsheet's empty columns
        header = header[:-1]
    columns = _checked_columns(path, header, required, optional)
    if delimiter != ",":
        _refuse_decimal_commas(path, rows, required, delimiter)
    return Table(columns, tuple(_row(path, line, cells, columns) for line, cells in rows[1:]))


def _text_of(path: Path) -> str:
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
    except FileNotFoundError as error:
        raise ValueError(f"{path} cannot be read: it does not exist (working directory {os.getcwd()}).") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from error
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8-sig")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} cannot be read as text ({error}): save it as CSV in UTF-8.") from error
    if "\0" in text:
        raise ValueError(f"{path} cannot be read as a table: it holds zero bytes. Copy it again, or save it as CSV.")
    return text


def _delimiter_of(text: str, known: Sequence[str]) -> str:
    """What stands between the names of the header: that by which most known ones are found, of equals the comma."""
    names = {_plain(name) for name in known}
    header = next((line for line in text.splitlines() if line.strip()), "")

    def found(delimiter: str) -> int:
        return sum(_plain(cell.strip(' "')) in names for cell in header.split(delimiter))

    return max(_DELIMITERS, key=found)


def _own_names(header: Sequence[str], known: Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    """The header, with the names of others replaced by ours where ours is not there; the first of two counts."""
    there = {_plain(name) for name in header}
    own = {_plain(name): column for name, column in aliases.items() if _plain(column) not in there}
    names: list[str] = []
    for name in header:
        column = own.get(_plain(name), name)
        names.append(name if column in names else column)
    return names


def _checked_columns(
    path: Path, header: Sequence[str], required: Sequence[str], optional: Sequence[str]
) -> tuple[str, ...]:
    """The names of the columns, known ones as they are called here."""
    known = {_plain(name): name for name in (*required, *optional)}
    columns = tuple(known.get(_plain(name), name) for name in header)
    if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
        raise ValueError(f"{path} has the column {', '.join(map(repr, twice))} more than once: keep one of each.")
    absent = {_plain(name): name for name in known.values() if name not in columns}
    candidates = [name for name in absent if len(name) >= _SHORTEST_MISSPELT]
    meant = {}
    for name in columns:
        if name not in known.values():
            for close in difflib.get_close_matches(_plain(name), candidates, 1, _SIMILARITY):
                meant[name] = absent[close]
    question = "".join(f" Did you mean {right!r} by {name!r}?" for name, right in meant.items())
    if missing := [name for name in required if name not in columns]:
        lacking = f"there is no column {missing[0]!r}" if len(missing) == 1 else f"{', '.join(missing)} is missing"
        beside = f" (and, where wanted, {', '.join(optional)})" if optional else ""
        raise ValueError(
            f"{path} has the columns {list(header)}: expected {', '.join(required)}{beside}; {lacking}.{question}"
        )
    if question:
        raise ValueError(
            f"{path} has the columns {list(header)}.{question} Rename it. If it is something else, rename it too: "
            "under this name nobody could tell."
        )
    return columns


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "_", name.strip().lower())


def _refuse_decimal_commas(
    path: Path, rows: Sequence[tuple[int, Sequence[str]]], required: Sequence[str], delimiter: str
) -> None:
    for line, cells in rows:
        for cell in cells:
            if _DECIMAL_COMMA.fullmatch(cell):
                raise ValueError(
                    f"{path}, line {line}: {cell!r} is a number with a decimal comma, and between cells stand "
                    f"{_DELIMITERS[delimiter]} (with commas there would be no column {required[0]!r}): write numbers "
                    f"with a point, such as {cell.replace(',', '.')}."
                )


def _row(path: Path, line: int, cells: Sequence[str], columns: Sequence[str]) -> TableRow:
    surplus = [cell for cell in cells[len(columns) :] if cell]
    if surplus:
        raise ValueError(
            f"{path}, line {line}: the row has {len(cells)} cells, the header {len(columns)} columns; {surplus[0]!r} "
            'has none. A text with commas stands in double quotes: "tumour, high grade".'
        )
    filled = [*cells, *[""] * (len(columns) - len(cells))]
    unnamed = [cell for name, cell in zip(columns, filled, strict=False) if cell and not name]
    if unnamed:
        raise ValueError(f"{path}, line {line}: {unnamed[0]!r} stands in a column without a name: name it.")
    return TableRow(line, {name: cell for name, cell in zip(columns, filled, strict=False) if name})
