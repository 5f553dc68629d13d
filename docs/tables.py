#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Writes the tables of measured numbers into README and pages, from model_card/results (`make figures`).

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; what is between them is replaced. So a number
in a table is one that a command wrote into a CSV, never one that somebody typed.
"""

import os
import re
from pathlib import Path

import benchmark_tables
import evidence_tables

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/benchmarks.md", "docs/evidence.md", "docs/view.md")
TABLES = benchmark_tables.TABLES | evidence_tables.TABLES
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """A page with the tables of the present CSVs.

    Raises:
        KeyError: it asks for a table that is not in `TABLES`.
    """
    return _TABLE.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main() -> None:
    """Rewrites the tables of all pages."""
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = with_tables(before)
        if after != before:
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_text(after, encoding="utf-8")
            os.replace(temporary, path)
            print(f"wrote the tables of {name}")


if __name__ == "__main__":
    main()
