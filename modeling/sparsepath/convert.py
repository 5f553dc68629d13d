# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`sparsepath convert`: a foundation model's checkpoint -> a SparsePathViT folder."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .console import say, show
from .fidelity import fidelity_table

EXAMPLES = (
    "Examples:  `sparsepath convert MahmoodLab/UNI2-h ./uni2-h`   ·   "
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
    verify: Annotated[
        bool, typer.Option(help="Run the source network beside ours, and sparse variants beside the dense model.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the output folder.")] = False,
) -> None:
    """Convert a foundation model's checkpoint; the weights are renamed, never changed."""
    from sparsepath_vit.conversion import convert_checkpoint, verify_conversion

    overrides = dict(parse_setting(setting) for setting in set_ or [])
    report = convert_checkpoint(source, out, architecture=architecture, dtype=dtype, overwrite=overwrite, **overrides)
    say(report)
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
        show(table)
        show_fidelity(out)


def show_fidelity(folder: Path) -> None:
    """Compares the variants of a converted checkpoint on a tissue image; shows it and writes it into its card."""
    from sparsepath_vit.comparison.fidelity import compare_image, markdown_table
    from sparsepath_vit.comparison.images import bundled_image
    from sparsepath_vit.conversion.model_card import add_section
    from sparsepath_vit.runtime.load_model import load_model

    try:
        image = bundled_image()
    except ImportError as error:
        say(f"How near the variants come to the dense model was not measured. {error}")
        return
    model, processor = load_model(str(folder), "cpu")
    rows = compare_image(model, processor, image)
    show(fidelity_table(rows))
    meaning = (
        "How alike the features are to the dense model's, on one tissue image of 512 x 512 px (scikit-image's "
        "immunohistochemistry): with another pattern the same weights give other features, so train and use a head on "
        "features of one variant only. Patch tokens are compared after subtracting the dense mean token."
    )
    card = add_section(folder, "Variants against the dense model", f"{meaning}\n\n{markdown_table(rows)}")
    say(f"wrote {card}")


def parse_setting(setting: str) -> tuple[str, object]:
    """`name=value` with a JSON value, or a plain word.

    Raises:
        ValueError: there is no `=`.
    """
    name, separator, value = setting.partition("=")
    if not separator:
        raise ValueError(f"--set {setting!r} is not of the form NAME=VALUE, for example prune_ratio=0.6.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
