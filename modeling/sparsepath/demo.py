# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`sparsepath demo`: one region, dense, sparse and pruned."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from . import options
from .console import say, show

EXAMPLES = "Examples:  `sparsepath demo`   ·   `sparsepath demo --image region.png --model ./uni2-h`"


def demo(
    image: Annotated[Path | None, typer.Option(help="Any image; a bundled tissue image by default.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint: folder or Hub id; the installed trained tiny ViT by default.")
    ] = None,
    size: Annotated[int, typer.Option(min=14, help="Pixels of the region's side.")] = 3430,
    out: Annotated[Path, typer.Option(help="Folder for features and pictures.")] = Path("outputs/demo"),
    dense_budget: Annotated[float, typer.Option(help="Seconds the dense run may take.")] = 30.0,
    device: options.Device = None,
) -> None:
    """One real region, dense, sparse, and sparse + pruned: table, features, prune map."""
    from sparsepath_vit.comparison.demo import run_demo

    report = run_demo(out, image_file=image, model_source=model, size=size, dense_budget=dense_budget, device=device)
    table = Table("px", "attention", "tokens", "keys per query", "seconds", "peak memory", "CLS cosine to dense")
    for row in report.rows:
        before, after = row.tokens
        table.add_row(
            f"{row.size[0]} x {row.size[1]}",
            row.variant,
            f"{before:,}" if before == after else f"{before:,} -> {after:,}",
            f"{row.keys_per_query:,.0f}",
            f"{row.seconds:.1f}" if row.was_run else f"about {row.seconds:,.0f} (not run)",
            f"{row.peak_bytes / 2**30:.2f} GiB" if row.was_run else "-",
            "-" if row.cosine is None else f"{row.cosine:.4f}",
        )
    say(f"\nmodel: {report.model}")
    show(table)
    for file in report.files:
        say(f"wrote {file}")
