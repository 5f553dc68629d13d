# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A slide for a page that stays open: damaged bytes cost a tile, not the server and not the slide."""

from pathlib import Path

from ..backends import Backend
from ..reader import Slide
from ..reading_process import ApartBackend


class LastingSlide(Slide):
    """A slide that another process decodes; where that process ended the next reading starts a new one.

    A run over many slides gives a slide up whose decoder broke down. A page shows what else there is of it.

    Args:
        path: the slide file.
        mpp: see `Slide`.
        origin: see `Slide`.

    Raises:
        SlideError: see `Slide`.
    """

    def __init__(self, path: Path, mpp: float | None = None, origin: str = "bounds") -> None:
        super().__init__(path, mpp, origin, apart=True)

    def _open(self) -> Backend:
        ended = self._handle
        if isinstance(ended, ApartBackend) and ended.has_ended:
            with self._lock:
                if self._handle is ended:  # of several threads one opens it again
                    self._handle = None
        return super()._open()
