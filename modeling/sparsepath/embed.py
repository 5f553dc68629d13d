# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`sparsepath embed`: slides -> embeddings."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import options
from .console import say

if TYPE_CHECKING:
    from sparsepath_vit.slides import EmbedReport

EXAMPLES = (
    "Examples:  `sparsepath embed slides/ --model ./uni2-h --out embeddings`   ·   "
    "`sparsepath embed list.csv --model ./uni2-h --out dense --whole-slide --dense`   ·   "
    "`sparsepath embed slides/ --model ./uni2-h --out tiles --tile-size 224 --minimum-tissue 0.1`   ·   "
    "`sparsepath embed slides/ --model ./uni2-h --out tumor --regions annotations/ --annotation-class Tumor`   ·   "
    "several GPUs: `accelerate launch -m sparsepath embed slides/ --model ./uni2-h --out embeddings`   ·   "
    "two processes, also without a GPU: `torchrun --nproc_per_node 2 -m sparsepath embed slides/ "
    "--model ./uni2-h --out embeddings`   ·   "
    "one slide over two: `torchrun --nproc_per_node 2 -m sparsepath embed slide.svs --model ./uni2-h --out whole "
    "--whole-slide --split-slide`"
)

Slides = Annotated[list[Path], typer.Argument(help="Slide files, folders, or a CSV: slide,mpp,x,y,width,height,label.")]
EmbeddingsFolder = Annotated[Path, typer.Option(help="Folder for one HDF5 file per slide.")]
MinimumTissue = Annotated[
    float,
    typer.Option(min=0, max=1, help="Leave out regions (tiles, where --tile-size asks for them) with less tissue."),
]
Dense = Annotated[bool, typer.Option("--dense", help="Store the features of all kept patch tokens.")]
Regions = Annotated[
    Path | None,
    typer.Option(
        help="Regions of another tool instead of a grid: coordinates (.h5 of TRIDENT or CLAM, .coordinates.npz of "
        "slide2vec) or QuPath's GeoJSON (classes as labels); a file, or a folder with one of each slide's name."
    ),
]
Format = Annotated[
    Literal["hdf5", "anndata", "zarr"],
    typer.Option(help="Also write each slide's features as AnnData (.h5ad or .zarr), as LazySlide lays it out."),
]
TileSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Average the patch tokens over tiles of this side (224, 256, ...): a vector for each tile."
    ),
]
Attention = Annotated[
    Literal["mean", "heads"] | None,
    typer.Option(help="With --dense: store what the global tokens attend to, the mean of all heads or each head."),
]
SplitSlide = Annotated[
    bool,
    typer.Option(
        "--split-slide", help="With --whole-slide and several processes: share each slide out over them, by rows."
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Regions per forward.")]


def embed(
    slides: Slides,
    model: options.Checkpoint,
    out: EmbeddingsFolder,
    mpp: options.Mpp = None,
    slide_mpp: options.SlideMpp = None,
    region_size: options.RegionSize = 3430,
    overlap: options.Overlap = 0,
    minimum_tissue: MinimumTissue = 0.0,
    whole_slide: options.WholeSlide = False,
    dense: Dense = False,
    tile_size: TileSize = None,
    attention: Attention = None,
    tissue_mask: options.TissueMask = None,
    regions: Regions = None,
    split_slide: SplitSlide = False,
    annotation_class: options.AnnotationClass = None,
    format: Format = "hdf5",
    origin: options.Origin = "bounds",
    batch_size: BatchSize = 1,
    workers: options.Workers = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Embed slides, one HDF5 file each; run it again to go on where it stopped."""
    from sparsepath_vit.slides import EmbedSettings, embed_slides

    settings = EmbedSettings(
        mpp, region_size, overlap, minimum_tissue, whole_slide, dense, origin, tile_size, attention,
        tuple(annotation_class or ()),
    )  # fmt: skip
    running = {"batch_size": batch_size, "workers": workers, "device": device, "dtype": dtype}
    report = embed_slides(
        slides, model, out, settings, slide_mpp=slide_mpp, tissue_mask=tissue_mask, regions=regions,
        table_format=None if format == "hdf5" else format, split_slide=split_slide, **running,
    )  # fmt: skip
    _finish(report, out)


def _finish(report: "EmbedReport", out: Path) -> None:
    """Prints the report and makes the exit code 1 where slides failed: in the first process, for all of them.

    A launcher stops all processes when one ends with an error: the first could be stopped before it has printed.
    """
    from accelerate import PartialState

    from sparsepath_vit.slides.store import FAILURES_FILE

    if not PartialState().is_main_process:
        return
    say(report)
    if report.failed:
        say(f"{len(report.failed)} failed: see {out / FAILURES_FILE}")
        raise typer.Exit(1)
