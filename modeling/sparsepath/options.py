# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Options that several commands share: one spelling, one meaning, one help text."""

from typing import Annotated, Literal

import typer

Checkpoint = Annotated[str, typer.Option(help="Converted checkpoint: folder or Hub id.")]
Mpp = Annotated[
    float | None,
    typer.Option(
        help="Micrometres per pixel to embed at; the processor's target_mpp, else 0.5, by default. What the slides "
        "themselves have is --slide-mpp."
    ),
]
SlideMpp = Annotated[
    float | None,
    typer.Option(help="Micrometres per pixel of the slides themselves, where they state it wrongly or not."),
]
RegionSize = Annotated[int, typer.Option(min=1, help="Pixels of a region's side.")]
Overlap = Annotated[int, typer.Option(min=0, help="Pixels that neighbouring regions share.")]
WholeSlide = Annotated[bool, typer.Option("--whole-slide", help="All tissue of a slide in one forward.")]
TissueMask = Annotated[
    str | None, typer.Option(help="Image or GeoJSON instead of finding tissue; a folder of them; or 'all'.")
]
AnnotationClass = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Take polygons of this class alone, where annotations are given as GeoJSON; may be repeated.",
    ),
]
Origin = Annotated[
    Literal["bounds", "slide"],
    typer.Option(
        help="Where coordinates (annotations, tables, results) start on a slide that states its scanned area: there, "
        "as in QuPath (bounds), or at the corner of level 0, as in OpenSlide (slide)."
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Threads that read ahead; one per core, at most 8.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one by default.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; by default float32 or bfloat16, whichever is faster there."),
]
