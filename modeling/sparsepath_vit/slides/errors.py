# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What reading a slide raises, and what the libraries underneath raise on bytes that are not as they should be."""

import lzma
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from PIL.Image import DecompressionBombError

DAMAGED = "If it is a slide, it is damaged or truncated: copy it again and compare its size with the original."
# Damaged headers reach arithmetic and allocations of the decoders before anything checks them.
_OF_DAMAGED_BYTES = (
    *(ValueError, OSError, RuntimeError, SyntaxError, EOFError, ArithmeticError, MemoryError),
    *(struct.error, zlib.error, lzma.LZMAError, DecompressionBombError),
)
# What a decoder raises that takes a damaged value for what it should have been. Raised by our own lines it is a fault.
_OF_UNCHECKED_VALUES = (LookupError, TypeError, AttributeError, AssertionError)
_PACKAGE = __name__.partition(".")[0]


class SlideError(ValueError):
    """A slide cannot be read, or not as asked. The message names the file and the way out."""


class DecoderEndedError(SlideError):
    """The process that decoded a slide ended: by the bytes asked for, or by those that another thread asked for."""


class UnsupportedSlideError(SlideError):
    """The file is sound, and what it holds has no one right meaning as RGB, or no decoder here."""


class DeclaredSizeError(SlideError):
    """The header declares sizes that cannot be true: no decoder may be asked, as it would allocate them first."""


@contextmanager
def decoding(what: str = "") -> Iterator[None]:
    """Around what a decoder does with a file, also as a decorator: what it raises on damaged bytes is a `SlideError`.

    Type, attribute, look-up and assertion errors count as the file's only where a library raised them: those of our
    own lines are faults of ours and stay what they are.

    Args:
        what: the beginning of the message, such as "tile 7 cannot be decoded"; the decoder's words follow.

    Raises:
        SlideError: the bytes are damaged; the decoder's error is its cause.
    """
    try:
        yield
    except SlideError:
        raise
    except _OF_DAMAGED_BYTES as error:
        raise SlideError(_sentence(what, error)) from error
    except _OF_UNCHECKED_VALUES as error:
        if _is_of_our_own_lines(error):
            raise
        raise SlideError(_sentence(what, error)) from error


def _sentence(what: str, error: Exception) -> str:
    if isinstance(error, MemoryError):
        reason = "more memory is asked for than there is"
    elif isinstance(error, _OF_UNCHECKED_VALUES) or not str(error):
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    else:
        reason = str(error)
    return f"{what}: {reason}" if what else reason


def _is_of_our_own_lines(error: Exception) -> bool:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    module = place.tb_frame.f_globals.get("__name__", "") if place is not None else ""
    return module.partition(".")[0] == _PACKAGE
