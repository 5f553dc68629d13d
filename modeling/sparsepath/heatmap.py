# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`sparsepath heatmap`: token values over a slide."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .console import say

EXAMPLES = (
    "Examples:  `sparsepath heatmap CMU-1.svs dense/CMU-1.h5`   ·   "
    "`sparsepath heatmap CMU-1.svs dense/CMU-1.h5 --value kept --out pictures`   ·   "
    "`sparsepath heatmap CMU-1.svs dense/CMU-1.h5 --value similarity:1200,900`"
)


def heatmap(
    slide: Annotated[Path, typer.Argument(help="The slide.")],
    embeddings: Annotated[Path, typer.Argument(help="Its HDF5 file from `sparsepath embed --dense`.")],
    value: Annotated[
        str,
        typer.Option(
            help="prune_scores, kept, norm, attention (of one global token: attention:0; of a head: attention:0:3), "
            "pca, similarity:X,Y (level-0 pixels), or a .npy file with one number per token."
        ),
    ] = "prune_scores",
    out: Annotated[Path, typer.Option(help="Folder for the picture and the polygons.")] = Path("outputs/heatmaps"),
    max_size: Annotated[int, typer.Option(min=1, help="Pixels of the picture's longer side.")] = 2048,
    opacity: Annotated[float, typer.Option(min=0, max=1, help="Of the colours over the slide.")] = 0.5,
    classes: Annotated[int, typer.Option(min=1, help="Classes of values in the polygons.")] = 5,
    slide_mpp: options.SlideMpp = None,
    origin: options.Origin = "bounds",
) -> None:
    """Draw token values over a slide: a PNG, and GeoJSON polygons that QuPath opens."""
    from sparsepath_vit.slides import Slide
    from sparsepath_vit.slides.heatmap import write_heatmap
    from sparsepath_vit.slides.token_values import read_token_values

    tokens = read_token_values(embeddings, value)
    for file in write_heatmap(Slide(slide, slide_mpp, origin), tokens, out, max_size, opacity, classes):
        say(f"wrote {file}")
