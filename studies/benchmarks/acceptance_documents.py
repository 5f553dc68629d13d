# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What each step of the acceptance on a GPU leaves: its document, its CSV file, and lines of the final table.

A document is {"state", "problem", "findings", "seconds"}; the states are running, done, failed, and two that the next
run goes on with. The standard library is all it needs: it must work where a GPU, or torch, does not.
"""

import csv
import json
import os
from pathlib import Path
from typing import Any

UNFINISHED = ("skipped", "stopped")


def document_path(folder: Path, name: str) -> Path:
    """Of what this run leaves of a step."""
    return folder / f"{name}.json"


def earlier_path(folder: Path, name: str) -> Path:
    """Of what the run before left of a step."""
    return document_path(folder, name).with_suffix(".earlier.json")


def read_document(folder: Path, name: str) -> dict[str, Any]:
    """The step's document, empty where there is none."""
    return _read(document_path(folder, name))


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return {}


def earlier_findings(folder: Path, name: str) -> list[dict[str, Any]]:
    """What a step had measured when the run before stopped in it; of one that failed nothing."""
    document = _read(earlier_path(folder, name))
    is_to_go_on = document.get("state") in UNFINISHED
    return [finding for finding in document["findings"] if finding["passed"] is not False] if is_to_go_on else []


def read_documents(folder: Path, steps: list[str]) -> dict[str, dict[str, Any]]:
    """{step: its document}."""
    return {name: read_document(folder, name) for name in steps}


def state_of(folder: Path, name: str) -> str:
    """The step's state, "missing" where no run has begun it."""
    return read_document(folder, name).get("state", "missing")


def write_document(folder: Path, name: str, document: dict[str, Any]) -> None:
    """Writes under a temporary name and renames: what is there is whole."""
    path = document_path(folder, name)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(document, indent=1))
    os.replace(temporary, path)


def rows_of(document: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of all findings, for the CSV."""
    return [row for finding in document.get("findings", []) for row in finding["rows"]]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows may have different columns; those that a row lacks stay empty."""
    if not rows:
        return
    columns = list(dict.fromkeys(column for row in rows for column in row))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def record(documents: dict[str, dict[str, Any]], folder: Path) -> None:
    """Keeps what was measured beside the other results: of steps that are done, never a part over a whole."""
    for name, document in documents.items():
        if document.get("state") == "done":
            write_csv(folder / f"gpu_{name}.csv", rows_of(document))


def lines(documents: dict[str, dict[str, Any]], steps: list[str]) -> list[tuple[str, str, str, bool | None]]:
    """(step and finding, measured, target, whether it passed) of each line of the table."""
    found: list[tuple[str, str, str, bool | None]] = []
    for name in steps:
        document = documents[name]
        found += [
            (f"{name}: {finding['name']}", finding["measured"], finding["target"], finding["passed"])
            for finding in document.get("findings", [])
        ]
        if document.get("problem") or not document:
            state = document.get("state", "skipped")
            found.append((name, document.get("problem", "not reached"), state, False if state == "failed" else None))
    return found


def table(documents: dict[str, dict[str, Any]], steps: list[str]) -> str:
    """What was measured, what it should be, and whether it is."""
    text = []
    for name, measured, target, passed in lines(documents, steps):
        is_problem = target in (*UNFINISHED, "failed")
        verdict = {True: "pass", False: "FAIL", None: "-"}[passed]
        if is_problem:
            verdict = "FAILED" if target == "failed" else "NOT YET"
        wanted = f"  [{target}]" if target and not is_problem else ""
        text.append(f"{verdict:8} {name}: {measured}{wanted}")
    seconds = ", ".join(f"{name} {documents[name].get('seconds', 0)} s" for name in steps)
    return "\n".join(["", *text, "", seconds])


def what_is_left(documents: dict[str, dict[str, Any]], steps: list[str]) -> str:
    """Whether all steps were run, and if not, which are left."""
    left = [name for name in steps if documents[name].get("state", "skipped") in UNFINISHED]
    if not left:
        return f"all {len(steps)} steps were run"
    done = len(steps) - len(left)
    return f"{done} of {len(steps)} steps were run; the same command goes on with {', '.join(left)}"
