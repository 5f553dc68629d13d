# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`sparsepath view`: a window on slides and their tokens, in the browser."""

from pathlib import Path
from typing import Annotated

import typer

from . import options
from .console import say

EXAMPLES = (
    "Examples:  `sparsepath view CMU-1.svs --embedding dense/CMU-1.h5`   ·   "
    "`sparsepath view CMU-1.svs --model ./uni2-h`   ·   "
    "`sparsepath view CMU-1.svs CMU-2.svs --embedding dense`"
)

Slides = Annotated[list[Path], typer.Argument(help="Slide files, whatever `sparsepath embed` reads.")]
Embeddings = Annotated[
    list[Path] | None,
    typer.Option(
        "--embedding",
        help="HDF5 file from `sparsepath embed --dense`, one for each slide in the same order; or their folder.",
    ),
]
Model = Annotated[
    str | None, typer.Option(help="Converted checkpoint, folder or Hub id: embeds the slides first, where not done.")
]
OutFolder = Annotated[Path, typer.Option(help="With --model: folder for the HDF5 files.")]
Values = Annotated[
    list[Path] | None,
    typer.Option(help=".npy file with a number, or a row of class probabilities, per kept or tissue token."),
]
Probe = Annotated[
    Path | None, typer.Option(help="Linear classifier of tokens: safetensors with weight, bias and names.")
]
Polygons = Annotated[
    list[Path] | None, typer.Option(help="GeoJSON to draw: from `sparsepath segment`, or annotations of QuPath.")
]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port of this machine; any free one where 0.")]
NoBrowser = Annotated[bool, typer.Option("--no-browser", help="Print the address only.")]


def view(
    slides: Slides,
    embedding: Embeddings = None,
    model: Model = None,
    out: OutFolder = Path("outputs/view"),
    values: Values = None,
    probe: Probe = None,
    polygons: Polygons = None,
    mpp: options.Mpp = None,
    slide_mpp: options.SlideMpp = None,
    origin: options.Origin = "bounds",
    port: Port = 0,
    no_browser: NoBrowser = False,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Look at slides in the browser: zoom, token overlays, click for what looks alike, draw polygons."""
    from sparsepath_vit.runtime.extras import imports_of_extra

    with imports_of_extra("view", "bokeh.server.server", asked_by="sparsepath view"):
        from sparsepath_vit.slides.reading_process import reading_process

        reading_process()  # starts while the rest is imported
        from sparsepath_vit.slides.view import open_viewer

    if model is not None:
        if embedding:
            raise ValueError("--embedding and --model were given: the model is for slides that are not embedded yet.")
        _embed(slides, model, out, mpp, slide_mpp, origin, device, dtype)
        embedding = [out]
    viewer = open_viewer(
        slides, embedding or (), values=values or (), probe=probe, polygons=polygons or (),
        slide_mpp=slide_mpp, origin=origin, port=port,
    )  # fmt: skip
    say(f"{viewer.url}\nThe address is for you alone: it holds a key. Ctrl-C ends it.")
    if not no_browser:
        import webbrowser

        webbrowser.open(viewer.url)
    viewer.wait()


def _embed(
    slides: list[Path],
    model: str,
    out: Path,
    mpp: float | None,
    slide_mpp: float | None,
    origin: str,
    device: str | None,
    dtype: str | None,
) -> None:
    """What the page needs of slides that are not embedded yet."""
    from sparsepath_vit.slides import EmbedSettings, embed_slides

    settings = EmbedSettings(mpp=mpp, dense=True, origin=origin, attention="mean")
    say(embed_slides(slides, model, out, settings, slide_mpp=slide_mpp, device=device, dtype=dtype))
