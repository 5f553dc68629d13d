# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The server without a browser: who reaches what, and what it says where something is missing."""

import http.client
import io
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from slide_files import stained_image, write_pyramid

pytest.importorskip("bokeh", reason="needs the extra view")

from sparsepath_vit.slides import EmbeddedSlide, Slide, SlideError
from sparsepath_vit.slides import reading_process as reading
from sparsepath_vit.slides.view import SlideViewer, ViewedSlide, open_viewer


@pytest.fixture(scope="module")
def viewer(embedded):
    with open_viewer([embedded[0]], [embedded[1]]) as viewer:
        yield viewer


def get(viewer, path, headers=()):
    connection = http.client.HTTPConnection("127.0.0.1", viewer.port, timeout=60)
    connection.request("GET", path, headers=dict(headers))
    answer = connection.getresponse()
    return answer.status, answer.read()


def base(viewer):
    return viewer.url.removeprefix(f"http://127.0.0.1:{viewer.port}").rstrip("/")


def test_tiles_are_served_under_the_key_only(viewer, embedded):
    status, tile = get(viewer, f"{base(viewer)}/tiles/0/1/0/0.jpg")
    assert status == 200
    pixels = np.asarray(Image.open(io.BytesIO(tile))).astype(int)
    assert np.abs(pixels - Slide(embedded[0]).read_region(0, 0, 512, 512).astype(int)).mean() < 4
    assert len(base(viewer)) >= 22  # 128 bits
    for path in ("/tiles/0/1/0/0.jpg", "/", "/static/js/bokeh.min.js", "/guess/tiles/0/1/0/0.jpg"):
        assert get(viewer, path)[0] == 404, path


def test_no_path_reaches_the_file_system(viewer, embedded):
    secret = embedded[0].parent / "secret.jpg"
    secret.write_bytes(b"not for the page")
    up = "/".join([".."] * 12)
    for path in (
        f"/static/{up}{secret}",
        f"/static/js/{up}{secret}",
        f"/static/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e/%2e%2e{secret}",
        f"/tiles/{up}{secret}",
        f"/tiles/0/0/0/{up}{secret}",
        f"/tiles/0/0/0/{secret}.jpg",
        "/tiles/0/0/0/-1.jpg",
        "/tiles/1/0/0/0.jpg",
        "/tiles/0/99/0/0.jpg",
    ):
        status, answer = get(viewer, base(viewer) + path)
        assert status in (403, 404) and b"not for the page" not in answer, path


def test_it_listens_on_the_loopback_address_only(viewer):
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in others:
        with pytest.raises(OSError):
            socket.create_connection((address, viewer.port), timeout=2)
    socket.create_connection(("127.0.0.1", viewer.port), timeout=2).close()


def test_other_sites_cannot_talk_to_it(viewer):
    headers = {
        "Origin": "http://example.org",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    assert get(viewer, f"{base(viewer)}/ws", headers)[0] == 403


def test_the_page_names_no_other_host(viewer, monkeypatch):
    monkeypatch.setenv("BOKEH_RESOURCES", "cdn")
    status, page = get(viewer, f"{base(viewer)}/")
    assert status == 200 and b"bokeh.min.js" in page and b"cdn.bokeh.org" not in page
    assert page.count(b"<script") and not [part for part in page.split(b'src="')[1:] if not part.startswith(b"/")]


def test_a_port_in_use_is_refused(viewer, embedded):
    with pytest.raises(OSError):
        SlideViewer([ViewedSlide(Slide(embedded[0]))], viewer.port)


def test_stopping_gives_the_port_back(embedded):
    viewer = open_viewer([embedded[0]])
    port = viewer.port
    viewer.stop()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=2)


def test_what_cannot_be_shown_is_said_with_the_command(embedded, small_slide, tmp_path):
    with pytest.raises(SlideError, match=r"none/slide.h5 does not exist: `sparsepath embed .*--dense` makes it"):
        open_viewer([embedded[0]], [tmp_path / "none/slide.h5"])
    with pytest.raises(SlideError, match="1 slides and 2 embeddings were given"):
        open_viewer([embedded[0]], [embedded[1], embedded[1]])
    other = write_pyramid(tmp_path / "other.tiff", stained_image(320, 320, []))
    with pytest.raises(SlideError, match="tokens of a slide of 640 x 512 pixels"):
        open_viewer([other], [embedded[1]])
    with pytest.raises(SlideError, match="at least one file"):
        open_viewer([])
    (tmp_path / "empty.geojson").touch()
    with pytest.raises(SlideError, match=r"polygons='.*empty.geojson' is no GeoJSON of polygons"):
        open_viewer([embedded[0]], polygons=[tmp_path / "empty.geojson"])
    with pytest.raises(SlideError, match="of one slide"):
        open_viewer([embedded[0], small_slide], polygons=[tmp_path / "some.geojson"])


