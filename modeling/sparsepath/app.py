# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The `sparsepath` command: arguments in, library calls, tables out. No logic of its own."""

import json
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub.errors import StrictDataclassError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparsepath_vit.version import __version__

from .slide_commands import register as register_slide_commands

app = typer.Typer(
    name="sparsepath",
    help="Pathology foundation models on large regions and whole slides.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
console = Console()


def main() -> None:
    """Entry point of the `sparsepath` command: expected errors end in one readable line, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(1) from error


def _print_version(is_asked: bool) -> None:
    if is_asked:
        console.print(f"sparsepath-vit {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Pathology foundation models on large regions and whole slides."""


@app.command(epilog="Examples:  `sparsepath demo`   ·   `sparsepath demo --image region.png --model ./uni2-h`")
def demo(
    image: Annotated[Path | None, typer.Option(help="Any image; a bundled tissue image by default.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint: folder or Hub id; the installed trained tiny ViT by default.")
    ] = None,
    size: Annotated[int, typer.Option(min=14, help="Pixels of the region's side.")] = 3430,
    out: Annotated[Path, typer.Option(help="Folder for features and pictures.")] = Path("outputs/demo"),
    dense_budget: Annotated[float, typer.Option(help="Seconds the dense run may take.")] = 30.0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one by default.")] = None,
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
    console.print(f"\nmodel: {report.model}", markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    for file in report.files:
        console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)


@app.command(
    epilog="Examples:  `sparsepath convert MahmoodLab/UNI2-h ./uni2-h`   ·   "
    "`sparsepath convert weights.bin ./virchow2 --architecture virchow2 --verify --set prune_ratio=0.6`"
)
def convert(
    source: Annotated[str, typer.Argument(help="Weights file, folder or Hub id.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    architecture: Annotated[str | None, typer.Option(help="Known model, see `sparsepath models`.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; the source's by default.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Config field, for example --set prune_ratio=0.6.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Run the source network beside ours and print the difference.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder.")] = False,
) -> None:
    """Convert a foundation model's checkpoint; the weights are renamed, never changed."""
    from sparsepath_vit.conversion import convert_checkpoint, verify_conversion

    overrides = dict(_parse_setting(setting) for setting in set_ or [])
    report = convert_checkpoint(source, out, architecture=architecture, dtype=dtype, overwrite=overwrite, **overrides)
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    if verify:
        table = Table("px", "attention", "against", "max abs error", "relative to output", "note")
        for parity in verify_conversion(source, out, architecture=architecture):
            table.add_row(
                f"{parity.height} x {parity.width}",
                parity.pattern,
                parity.peer,
                f"{parity.max_abs_error:.1e}",
                f"{parity.relative_error:.1e}",
                parity.note,
            )
        console.print(table)


def _parse_setting(setting: str) -> tuple[str, object]:
    """`name=value` with a JSON value, or a plain word."""
    name, separator, value = setting.partition("=")
    if not separator:
        raise ValueError(f"--set {setting!r} is not of the form NAME=VALUE, for example prune_ratio=0.6.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


@app.command(epilog="Example:  `sparsepath models`")
def models() -> None:
    """List the known foundation models: name, Hub id, shape, licence."""
    from sparsepath_vit.conversion import known_architectures

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("name", no_wrap=True)  # what --architecture takes: never cut off
    for title in ("Hub id", "width x depth", "heads", "patch", "registers", "pooling", "mpp", "licence"):
        table.add_column(title, overflow="fold")
    for known in known_architectures():
        config = known.build_config()
        table.add_row(
            known.name,
            known.hub_id or "(no checkpoint)",
            f"{config.hidden_size} x {config.num_hidden_layers}",
            str(config.num_attention_heads),
            str(config.patch_size),
            str(config.num_register_tokens),
            config.pooling,
            ", ".join(f"{mpp:g}" for mpp in known.mpp) or "-",
            (known.licence or "-") + (" (gated)" if known.gated else ""),
        )
    console.print(table)


@app.command(epilog="Example:  `sparsepath doctor`")
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
    console.print(table)


register_slide_commands(app, console)
