# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""How a slide is opened for a model that is to see it at some resolution."""

import logging
import os

from .reader import Slide

logger = logging.getLogger(__name__)


def slide_to_see_at(
    path: str | os.PathLike[str], slide_mpp: float | None, mpp: float | None, origin: str = "bounds"
) -> Slide:
    """Opens a slide that a model is to see at some resolution; its bytes are decoded in another process.

    A plain image, of one level and no stated objective, is what somebody cut or saved for the purpose. Where it states
    no resolution it is taken to have the one asked for, and a warning says so. A scanner's slide never is.

    Args:
        path: the file.
        slide_mpp: full resolution of the slide, where it is known.
        mpp: resolution asked for; None where nobody asked for one.
        origin: as in `Slide`.

    Raises:
        SlideError: what `Slide` refuses.
    """
    slide = Slide(path, slide_mpp, origin=origin, apart=True)
    if slide_mpp is not None or mpp is None or slide.states_mpp or not slide.is_plain_image:
        return slide
    slide.close()
    logger.warning(
        "%s does not state its resolution: it is taken to have the %g micrometres per pixel that are asked for. If it "
        "has others, say so with slide_mpp (--slide-mpp).",
        *(path, mpp),
    )
    return Slide(path, mpp, origin=origin, apart=True)
