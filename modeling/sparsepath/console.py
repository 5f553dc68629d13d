# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Where the commands print, and how expected errors end."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from rich.table import Table

console = Console()


def say(text: object) -> None:
    """Prints text as it is: brackets are no markup, numbers get no colours, long lines are not broken."""
    console.print(str(text), markup=False, highlight=False, soft_wrap=True)


def show(table: "Table") -> None:
    """Prints a table as wide as the terminal."""
    console.print(table)


def run(app: Callable[[], object]) -> None:
    """Runs the command line: expected errors end in one readable line and exit code 1, not in a traceback.

    Raises:
        SystemExit: when the command has ended.
    """
    try:
        app()
    except Exception as error:  # not `except _expected_errors()`: SystemExit, which ends --help, would import the Hub
        if not isinstance(error, _expected_errors()):
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from error


def _expected_errors() -> tuple[type[Exception], ...]:
    """What commands raise for input they cannot use; the last comes from a configuration's field of the wrong type."""
    from huggingface_hub.errors import StrictDataclassError

    return ValueError, OSError, ImportError, StrictDataclassError
