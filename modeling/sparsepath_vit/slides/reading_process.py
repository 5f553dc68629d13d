# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Slides read in another process, which a file that breaks a decoder ends in place of this one.

Decoders are native code: damaged bytes can abort them, fill the memory or never come to an end, and no `except` helps.
A run over many slides reads them through `open_apart`: the worst file costs the process behind it, is named in a
`SlideError`, and the next slide starts a new one. Pixels come back through a pipe, unchanged.
"""

import atexit
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future, TimeoutError
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..runtime.memory import free_bytes
from .errors import DAMAGED, DecoderEndedError, SlideError, UnsupportedSlideError
from .reading_loop import answer_requests
from .resolution import MppXY

logger = logging.getLogger(__name__)

_PATIENCE = 600.0  # seconds for one rectangle or the opening of a file, also over a slow network
_SHARE_OF_MEMORY = 0.8  # of what is free when the process starts
_PIPE_BYTES = 2**20
_PACKAGE = __name__.partition(".")[0]
_PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
# The package's own __init__ imports torch and Transformers, for seconds and hundreds of MB that decoders do without.
_START = f"""
import json, sys, types
sys.path, folder, more_bytes = json.loads(sys.argv[1])
package = sys.modules["{_PACKAGE}"] = types.ModuleType("{_PACKAGE}")
package.__path__ = [folder]
from {answer_requests.__module__} import answer_requests
answer_requests(more_bytes)
"""


class _Ended(Exception):
    """The process ended before it answered; the words say how."""


class ReadingProcess:
    """A process that reads slides for this one. Thread-safe: what threads ask is decoded side by side."""

    def __init__(self) -> None:
        free = free_bytes(torch.device("cpu"))
        more_bytes = int(free * _SHARE_OF_MEMORY) if free else 0
        arguments = json.dumps([sys.path, str(_PACKAGE_FOLDER), more_bytes])
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        _widen(self._process.stdout.fileno())
        self._owner, self._numbers = os.getpid(), itertools.count()
        self._awaited: dict[int, Future] = {}
        self._lock = threading.Lock()
        self._how_it_ended: str | None = None
        threading.Thread(target=self._receive, name="slide pixels", daemon=True).start()

    @property
    def pid(self) -> int:
        """The number that the system gave the process."""
        return self._process.pid

    @property
    def is_usable(self) -> bool:
        """Whether it runs, and belongs to this process rather than to one that forked it."""
        return self._how_it_ended is None and self._owner == os.getpid()

    def ask(self, work: str, **arguments: Any) -> dict[str, Any]:
        """The reply to a request; pixels are in its entry `pixels`, (height, width, 3) uint8.

        Raises:
            SlideError: the file is damaged, or ended the process, or was not read in ten minutes.
            ImportError: a library of the `slides` extra is missing.
            RuntimeError: a fault of this package, with its traceback.
        """
        answer: Future = Future()
        number = next(self._numbers)
        with self._lock:
            if self._how_it_ended is not None:
                raise SlideError(self._how_it_ended)
            self._awaited[number] = answer
            request = {"number": number, "work": work, "arguments": arguments}
            try:
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
            except OSError:
                pass  # it has just ended: `_receive` sees that too, and says how
        try:
            reply = answer.result(_PATIENCE)
        except TimeoutError as error:
            self.end(f"its decoder did not come to an end within {_PATIENCE:.0f} s")
            raise SlideError(self._how_it_ended) from error
        except _Ended as error:
            raise SlideError(str(error)) from error
        for kind, key in ((UnsupportedSlideError, "unsupported"), (SlideError, "damaged"), (ImportError, "missing")):
            if key in reply:
                raise kind(reply[key])
        if "fault" in reply:
            raise RuntimeError(f"a fault of sparsepath_vit in its reading process: {reply['fault']}")
        return reply

    def _receive(self) -> None:
        """Hands out the replies as they come; at the end every waiting thread learns of it."""
        stream = self._process.stdout
        while line := stream.readline():
            if not line.endswith(b"\n"):
                break
            reply = json.loads(line)
            if "log" in reply:
                name, level, message = reply["log"]
                logging.getLogger(name).log(level, "%s", message)
                continue
            if "shape" in reply:
                reply["pixels"] = np.empty(reply["shape"], dtype=np.uint8)
                if stream.readinto(memoryview(reply["pixels"]).cast("B")) < reply["pixels"].nbytes:
                    break
            with self._lock:
                answer = self._awaited.pop(reply["number"], None)
            if answer is not None:
                answer.set_result(reply)
        code = self._process.wait()
        with self._lock:
            self._how_it_ended = self._how_it_ended or _how_it_ended(code)
            awaited, self._awaited = self._awaited, {}
        for answer in awaited.values():
            answer.set_exception(_Ended(self._how_it_ended))

    def end(self, why: str = "its reading process was ended") -> None:
        """Ends the process at once; who still waits for pixels gets a `SlideError` that says `why`."""
        with self._lock:
            self._how_it_ended = self._how_it_ended or why
        self._process.kill()
        self._process.wait()


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"the process that decoded it ended with the code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    memory = ", perhaps for want of memory" if -code in (signal.SIGKILL, signal.SIGABRT) else ""
    return f"its decoder broke down: signal {name}{memory}"


def _widen(pipe: int) -> None:
    """A larger pipe needs fewer turns; it is no matter where the system does not have it."""
    try:
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except (ImportError, AttributeError, OSError):
        logger.debug("the pipe of slide pixels keeps the system's size")


_current: ReadingProcess | None = None
_starting = threading.Lock()


def reading_process() -> ReadingProcess:
    """The process that reads for this one, started where none runs. Its start takes some seconds and is not awaited."""
    global _current
    with _starting:
        if _current is None or not _current.is_usable:
            _current = ReadingProcess()
        return _current


@atexit.register
def _end_with_this_process() -> None:
    if _current is not None and _current.is_usable:
        _current.end()


class ApartBackend:
    """A slide that another process has open."""

    _numbers = itertools.count()

    def __init__(self, path: Path, cache_bytes: int) -> None:
        self._process, self._number, self._path = reading_process(), next(self._numbers), path
        facts = self._ask("open", path=str(path.absolute()), cache_bytes=cache_bytes)
        self.name: str = facts["name"]
        self.level_dimensions: tuple[tuple[int, int], ...] = tuple(map(tuple, facts["level_dimensions"]))
        self.stated_mpp: MppXY | None = tuple(facts["stated_mpp"]) if facts["stated_mpp"] else None
        self.objective_power: str | None = facts["objective_power"]

    def _ask(self, work: str, **arguments: Any) -> dict[str, Any]:
        try:
            return self._process.ask(work, slide=self._number, **arguments)
        except SlideError as error:
            if self._process.is_usable:
                raise
            raise DecoderEndedError(f"{self._path} cannot be read: {error}. {DAMAGED}") from error

    @property
    def has_ended(self) -> bool:
        """Whether its process ended, so that nothing more can be read."""
        return not self._process.is_usable

    def read(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """See `Backend.read`."""
        return self._ask("read", level=level, box=[x, y, width, height])["pixels"]

    def close(self) -> None:
        """See `Backend.close`; where the process has ended its files are closed."""
        if self._process.is_usable:
            try:
                self._ask("close")
            except SlideError:
                logger.debug("%s was closed by the end of its process", self._path)
