# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""From files to the page: slides and their embeddings are paired, checked and opened."""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from ..embedded_slide import EmbeddedSlide
from ..errors import SlideError
from ..feature_colors import fit_feature_colors
from ..reader import Slide
from ..reading_process import reading_process
from ..token_probabilities import TokenProbe
from .contents import ViewedSlide
from .lasting_slide import LastingSlide
from .server import SlideViewer

PathLike = str | os.PathLike[str]


def open_viewer(
    slides: Sequence[PathLike],
    embeddings: Sequence[PathLike] = (),
    *,
    values: Sequence[PathLike] = (),
    probe: PathLike | None = None,
    polygons: Sequence[PathLike] = (),
    slide_mpp: float | None = None,
    origin: str = "bounds",
    port: int = 0,
) -> SlideViewer:
    """Opens slides and starts the page that shows them; `url` of the result is its address.

    Args:
        slides: the slide files.
        embeddings: their HDF5 files from `embed --dense`, in the same order; or one folder with a file of each slide's
            name. None to show the slides alone.
        values: `.npy` files with one number per token, or a table, of one slide.
        probe: a linear classifier of tokens; see `TokenProbe`.
        polygons: GeoJSON files with segmented pieces or annotations of one slide.
        slide_mpp: full resolution of the slides, where the files do not state it or state it wrongly.
        origin: where coordinates start; see `Slide`.
        port: of the loopback address; any free one where 0.

    Raises:
        SlideError: a slide or an embedding cannot be used; the message says which command makes it.
        OSError: the port is in use, or a file cannot be read.
        ImportError: a library of the extras `slides` and `view` is missing.

    Example:
    ```python
    >>> viewer = open_viewer(["CMU-1.svs"], ["dense/CMU-1.h5"])
    >>> viewer.url
    >>> viewer.stop()
    ```
    """
    if not slides:
        raise SlideError("no slides were given: pass at least one file.")
    if len(slides) > 1 and (values or polygons):
        raise SlideError("values and polygons are of one slide: pass only one, or leave them out.")
    reading_process()  # starts while files are looked for
    opened = [LastingSlide(Path(path), slide_mpp, origin) for path in slides]
    files = _embedding_files(opened, [Path(path) for path in embeddings])
    embedded = [None if file is None else EmbeddedSlide(file) for file in files]
    if embedded and None not in embedded and len({item.features.shape[1] for item in embedded}) > 1:
        raise SlideError("the embeddings are of models of different widths: show slides that one model has embedded.")
    colors = cache(lambda: fit_feature_colors([item for item in embedded if item is not None]))
    classifier = None if probe is None else TokenProbe.load(probe)
    extra = ([Path(path) for path in values], classifier, [Path(path) for path in polygons])
    shown = [ViewedSlide(slide, item, colors, *extra) for slide, item in zip(opened, embedded, strict=True)]
    return SlideViewer(shown, port)


def _embedding_files(slides: Sequence[Slide], embeddings: Sequence[Path]) -> list[Path | None]:
    if not embeddings:
        return [None] * len(slides)
    if len(embeddings) == 1 and embeddings[0].is_dir():
        embeddings = [embeddings[0] / f"{slide.name}.h5" for slide in slides]
    if len(embeddings) != len(slides):
        raise SlideError(
            f"{len(slides)} slides and {len(embeddings)} embeddings were given: pass one for each, in the same order, "
            "or the folder that holds them."
        )
    for slide, file in zip(slides, embeddings, strict=True):
        if not file.exists():
            raise SlideError(
                f"{file} does not exist: `sparsepath embed {slide.path} --model MODEL --out {file.parent} --dense` "
                "makes it."
            )
    return list(embeddings)
