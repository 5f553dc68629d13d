# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`sparsepath fidelity`: how near sparse, stratified and pruned features come to the dense model's."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from . import options
from .console import say, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sparsepath_vit.comparison.fidelity import Fidelity

EXAMPLES = (
    "Examples:  `sparsepath fidelity region.png --model ./uni2-h`   ·   "
    "`sparsepath fidelity region.png --model ./uni2-h --size 700 --size 1400`"
)


def fidelity(
    region: Annotated[Path, typer.Argument(help="Any image of a region.")],
    model: options.Checkpoint,
    size: Annotated[
        list[int] | None, typer.Option(min=14, help="Pixels of the longer side; several are possible. As it is else.")
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """The same weights, dense, block-local, stratified and pruned: how alike the features are, and what they cost."""
    from tqdm import tqdm

    from sparsepath_vit.comparison.fidelity import compare_image
    from sparsepath_vit.comparison.images import read_image, resized
    from sparsepath_vit.runtime.compute import torch_device, weight_dtype
    from sparsepath_vit.runtime.load_model import load_model

    on = torch_device(device)
    loaded, processor = load_model(model, on, weight_dtype(dtype, on))
    image = read_image(region, "region")
    for side in tqdm(size or [None], desc="fidelity", unit="size", disable=None):
        rows = compare_image(loaded, processor, resized(image, side))
        say(f"\n{region.name}, {rows[0].size[0]} x {rows[0].size[1]} px, {rows[0].tokens:,} patch tokens")
        show(fidelity_table(rows))
    say(
        "Centred: after subtracting the dense mean token, since any two patch tokens are alike (any two: a variant's "
        "own, plain). Estimated: from two draws of context tokens, without the dense model. Use a head only on "
        "features of the variant it was trained on."
    )


def fidelity_table(rows: "Sequence[Fidelity]") -> Table:
    """Variants beside each other, the dense model first; five of them fit a terminal of 80 columns."""
    table = Table("cosine to dense", *(row.variant for row in rows))
    lines = (
        ("CLS", lambda row: f"{row.cls_cosine:.4f}"),
        ("CLS, estimated", _estimated),
        ("pooled", lambda row: f"{row.pooled_cosine:.4f}"),
        ("patches, centred", lambda row: f"{row.centred_patch_cosine:.3f}"),
        ("- 5 % are below", lambda row: f"{row.centred_patch_cosine_p5:.3f}"),
        ("patches, plain", lambda row: f"{row.patch_cosine:.3f}"),
        ("- 5 % are below", lambda row: f"{row.patch_cosine_p5:.3f}"),
        ("- any two", lambda row: f"{row.self_similarity:.3f}"),
        ("keys a query", lambda row: f"{row.keys_per_query:,.0f}"),
        ("seconds", lambda row: f"{row.seconds:.1f}"),
        ("peak memory", lambda row: f"{row.peak_bytes / 2**30:.2f} GiB"),
    )
    for title, of_row in lines:
        table.add_row(title, *map(of_row, rows))
    return table


def _estimated(row: "Fidelity") -> str:
    return "-" if row.estimated_cls_error is None else f"{1 - row.estimated_cls_error:.4f}"
