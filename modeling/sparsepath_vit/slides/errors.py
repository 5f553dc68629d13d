# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What reading a slide raises, and what the libraries underneath raise on bytes that are not as they should be."""

import struct

DAMAGED = "If it is a slide, it is damaged or truncated: copy it again and compare its size with the original."
# Damaged headers reach arithmetic, look-ups and allocations of the decoders before anything checks them.
DECODER_ERRORS = (
    *(ValueError, OSError, RuntimeError, SyntaxError, EOFError, struct.error),
    *(LookupError, TypeError, AttributeError, ArithmeticError, MemoryError),
)


class SlideError(ValueError):
    """A slide cannot be read, or not as asked. The message names the file and the way out."""


class UnsupportedSlideError(SlideError):
    """The file is sound, and what it holds has no one right meaning as RGB, or no decoder here."""
