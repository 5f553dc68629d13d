# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`sparsepath doctor`: what works on this machine."""

from rich.markup import escape
from rich.table import Table

from .console import show

EXAMPLES = "Example:  `sparsepath doctor`"


def doctor() -> None:
    """Say what works on this machine, which attention backend runs and why, and how to mend what is missing."""
    from sparsepath_vit.runtime.doctor import examine

    table = Table("", "what", "found", "remedy")
    for finding in examine():
        table.add_row(
            "[green]ok[/]" if finding.is_well else "[red]![/]",
            finding.subject,
            escape(finding.state),
            escape(finding.remedy),
        )
    show(table)
