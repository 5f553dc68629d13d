# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The other end of `reading_process`: opens and decodes slides in a process of its own, as its standard input asks.

A request is a line of JSON; a reply is a line of JSON and, for pixels, the bytes that it announces.
"""

import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .backends import Backend, open_backend
from .errors import SlideError, UnsupportedSlideError

_THREADS = 8  # as many read ahead at most


class _Replies(logging.Handler):
    """Writes replies, and what is logged here as replies too: the asking process logs it."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream, self._one_at_a_time = stream, threading.Lock()

    def send(self, reply: dict[str, Any], pixels: np.ndarray | None = None) -> None:
        """One reply; `pixels` is (height, width, 3) uint8, and its shape is announced."""
        if pixels is not None:
            reply = {**reply, "shape": pixels.shape}
        with self._one_at_a_time:
            self._stream.write(json.dumps(reply).encode() + b"\n")
            if pixels is not None:
                self._stream.write(memoryview(np.ascontiguousarray(pixels)).cast("B"))
            self._stream.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`."""
        self.send({"log": [record.name, record.levelno, record.getMessage()]})


class _Slides:
    """The open slides of this process, by the number that the asking process gave them."""

    def __init__(self) -> None:
        self._backends: dict[int, Backend] = {}

    def open(self, slide: int, path: str, cache_bytes: int) -> tuple[dict[str, Any], None]:
        """What a `Backend` knows of its file."""
        backend = self._backends[slide] = open_backend(Path(path), cache_bytes)
        names = ("name", "level_dimensions", "stated_mpp", "objective_power")
        return {name: getattr(backend, name) for name in names}, None

    def read(self, slide: int, level: int, box: list[int]) -> tuple[dict[str, Any], np.ndarray]:
        """See `Backend.read`; `box` is (x, y, width, height)."""
        return {}, self._backends[slide].read(level, *box)

    def close(self, slide: int) -> tuple[dict[str, Any], None]:
        """Gives the file back; one that did not open is none."""
        backend = self._backends.pop(slide, None)
        if backend is not None:
            backend.close()
        return {}, None


def _answer(replies: _Replies, number: int, work: Callable[..., Any], arguments: dict[str, Any]) -> None:
    try:
        reply, pixels = work(**arguments)
        replies.send({"number": number, **reply}, pixels)
    except UnsupportedSlideError as error:
        replies.send({"number": number, "unsupported": str(error)})
    except SlideError as error:
        replies.send({"number": number, "damaged": str(error)})
    except ImportError as error:
        replies.send({"number": number, "missing": str(error)})
    except Exception:  # a fault of ours: it is raised where the answer is awaited
        replies.send({"number": number, "fault": traceback.format_exc()})


def _limit_memory(more_bytes: int) -> None:
    """Bounds what this process may take beside what it has, so that a damaged header does not fill the memory."""
    try:
        import resource

        with open("/proc/self/statm") as numbers:
            taken = int(numbers.read().split()[5]) * resource.getpagesize()
    except (ImportError, OSError):
        return  # no Linux: the system's own limits hold
    # What is written, not what is mapped: the libraries of a GPU are mapped by gigabytes.
    hardest = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = taken + more_bytes if hardest == resource.RLIM_INFINITY else min(taken + more_bytes, hardest)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hardest))


def answer_requests(more_bytes: int) -> None:
    """Answers until standard input ends.

    Args:
        more_bytes: of memory that this process may take for slides; 0 does not bound it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; this one ends with it
    replies = _Replies(os.fdopen(os.dup(sys.stdout.fileno()), "wb"))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no reply
    logging.basicConfig(level=logging.INFO, handlers=[replies])
    if more_bytes:
        _limit_memory(more_bytes)
    slides, pool = _Slides(), ThreadPoolExecutor(_THREADS)
    for line in sys.stdin.buffer:
        request = json.loads(line)
        work = {"open": slides.open, "read": slides.read, "close": slides.close}[request["work"]]
        pool.submit(_answer, replies, request["number"], work, request["arguments"])
    os._exit(0)  # also where a decoder hangs
