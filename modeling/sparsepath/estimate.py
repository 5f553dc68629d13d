# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`sparsepath estimate`: what a run will take, before it is run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from . import options
from .console import show

if TYPE_CHECKING:
    from sparsepath_vit.model.configuration_sparsepath_vit import SparsePathViTConfig

EXAMPLES = (
    "Examples:  `sparsepath estimate CMU-1.svs --model ./uni2-h --whole-slide`   ·   "
    "`sparsepath estimate --size 3430 --model uni2-h`   ·   "
    "`sparsepath estimate --size 13720 --model uni2-h --processes 2`"
)


def estimate(
    slide: Annotated[Path | None, typer.Argument(help="A slide.")] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Instead of a slide: pixels of a region's side.")] = None,
    model: Annotated[str, typer.Option(help="Folder, Hub id, or a name of `sparsepath models`.")] = "uni2-h",
    prune_ratio: Annotated[float | None, typer.Option(min=0, max=1, help="Instead of the model's own.")] = None,
    mpp: options.Mpp = None,
    slide_mpp: options.SlideMpp = None,
    region_size: options.RegionSize = 3430,
    overlap: options.Overlap = 0,
    whole_slide: options.WholeSlide = False,
    tissue_mask: options.TissueMask = None,
    annotation_class: options.AnnotationClass = None,
    origin: options.Origin = "bounds",
    workers: options.Workers = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    processes: Annotated[
        int, typer.Option(min=1, help="That share the slide (`embed --split-slide`) or region; memory is one's.")
    ] = 1,
) -> None:
    """Tokens, FLOPs, time and memory before a run, from a two-layer probe on this machine."""
    from sparsepath_vit.slides import EmbedSettings
    from sparsepath_vit.slides.estimate import estimate_for

    config = _config_of(model)
    if prune_ratio is not None:
        config.prune_ratio = prune_ratio
    classes = tuple(annotation_class or ())
    settings = EmbedSettings(
        mpp, region_size, overlap, whole_slide=whole_slide, origin=origin, annotation_classes=classes
    )
    given = {"tissue_mask": tissue_mask, "workers": workers, "device": device, "dtype": dtype, "processes": processes}
    result = estimate_for(config, slide, size, settings, slide_mpp=slide_mpp, **given)
    table = Table(show_header=False)
    for name, shown in result.lines():
        table.add_row(name, shown)
    show(table)


def _config_of(model: str) -> "SparsePathViTConfig":
    """The configuration of a known architecture, or of a checkpoint."""
    from sparsepath_vit.conversion.architectures import architecture, architecture_of_hub_id
    from sparsepath_vit.runtime.checkpoint_paths import checkpoint_config

    if Path(model).expanduser().exists():
        return checkpoint_config(model)
    published = architecture_of_hub_id(model)  # known without asking the Hub
    if published is not None:
        return published.build_config()
    if "/" in model:
        return checkpoint_config(model)
    try:
        return architecture(model).build_config()
    except ValueError as error:
        raise ValueError(f"model={model!r} is no folder here, and no Hub id (owner/name): {error}") from error
