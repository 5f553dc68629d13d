# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The `sparsepath` command: arguments in, library calls, tables out. No logic of its own.

Each command lies in a file of its own and imports the library when it runs, so that help comes at once.
"""

from typing import Annotated

import typer

from . import (
    console,
    convert,
    demo,
    doctor,
    embed,
    estimate,
    fidelity,
    heatmap,
    inspect,
    models,
    predict,
    segment,
    train,
    view,
)

app = typer.Typer(
    name="sparsepath",
    help="Pathology foundation models on large regions and whole slides.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def main() -> None:
    """Entry point of the `sparsepath` command: expected errors end in one readable line, not a traceback."""
    console.run(app)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        # Not from sparsepath_vit.version: the package's own __init__.py imports torch and Transformers.
        from importlib.metadata import version

        console.say(f"sparsepath-vit {version('sparsepath-vit')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Pathology foundation models on large regions and whole slides."""


app.command(epilog=demo.EXAMPLES)(demo.demo)
app.command(epilog=convert.EXAMPLES)(convert.convert)
app.command(epilog=models.EXAMPLES)(models.models)
app.command(epilog=doctor.EXAMPLES)(doctor.doctor)
app.command(epilog=inspect.EXAMPLES)(inspect.inspect)
app.command(epilog=estimate.EXAMPLES)(estimate.estimate)
app.command(epilog=fidelity.EXAMPLES)(fidelity.fidelity)
app.command(epilog=embed.EXAMPLES)(embed.embed)
app.command(epilog=heatmap.EXAMPLES)(heatmap.heatmap)
app.command(epilog=segment.EXAMPLES)(segment.segment)
app.command(epilog=view.EXAMPLES)(view.view)
app.command(epilog=train.EXAMPLES)(train.train)
app.command(epilog=predict.EXAMPLES)(predict.predict)
