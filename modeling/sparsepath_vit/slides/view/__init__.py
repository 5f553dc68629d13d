# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A window on the slide in the browser (extra `view`): zoom, overlays of the tokens, places that look alike."""

from typing import TYPE_CHECKING

from ...runtime.lazy_loading import lazy_names

if TYPE_CHECKING:
    from .contents import ViewedSlide
    from .lasting_slide import LastingSlide
    from .opening import open_viewer
    from .server import SlideViewer

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "contents": ("ViewedSlide",),
        "lasting_slide": ("LastingSlide",),
        "opening": ("open_viewer",),
        "server": ("SlideViewer",),
    },
)

__all__ = ["LastingSlide", "SlideViewer", "ViewedSlide", "open_viewer"]
