#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""How fast `sparsepath view` answers: the first picture, tiles, and a click, on a large slide that it makes.

The slide is a JPEG pyramid with one square of tissue; its tokens have random features in the layout that `sparsepath
embed` writes. What the server answers is timed through its own address, a click as the server computes it: similarity
of all tokens, the ten places, colours, and thumbnails. With Chromium and playwright the first picture is timed in the
browser too. Rows carry commit, versions and machine.

    python scripts/benchmark_viewer.py                                    # 200,000 tokens x 1536 channels, 1 GB on disk
    python scripts/benchmark_viewer.py --tokens 20000 --channels 384
"""

import logging
import resource
import shutil
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from sparsepath_vit.runtime.extras import ScriptParser, imports_of_extra, run_script
from sparsepath_vit.runtime.measure import describe_run

sys.path.insert(0, str(Path(__file__).parents[1]))  # `studies` lies beside this folder and is not installed

from studies.results import append_rows

with imports_of_extra("view", "bokeh"):
    import tifffile

    from sparsepath_vit.slides import EmbeddedSlide, similar_places, token_similarity
    from sparsepath_vit.slides.reading_process import reading_process
    from sparsepath_vit.slides.store import SlideWriter
    from sparsepath_vit.slides.token_values import similarity_values
    from sparsepath_vit.slides.view import LastingSlide, SlideViewer, ViewedSlide

logger = logging.getLogger("benchmark_viewer")

RESULTS = Path(__file__).resolve().parents[1] / "model_card/results/benchmark_viewer.csv"
PATCH, MPP, TILE = 14, 0.5, 256
GLASS = 2  # the slide is this many times as wide and high as its tissue
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")

_DRAWN = """() => {
  if (!window.Bokeh || !Bokeh.documents.length || !Bokeh.documents[0].is_idle) { return false }
  const model = Bokeh.documents[0].get_model_by_name("overlay")
  const tiles = Bokeh.documents[0].get_model_by_name("tiles").tile_source.tiles
  return model.data.image.length > 0 && [...tiles.values()].some((tile) => tile.loaded)
}"""
_SIMILAR = """() => Bokeh.documents[0].get_model_by_name("layer").value == "similarity"
  && Bokeh.documents[0].get_model_by_name("thumbnails").data.image.length == 10"""


def make_slide(path: Path, side: int) -> None:
    """A square slide of `side` pixels, a multiple of 16 tiles, with levels 1, 4 and 16; tissue in its middle."""
    generator = np.random.default_rng(0)
    nuclei = generator.random((TILE, TILE, 1)) < 0.15
    tissue = np.where(nuclei, np.uint8([96, 60, 140]), np.uint8([214, 150, 190]))
    glass = np.full((TILE, TILE, 3), 243, dtype=np.uint8)
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for factor in (1, 4, 16):
            count = side // factor // TILE
            first, last = count * (GLASS - 1) / 2 / GLASS, count * (GLASS + 1) / 2 / GLASS
            inside = [first <= index < last for index in range(count)]
            tiles = (tissue if row and column else glass for row in inside for column in inside)
            tiff.write(
                tiles, shape=(side // factor, side // factor, 3), dtype=np.uint8, tile=(TILE, TILE), photometric="rgb",
                compression="jpeg", resolution=(1e4 / MPP, 1e4 / MPP), resolutionunit="CENTIMETER", metadata=None,
                subfiletype=int(factor > 1),
            )  # fmt: skip


def make_embedding(path: Path, side: int, tokens: int, channels: int) -> None:
    """A file as `embed --dense` writes it, of a square of tissue tokens in the middle of the slide."""
    generator = np.random.default_rng(0)
    width = round(tokens**0.5)
    first = side // PATCH * (GLASS - 1) // (2 * GLASS)
    places = np.stack(np.divmod(np.arange(tokens), width), axis=-1) + first  # row, column
    corners = places[:, ::-1] * PATCH
    centers = generator.standard_normal((16, channels), dtype=np.float32)
    with SlideWriter(path, {"settings": {}, "source": {}}) as writer:
        for start in range(0, tokens, 8192):
            part = slice(start, min(tokens, start + 8192))
            count = part.stop - part.start
            features = centers[generator.integers(16, size=count)]
            features = features + generator.standard_normal((count, channels), dtype=np.float32)
            writer.append(patch_features=features.astype(np.float16), patch_coords=corners[part])
        writer.append(
            features=np.zeros((1, channels), dtype=np.float32), coords=np.zeros((1, 2), dtype=np.int64),
            region_sizes=np.array([[side, side]], dtype=np.int32), patch_counts=np.array([tokens]),
            token_counts=np.array([tokens]), token_coords=corners,
            prune_scores=generator.random(tokens, dtype=np.float32),
        )  # fmt: skip
        writer.describe("coords", {"level0_width": side, "level0_height": side, "mpp": MPP, "level0_mpp": MPP})
        for name in ("patch_coords", "token_coords"):
            writer.describe(name, {"token_size": PATCH, "token_size_level0": (float(PATCH), float(PATCH))})


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what `work` returned."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def tile_times(viewer: SlideViewer, slide: ViewedSlide, count: int = 120) -> list[float]:
    """Seconds of `count` different tiles of the tissue, at random places of the four finest zooms."""
    native = slide.pyramid.native_zoom
    zooms = range(max(1, native - 3), native + 1)
    inside = {zoom: range((1 << zoom) // 4, (1 << zoom) * 3 // 4) for zoom in zooms}  # where the tissue is
    places = [(zoom, column, row) for zoom in zooms for column in inside[zoom] for row in inside[zoom]]
    seconds = []
    for index in np.random.default_rng(1).permutation(len(places))[:count]:
        zoom, column, row = places[index]
        address = f"{viewer.url}tiles/0/{zoom}/{column}/{row}.jpg"
        seconds.append(timed(lambda address=address: urllib.request.urlopen(address).read())[0])
    return seconds


def click(slide: ViewedSlide, token: int) -> None:
    """What the server does for one click."""
    embedded = slide.embedded
    query = embedded.features.rows(np.array([token]))[0]
    cosines = token_similarity(embedded, query)
    places = similar_places([embedded], query, [cosines])
    values = similarity_values(embedded, cosines)
    values.colors(slide.merged(values))
    for place in places:
        slide.pyramid.around(*place.center, 16 * PATCH, 112)


def in_browser(url: str) -> tuple[float, float] | None:
    """Seconds from asking for the page to the slide with colours in the window, and from a click to its similarity.

    None without a browser.
    """
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path = None
    if path is None:
        logger.info("no Chromium or no playwright: nothing is timed in the browser")
        return None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 850})
        start = time.perf_counter()
        page.goto(url)
        page.wait_for_function(_DRAWN, timeout=60_000)
        first = time.perf_counter() - start
        time.sleep(2)  # the norms of the features and the tiles around are made meanwhile, as while a user looks
        start = time.perf_counter()
        page.mouse.click(780, 400)
        page.wait_for_function(_SIMILAR, timeout=60_000)
        clicked = time.perf_counter() - start
        browser.close()
    return first, clicked


def measure(folder: Path, tokens: int, channels: int) -> dict[str, Any]:
    """One row."""
    reading_process()  # as `sparsepath view` starts it while it imports the rest
    side = -(-GLASS * round(tokens**0.5) * PATCH // (16 * TILE)) * 16 * TILE
    logger.info("making a slide of %d x %d pixels and %d tokens of %d channels", side, side, tokens, channels)
    with ProcessPoolExecutor(1, get_context("spawn")) as maker:  # its memory is none of the server's
        maker.submit(make_slide, folder / "slide.tiff", side).result()
        maker.submit(make_embedding, folder / "slide.h5", side, tokens, channels).result()
    start = time.perf_counter()
    slide = ViewedSlide(LastingSlide(folder / "slide.tiff"), EmbeddedSlide(folder / "slide.h5"))
    with SlideViewer([slide]) as viewer:
        opening = time.perf_counter() - start
        seen = in_browser(viewer.url)
        first_click, _ = timed(lambda: click(slide, tokens // 2))
        clicks = [timed(lambda token=token: click(slide, token))[0] for token in (7, tokens // 3, tokens - 9)]
        tiles = tile_times(viewer, slide)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens": tokens, "channels": channels, "slide_side": side,
        "open_seconds": opening,
        "first_picture_in_browser_seconds": None if seen is None else opening + seen[0],
        "click_in_browser_seconds": None if seen is None else seen[1],
        "tile_median_seconds": median(tiles), "tile_95th_seconds": float(np.percentile(tiles, 95)),
        "first_click_seconds": first_click, "click_median_seconds": median(clicks),
        "peak_bytes": peak, "features_bytes": 2 * tokens * channels,
    }  # fmt: skip


def run(tokens: int, channels: int, out: Path) -> None:
    """Measures and records one row."""
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Path(folder), tokens, channels)
    for name, value in row.items():
        logger.info("%-34s %s", name, f"{value:.4g}" if isinstance(value, float) else value)
    append_rows(out, [{**row, **describe_run()}])
    logger.info("added to %s", out)


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--channels", type=int, default=1536)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if min(arguments.tokens, arguments.channels) < 1:
        parser.error("--tokens and --channels are 1 at least")
    run_script(run, arguments.tokens, arguments.channels, arguments.out)


if __name__ == "__main__":
    main()