def test_embeddings_are_found_in_their_folder(embedded):
    with open_viewer([embedded[0]], [embedded[1].parent]) as viewer:
        assert viewer._slides[0].embedded.path == embedded[1]


def test_overlays_are_those_that_the_file_holds(embedded, tmp_path):
    kept = len(EmbeddedSlide(embedded[1]).kept)
    np.save(tmp_path / "classes.npy", np.random.default_rng(0).random((kept, 2)))
    with open_viewer([embedded[0]], [embedded[1]], values=[tmp_path / "classes.npy"]) as viewer:
        slide = viewer._slides[0]
    assert {"prune score", "kept tokens", "PCA of the features", "attention, CLS", "attention, register 2, head 1"} < {
        *slide.layers
    }
    assert {"classes:0", "classes:1"} < {*slide.layers}
    counts = (kept, len(slide.embedded.tissue), len(np.unique(slide.embedded.tissue, axis=0)))
    assert all(len(slide.values(layer).values) in counts for layer in slide.layers)
    regions = slide.regions()
    assert regions.tissue.sum() == len(slide.embedded.tissue) and regions.kept.sum() == kept
    x, y, width, height = regions.boxes[0]
    first = slide.embedded.kept[: regions.kept[0]]
    assert (first >= (x, y)).all() and (first < (x + width, y + height)).all()


def test_bytes_that_abort_the_decoder_cost_their_tile_alone(tmp_path, monkeypatch):
    """Tiles are asked for side by side; each of them may be the one, and the server outlives it."""
    slide = write_pyramid(tmp_path / "slide.tiff", stained_image(1536, 1536, []), tile=256)
    with open_viewer([slide]) as viewer:
        pyramid = viewer._slides[0].pyramid
        zoom = pyramid.native_zoom
        read = reading.ApartBackend.read

        def read_and_break(self, level, x, y, width, height):
            if x <= 600 < x + width and y <= 600 < y + height:  # the decoder of these pixels aborts
                os.kill(self._process.pid, signal.SIGABRT)
            return read(self, level, x, y, width, height)

        monkeypatch.setattr(reading.ApartBackend, "read", read_and_break)
        places = [(0, 0), (1, 1), (1, 0), (0, 1)]
        paths = [f"{base(viewer)}/tiles/0/{zoom}/{column}/{row}.jpg" for column, row in places]
        with ThreadPoolExecutor(len(paths)) as threads:
            statuses = [status for status, _ in threads.map(lambda path: get(viewer, path), paths)]
        assert statuses == [200, 500, 200, 200]
        assert get(viewer, f"{base(viewer)}/")[0] == 200


def test_a_slide_that_changed_since_is_shown_with_a_notice(embedded, tmp_path):
    changed = write_pyramid(tmp_path / "slide.tiff", stained_image(640, 512, [(0, 96, 384, 256)]))
    slide = ViewedSlide(Slide(changed), EmbeddedSlide(embedded[1]))
    assert "has changed since" in slide.notice and "`sparsepath embed --dense` again" in slide.notice
    assert ViewedSlide(Slide(embedded[0]), EmbeddedSlide(embedded[1])).notice is None


def test_without_a_resolution_places_are_pixels(tmp_path):
    slide = ViewedSlide(Slide(write_pyramid(tmp_path / "s.tiff", stained_image(640, 512, []), mpp=None)))
    assert slide.mpp is None and slide.layers == [] and slide.regions() is None
    assert np.allclose(slide.to_page(np.array([30, 50])), [30, -50])


def test_places_on_the_page_are_micrometres_of_the_frame(embedded):
    slide = ViewedSlide(Slide(embedded[0]), EmbeddedSlide(embedded[1]))
    points = np.array([[0, 0], [640, 512], [100, 30]])
    assert np.allclose(slide.to_page(points), [[0, 0], [320, -256], [50, -15]])
    assert np.allclose(slide.to_slide(slide.to_page(points)), points)
