# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`sparsepath segment`: a trained segmentation model on an image or a slide."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .console import say

EXAMPLES = (
    "Examples:  `sparsepath segment region.png --model outputs/epithelium --out outputs/masks`   ·   "
    "`sparsepath segment slide.svs --model outputs/epithelium --out outputs/masks --mpp 0.22 "
    "--region 12000 8000 8192 8192 --window-size 896 --stride 596`   ·   "
    "`sparsepath segment region.png --model outputs/epithelium --out outputs/masks --compare-attention 64 "
    "--compare-attention 2`"
)

ImageOrSlide = Annotated[Path, typer.Argument(help="PNG, JPEG, TIFF, or any slide that `sparsepath embed` reads.")]
SegmentationModel = Annotated[str, typer.Option(help="Segmentation model: folder or Hub id.")]
MasksFolder = Annotated[Path, typer.Option(help="Folder for mask, overlay, polygons and report.")]
WindowSize = Annotated[
    int | None, typer.Option(min=1, help="Pixels of a window's side; the whole region at once by default.")
]
Stride = Annotated[
    int | None, typer.Option(min=1, help="Pixels from window to window; two thirds of a window by default.")
]
SeamBand = Annotated[int, typer.Option(min=1, help="Pixels on either side of a window's edge, for the report.")]
NoWhole = Annotated[bool, typer.Option("--no-whole", help="Do not compare windows with the whole region.")]
Mpp = Annotated[
    float | None, typer.Option(help="Micrometres per pixel to segment at; full resolution as it is by default.")
]
Region = Annotated[
    tuple[int, int, int, int] | None,
    typer.Option(metavar="X Y WIDTH HEIGHT", help="In pixels of the full resolution, from --origin; all by default."),
]
AnnotationsFile = Annotated[
    Path | None, typer.Option(help="GeoJSON of QuPath: segment what lies in its polygons; all else is background.")
]
MinArea = Annotated[int, typer.Option(min=0, help="Pixels below which a piece gets no polygon.")]
AttentionWindow = Annotated[
    int | None, typer.Option(min=0, help="Patch tokens of an attention block's side; 0 is dense; as saved by default.")
]
CompareAttention = Annotated[
    list[int] | None,
    typer.Option(min=0, metavar="TOKENS", help="Also report this attention window against dense; may be repeated."),
]


def segment(
    image: ImageOrSlide,
    model: SegmentationModel,
    out: MasksFolder,
    window_size: WindowSize = None,
    stride: Stride = None,
    seam_band: SeamBand = 32,
    no_whole: NoWhole = False,
    mpp: Mpp = None,
    slide_mpp: options.SlideMpp = None,
    region: Region = None,
    annotations: AnnotationsFile = None,
    annotation_class: options.AnnotationClass = None,
    min_area: MinArea = 0,
    attention_window: AttentionWindow = None,
    compare_attention: CompareAttention = None,
    origin: options.Origin = "bounds",
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Segment an image or a slide: a mask, an overlay, GeoJSON polygons for QuPath and a report."""
    from sparsepath_vit.runtime.extras import imports_of_extra

    with imports_of_extra("train", asked_by="sparsepath segment"):
        from sparsepath_vit.tasks.segmentation import SegmentSettings, segment_file

    settings = SegmentSettings(
        window_size, stride, seam_band, not no_whole, mpp, slide_mpp, region, min_area,
        attention_window, tuple(compare_attention or ()), origin, annotations, tuple(annotation_class or ()),
    )  # fmt: skip
    try:
        report, files = segment_file(image, model, out, settings, device=device, dtype=dtype)
    except (ValueError, OSError) as error:
        raise ValueError(f"{image}: {error}") from error
    for line in (*_lines(report), *(f"wrote {file}" for file in files)):
        say(line)


def _lines(report: dict[str, Any]) -> Iterator[str]:
    """The report in words."""
    for name, share in report["area_share"].items():
        yield f"{name}: {100 * share:.1f} % of the region"
    if "seams" in report:
        seams = report["seams"]
        yield f"{seams['num_windows']} windows of {seams['window']} px against the whole region:"
        for place in ("seam_band", "elsewhere", "all"):
            shares = {name: value for name, value in seams[place].items() if name != "pixels"}
            cells = [f"{name} {'-' if value is None else format(value, '.4f')}" for name, value in shares.items()]
            yield "   ".join([f"  {place:10}", *cells, f"{seams[place]['pixels']:,} px"])
    for row in report.get("attention", ()):
        name = f"w = {row['window_size']}" if row["window_size"] else "dense"
        yield (
            f"  {name:8} mask agreement {row['mask_agreement']:.4f}   Dice {row['dice']:.4f}   "
            f"pieces {row['pieces']}   {row['seconds']:.1f} s   peak {row['peak_bytes'] / 1e6:.0f} MB"
        )
