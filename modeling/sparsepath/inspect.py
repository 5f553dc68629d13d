# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`sparsepath inspect`: what a slide holds, and what `embed` would do with it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .console import say

if TYPE_CHECKING:
    from sparsepath_vit.slides.inspection import Inspection

EXAMPLES = (
    "Examples:  `sparsepath inspect CMU-1.svs`   ·   "
    "`sparsepath inspect slides/*.mrxs --region-size 1792 --tissue-mask masks --out outputs/inspection`"
)


def inspect(
    slides: Annotated[list[Path], typer.Argument(help="Slide files.")],
    out: Annotated[Path, typer.Option(help="Folder for one picture a slide.")] = Path("outputs/inspection"),
    mpp: options.Mpp = None,
    slide_mpp: options.SlideMpp = None,
    region_size: options.RegionSize = 3430,
    overlap: options.Overlap = 0,
    whole_slide: options.WholeSlide = False,
    tissue_mask: options.TissueMask = None,
    annotation_class: options.AnnotationClass = None,
    origin: options.Origin = "bounds",
    patch_size: Annotated[int, typer.Option(min=1, help="Pixels of a patch token's side, of the model.")] = 14,
    max_size: Annotated[int, typer.Option(min=64, help="Pixels of the picture's longer side.")] = 1024,
) -> None:
    """Describe slides: levels, resolution, bounds, colours, tissue, what embed would do, and a picture of it."""
    from sparsepath_vit.slides import EmbedSettings
    from sparsepath_vit.slides.inspection import inspect_slide

    classes = tuple(annotation_class or ())
    settings = EmbedSettings(
        mpp, region_size, overlap, whole_slide=whole_slide, origin=origin, annotation_classes=classes
    )
    has_problems = False
    for slide in slides:
        found = inspect_slide(
            slide, settings, patch_size=patch_size, slide_mpp=slide_mpp, tissue_mask=tissue_mask, max_size=max_size
        )
        _print(found, out)
        has_problems |= bool(found.problems)
    if has_problems:
        raise typer.Exit(1)


def _print(found: "Inspection", out: Path) -> None:
    """One slide, a line for each fact, the problems last."""
    picture = found.save_picture(out)
    say(f"{found.path.name}")
    for name, value in found.facts:
        say(f"  {name:12}{value}")
    for problem in found.problems:
        say(f"  {'problem':12}{problem}")
    if picture is not None:
        say(f"  {'picture':12}{picture}")
