# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What tables of measured numbers have in common: the CSVs, their form, times and intervals."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "model_card" / "results"
SHORT_DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
NOT_RUN = "not run"

Row = dict[str, str]


def read(name: str) -> list[Row]:
    """The rows of `model_card/results/NAME.csv`."""
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that ends with a line break."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def seconds(row: Row | None) -> str:
    """The median time of a row with three digits."""
    if row is None:
        return NOT_RUN
    value = float(row["seconds_median"])
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.3g} s"


def interval(row: Row, name: str) -> str:
    """A number with its 95 % interval."""
    return f"{float(row[name]):.2f} ({float(row[f'{name}_low']):.2f} to {float(row[f'{name}_high']):.2f})"
