# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The `sparsepath` commands on slides: arguments in, library calls, results out. No logic of their own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from sparsepath_vit.model.configuration_sparsepath_vit import SparsePathViTConfig
    from sparsepath_vit.slides.embedder import EmbedReport

SlidesArgument = Annotated[
    list[Path], typer.Argument(help="Slide files, folders, or a CSV: slide,mpp,x,y,width,height,label.")
]
CheckpointOption = Annotated[str, typer.Option(help="Converted checkpoint: folder or Hub id.")]
EmbeddingsFolderOption = Annotated[Path, typer.Option(help="Folder for one HDF5 file per slide.")]
MppOption = Annotated[
    float | None,
    typer.Option(
        help="Micrometres per pixel to embed at; the processor's target_mpp, else 0.5, by default. Slides that do not "
        "state their own resolution are taken to have this one, if it is given."
    ),
]
SlideMppOption = Annotated[
    float | None,
    typer.Option(help="Micrometres per pixel of the slides themselves, where they state it wrongly or not."),
]
RegionSizeOption = Annotated[int, typer.Option(min=1, help="Pixels of a region's side.")]
OverlapOption = Annotated[int, typer.Option(min=0, help="Pixels that neighbouring regions share.")]
MinimumTissueOption = Annotated[
    float, typer.Option(min=0, max=1, help="Leave out regions with a smaller share of tissue tokens.")
]
WholeSlideOption = Annotated[bool, typer.Option("--whole-slide", help="All tissue of a slide in one forward.")]
DenseOption = Annotated[bool, typer.Option("--dense", help="Store the features of all kept patch tokens.")]
MaskOption = Annotated[
    str | None, typer.Option(help="Image or GeoJSON instead of finding tissue; a folder of them; or 'all'.")
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Regions per forward.")]
WorkersOption = Annotated[int | None, typer.Option(min=1, help="Threads that read ahead; one per core, at most 8.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one by default.")]
DtypeOption = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; bfloat16 on CUDA by default.")]


def register(app: typer.Typer, console: Console) -> None:
    """Adds `embed`, `heatmap` and `estimate` to the command line."""
    _add_embed(app, console)
    _add_heatmap(app, console)
    _add_estimate(app, console)


def _add_embed(app: typer.Typer, console: Console) -> None:
    @app.command(
        epilog="Examples:  `sparsepath embed slides/ --model ./uni2-h --out embeddings`   ·   "
        "`sparsepath embed list.csv --model ./uni2-h --out dense --whole-slide --dense`   ·   "
        "several GPUs: `accelerate launch -m sparsepath embed slides/ --model ./uni2-h --out embeddings`   ·   "
        "two processes, also without a GPU: `torchrun --nproc_per_node 2 -m sparsepath embed slides/ "
        "--model ./uni2-h --out embeddings`"
    )
    def embed(
        slides: SlidesArgument,
        model: CheckpointOption,
        out: EmbeddingsFolderOption,
        mpp: MppOption = None,
        slide_mpp: SlideMppOption = None,
        region_size: RegionSizeOption = 3430,
        overlap: OverlapOption = 0,
        minimum_tissue: MinimumTissueOption = 0.0,
        whole_slide: WholeSlideOption = False,
        dense: DenseOption = False,
        tissue_mask: MaskOption = None,
        batch_size: BatchSizeOption = 1,
        workers: WorkersOption = None,
        device: DeviceOption = None,
        dtype: DtypeOption = None,
    ) -> None:
        """Embed slides, one HDF5 file each; run it again to go on where it stopped."""
        from sparsepath_vit.slides.embed import embed_slides
        from sparsepath_vit.slides.embedder import EmbedSettings

        report = embed_slides(
            slides,
            model,
            out,
            EmbedSettings(mpp, region_size, overlap, minimum_tissue, whole_slide, dense),
            slide_mpp=slide_mpp,
            tissue_mask=tissue_mask,
            batch_size=batch_size,
            workers=workers,
            device=device,
            dtype=dtype,
        )
        _finish(report, out, console)


def _finish(report: "EmbedReport", out: Path, console: Console) -> None:
    """Prints the report and makes the exit code 1 where slides failed: in the first process, for all of them.

    A launcher stops all processes when one ends with an error: the first could be stopped before it has printed.
    """
    from accelerate import PartialState

    from sparsepath_vit.slides.store import FAILURES_FILE

    if not PartialState().is_main_process:
        return
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    if report.failed:
        console.print(
            f"[bold red]{len(report.failed)} failed:[/] see {escape(str(out / FAILURES_FILE))}", soft_wrap=True
        )
        raise typer.Exit(1)


def _add_heatmap(app: typer.Typer, console: Console) -> None:
    @app.command(
        epilog="Examples:  `sparsepath heatmap CMU-1.svs dense/CMU-1.h5`   ·   "
        "`sparsepath heatmap CMU-1.svs dense/CMU-1.h5 --value kept --out pictures`"
    )
    def heatmap(
        slide: Annotated[Path, typer.Argument(help="The slide.")],
        embeddings: Annotated[Path, typer.Argument(help="Its HDF5 file from `sparsepath embed --dense`.")],
        value: Annotated[
            str, typer.Option(help="prune_scores, kept, norm, or a .npy file with one number per token.")
        ] = "prune_scores",
        out: Annotated[Path, typer.Option(help="Folder for the picture and the polygons.")] = Path("outputs/heatmaps"),
        max_size: Annotated[int, typer.Option(min=1, help="Pixels of the picture's longer side.")] = 2048,
        opacity: Annotated[float, typer.Option(min=0, max=1, help="Of the colours over the slide.")] = 0.5,
        classes: Annotated[int, typer.Option(min=1, help="Classes of values in the polygons.")] = 5,
    ) -> None:
        """Draw token values over a slide: a PNG, and GeoJSON polygons that QuPath opens."""
        from sparsepath_vit.slides.heatmap import read_token_values, write_heatmap
        from sparsepath_vit.slides.reader import Slide

        tokens = read_token_values(embeddings, value)
        for file in write_heatmap(Slide(slide), tokens, out, max_size, opacity, classes):
            console.print(f"wrote {file}", markup=False, highlight=False, soft_wrap=True)


def _add_estimate(app: typer.Typer, console: Console) -> None:
    @app.command(
        epilog="Examples:  `sparsepath estimate CMU-1.svs --model ./uni2-h --whole-slide`   ·   "
        "`sparsepath estimate --size 3430 --model uni2-h`"
    )
    def estimate(
        slide: Annotated[Path | None, typer.Argument(help="A slide.")] = None,
        size: Annotated[int | None, typer.Option(min=1, help="Instead of a slide: pixels of a region's side.")] = None,
        model: Annotated[str, typer.Option(help="Folder, Hub id, or a name of `sparsepath models`.")] = "uni2-h",
        prune_ratio: Annotated[float | None, typer.Option(min=0, max=1, help="Instead of the model's own.")] = None,
        mpp: MppOption = None,
        slide_mpp: SlideMppOption = None,
        region_size: RegionSizeOption = 3430,
        overlap: OverlapOption = 0,
        whole_slide: WholeSlideOption = False,
        tissue_mask: MaskOption = None,
        workers: WorkersOption = None,
        device: DeviceOption = None,
        dtype: DtypeOption = None,
    ) -> None:
        """Tokens, FLOPs, time and memory before a run, from a two-layer probe on this machine."""
        from sparsepath_vit.slides.embedder import EmbedSettings
        from sparsepath_vit.slides.estimate import estimate_for

        config = _config_of(model)
        if prune_ratio is not None:
            config.prune_ratio = prune_ratio
        settings = EmbedSettings(mpp, region_size, overlap, whole_slide=whole_slide)
        options = {"tissue_mask": tissue_mask, "workers": workers, "device": device, "dtype": dtype}
        result = estimate_for(config, slide, size, settings, slide_mpp=slide_mpp, **options)
        table = Table(show_header=False)
        for name, shown in result.lines():
            table.add_row(name, shown)
        console.print(table)


def _config_of(model: str) -> "SparsePathViTConfig":
    """The configuration of a checkpoint or of a known architecture."""
    from transformers import AutoConfig

    from sparsepath_vit.conversion import architecture

    is_checkpoint = "/" in model or Path(model).is_dir()
    return AutoConfig.from_pretrained(model) if is_checkpoint else architecture(model).build_config()
