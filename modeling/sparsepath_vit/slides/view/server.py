# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The local server: the page, its tiles, and nothing else. It listens on the loopback address only.

Every address begins with a random token, so that other users of the machine and pages of other sites cannot guess it.
A page names a slide by its number and a tile by three: no text from the browser becomes a path.
"""

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType

from bokeh.application import Application
from bokeh.application.handlers.function import FunctionHandler
from bokeh.document import Document
from bokeh.server.server import Server
from bokeh.settings import settings as bokeh_settings
from tornado.ioloop import IOLoop
from tornado.web import HTTPError, RequestHandler

from ..errors import SlideError
from .contents import ViewedSlide
from .page import SlidePage

ADDRESS = "127.0.0.1"
_THREADS = 4
_SECONDS_TO_START = 30


class SlideViewer:
    """The page of some slides, served until it is stopped.

    Args:
        slides: what to show.
        port: of the loopback address; any free one where 0.

    Raises:
        OSError: the port is in use.

    Example:
    ```python
    >>> with SlideViewer([ViewedSlide(Slide("CMU-1.svs"), EmbeddedSlide("dense/CMU-1.h5"))]) as viewer:
    ...     print(viewer.url)
    ...     viewer.wait()
    ```
    """

    def __init__(self, slides: Sequence[ViewedSlide], port: int = 0) -> None:
        self._slides = tuple(slides)
        self._token = secrets.token_urlsafe(16)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="slide viewer")
        logging.getLogger("tornado.access").addFilter(self._is_of_others)
        self._started, self._error = threading.Event(), None
        self._thread = threading.Thread(target=self._serve, args=(port,), name="slide viewer", daemon=True)
        self._thread.start()
        self._started.wait(_SECONDS_TO_START)
        if self._error is not None:
            raise self._error
        self._pool.submit(self._slides[0].pyramid.tile, 0, 0, 0)  # its overview is made while the page opens

    @property
    def url(self) -> str:
        """Where the page is; it holds the token, so it is not for others."""
        return f"http://{ADDRESS}:{self.port}/{self._token}/"

    def wait(self) -> None:
        """Returns when the server has been stopped; Ctrl-C stops it."""
        try:
            while self._thread.is_alive():
                self._thread.join(0.5)
        except KeyboardInterrupt:
            self.stop()

    def stop(self) -> None:
        """Closes the page and gives the port back."""
        if self._thread.is_alive():
            self._loop.add_callback(self._loop.stop)
            self._thread.join()
        self._pool.shutdown(cancel_futures=True)
        logging.getLogger("tornado.access").removeFilter(self._is_of_others)

    def __enter__(self) -> "SlideViewer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _serve(self, port: int) -> None:
        """All of the server's life, in its own thread with its own event loop."""
        asyncio.set_event_loop(asyncio.new_event_loop())
        self._loop = IOLoop.current()
        # Whatever the environment says: the scripts of the page come from here, not from a server on the internet.
        bokeh_settings.resources.set_value("server")
        tiles = (r"/tiles/(\d{1,6})/(\d{1,2})/(\d{1,9})/(\d{1,9})\.jpg", TileHandler)
        arguments = {"slides": self._slides, "pool": self._pool}
        try:
            server = Server(
                {"/": Application(FunctionHandler(self._open_page))},
                io_loop=self._loop,
                address=ADDRESS,
                port=port,
                prefix=f"/{self._token}",
                extra_patterns=[(*tiles, arguments)],
            )
        except OSError as error:
            self._error = error
            self._started.set()
            return
        self.port = server.port
        server.start()
        self._started.set()
        try:
            self._loop.start()
        finally:
            server.stop()
            self._loop.close(all_fds=True)

    def _is_of_others(self, record: logging.LogRecord) -> bool:
        """Lines about our own requests are not logged: they hold the key."""
        return self._token not in record.getMessage()

    def _open_page(self, document: Document) -> None:
        SlidePage(self._slides, document, self._pool, f"/{self._token}/tiles/{{slide}}/{{Z}}/{{X}}/{{Y}}.jpg")


class TileHandler(RequestHandler):
    """Answers with one tile; what has gone out of sight in the meantime is not read."""

    def initialize(self, slides: Sequence[ViewedSlide], pool: ThreadPoolExecutor) -> None:
        """As tornado calls it, with what the address pattern was given."""
        self._slides, self._pool, self._is_wanted = slides, pool, True

    async def get(self, slide: str, zoom: str, column: str, row: str) -> None:
        numbers = int(zoom), int(column), int(row)
        if int(slide) >= len(self._slides):
            raise HTTPError(404)
        pyramid = self._slides[int(slide)].pyramid
        try:
            read = partial(self._read_if_wanted, partial(pyramid.tile, *numbers))
            tile = await asyncio.get_running_loop().run_in_executor(self._pool, read)
        except IndexError as error:
            raise HTTPError(404) from error
        except SlideError as error:
            raise HTTPError(500, "%s", error) from error
        if tile is not None:
            self.set_header("Content-Type", "image/jpeg")
            self.set_header("Cache-Control", "private, max-age=3600")
            self.finish(tile)

    def _read_if_wanted(self, read: Callable[[], bytes]) -> bytes | None:
        return read() if self._is_wanted else None

    def on_connection_close(self) -> None:
        self._is_wanted = False
