# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The page in a browser, as a user sees it: pixels are compared with the slide, numbers with NumPy."""

import io
import json
import re
import time

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from slide_files import stained_image, write_pyramid

from sparsepath_vit.runtime.figures import heat_colors
from sparsepath_vit.slides import EmbeddedSlide, EmbedSettings, Slide, embed_slides
from sparsepath_vit.slides.polygon_features import pool_polygon

PATCH = 16
SECONDS = 60  # that anything on the page may take at most, on a busy machine
FRAME = """
() => {
  const model = Bokeh.documents[0].get_model_by_name("slide"), view = Bokeh.index.find_one(model)
  const {left, top} = view.canvas_view.el.getBoundingClientRect(), {bbox} = view.frame
  return [left + bbox.left, top + bbox.top, bbox.width, bbox.height]
}
"""
SHOW = """
([x, y, scale]) => {
  const model = Bokeh.documents[0].get_model_by_name("slide"), {bbox} = Bokeh.index.find_one(model).frame
  model.x_range.setv({start: x, end: x + scale * bbox.width})
  model.y_range.setv({start: -y - scale * bbox.height, end: -y})
}
"""
FITTED = """
([width, height]) => {
  const {x_range, y_range, inner_width, inner_height} = Bokeh.documents[0].get_model_by_name("slide")
  const scale = Math.max(width / inner_width, height / inner_height)
  const spans = [x_range.end - x_range.start - scale * inner_width, y_range.end - y_range.start - scale * inner_height]
  return inner_width > 1 && spans.every((span) => Math.abs(span) < 0.5)
}
"""
OVERLAY = """
() => {
  const source = Bokeh.documents[0].get_model_by_name("overlay")
  if (source.data.values.length == 0) { return null }
  const values = source.data.values[0]
  return {shape: values.shape, values: Array.from(values, (value) => isNaN(value) ? null : value)}
}
"""


class Window:
    """A page of the browser, and what went wrong in it."""

    def __init__(self, chromium, viewer):
        self.page = chromium.new_page(viewport={"width": 1100, "height": 760}, device_scale_factor=1)
        self.page.set_default_timeout(1000 * SECONDS)
        self.errors, self.addresses = [], []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        self.page.on("request", lambda request: self.addresses.append(request.url))
        self.page.goto(viewer.url)
        self.page.wait_for_function("window.Bokeh && Bokeh.documents.length && Bokeh.documents[0].is_idle")
        slide = viewer._slides[0]
        self.page.wait_for_function(FITTED, arg=np.abs(slide.to_page(np.array(slide.slide.dimensions))).tolist())

    def shows(self, slide, x, y):
        """Whether the frame holds the slide from level-0 pixel (x, y) on; it is moved there."""
        self.show(x / 2, y / 2)
        return self.difference(slide, x, y) < 3

    def show(self, x, y, scale=0.5):
        """Shows the micrometre (x, y) in the frame's top left corner, `scale` micrometres per screen pixel."""
        self.page.evaluate(SHOW, [x, y, scale])

    def show_the_slide_alone(self):
        until(lambda: self.overlay() is not None, "the first overlay")
        self.choose("layer", "nothing")
        until(lambda: self.overlay() is None, "the slide alone")

    def picture(self):
        """(height, width, 3) of the frame, without its edge."""
        left, top, width, height = self.page.evaluate(FRAME)
        image = Image.open(io.BytesIO(self.page.screenshot()))
        return np.asarray(image.convert("RGB"))[round(top) : round(top + height), round(left) : round(left + width)]

    def color(self, x, y):
        """The colour of level-0 pixel (x, y). The frame is moved first: thumbnails that appear make it smaller."""
        self.show(0, 0)
        return self.picture()[y, x]

    def difference(self, slide, x, y):
        """Of the frame from the slide at level-0 pixel (x, y) on: means of 4 x 4 pixels, free of noise."""
        width, height = 480, 400
        expected = slide.read_region(x, y, width, height, pad=True)
        both = [image[:height, :width].astype(int) for image in (self.picture(), expected)]
        means = [image.reshape(height // 4, 4, width // 4, 4, 3).mean((1, 3)) for image in both]
        return np.abs(means[0] - means[1])[2:-2, 2:-2].mean()

    def choose(self, name, value):
        self.page.evaluate(f"Bokeh.documents[0].get_model_by_name({name!r}).value = {value!r}")

    def click(self, x, y, scale=0.5):
        """Clicks on level-0 pixel (x, y), where the frame begins at (0, 0)."""
        left, top, *_ = self.page.evaluate(FRAME)
        self.page.mouse.click(left + x * 0.5 / scale, top + y * 0.5 / scale)

    def overlay(self):
        """(rows, columns) of the numbers behind the colours, or None."""
        found = self.page.evaluate(OVERLAY)
        if found is None:
            return None
        return np.array([np.nan if value is None else value for value in found["values"]]).reshape(found["shape"])

    def text(self, name):
        return self.page.evaluate(f"Bokeh.documents[0].get_model_by_name({name!r}).text")

    def value(self, name):
        return self.page.evaluate(f"Bokeh.documents[0].get_model_by_name({name!r}).value")


def until(condition, what):
    """Waits until `condition` holds, and returns what it gave."""
    end = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} did not come in {SECONDS} s"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="module")
def opened(embedded, model_folder, tmp_path_factory):
    """Two slides with their embeddings on one server, and polygons for neither."""
    from sparsepath_vit.slides.view import open_viewer

    folder = tmp_path_factory.mktemp("second")
    second = write_pyramid(folder / "second.tiff", stained_image(480, 400, [(32, 32, 320, 256)], seed=3))
    settings = EmbedSettings(region_size=512, dense=True)
    embed_slides([second], model_folder, folder / "out", settings, device="cpu")
    with open_viewer([embedded[0], second], [embedded[1], folder / "out/second.h5"]) as viewer:
        yield viewer


@pytest.fixture
def window(chromium, opened):
    window = Window(chromium, opened)
    yield window
    errors = window.errors
    window.page.close()
    assert not errors


def test_the_page_shows_the_slide_at_its_place_and_asks_no_other_host(window, opened, embedded):
    window.show_the_slide_alone()
    slide = Slide(embedded[0])
    until(lambda: window.shows(slide, 100, 60), "the slide")
    for x, y in ((96, 60), (104, 60), (100, 56), (100, 64)):
        assert window.difference(slide, x, y) > 4.5
    assert window.page.title() == "slide: SparsePathViT"
    assert all(address.startswith(opened.url) for address in window.addresses)


def test_overlays_have_the_colours_of_the_numbers_and_can_be_switched(window, opened):
    slide = opened._slides[0]
    values = slide.values("prune score")
    until(lambda: window.overlay() is not None, "the prune scores")
    assert window.value("layer") == "prune score"
    assert np.allclose(window.overlay(), values.grid()[0], rtol=1e-5, equal_nan=True)
    window.page.evaluate('Bokeh.documents[0].get_model_by_name("opacity").value = 1')
    grid = values.colors()
    row, column = np.argwhere(grid.present)[37]
    x, y = (grid.origin + np.array([column + 0.5, row + 0.5]) * PATCH).astype(int)
    color = grid.colors[row, column].astype(int)
    until(lambda: np.abs(window.color(x, y) - color).max() <= 2, "the colour of a token")
    window.page.evaluate('Bokeh.documents[0].get_model_by_name("shown").active = false')
    own = slide.slide.read_region(x - 1, y - 1, 3, 3).astype(int).mean((0, 1))
    until(lambda: np.abs(window.picture()[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1)) - own).max() < 25, "the slide")
    window.choose("layer", "PCA of the features")
    window.page.evaluate('Bokeh.documents[0].get_model_by_name("shown").active = true')
    colors = slide.values("PCA of the features").colors()
    row, column = np.argwhere(colors.present)[20]
    x, y = (colors.origin + np.array([column + 0.5, row + 0.5]) * PATCH).astype(int)
    until(lambda: np.abs(window.color(x, y) - colors.colors[row, column].astype(int)).max() <= 2, "the components")


def test_a_click_shows_the_similarity_that_numpy_computes(window, opened):
    embedded = opened._slides[0].embedded
    features = embedded.features.rows(np.arange(len(embedded.kept)))
    token = 25
    window.show(0, 0)
    window.click(*(embedded.kept[token] + PATCH / 2))
    until(lambda: window.value("layer") == "similarity", "the similarity")
    cosines = features @ features[token] / np.linalg.norm(features, axis=1) / np.linalg.norm(features[token])
    origin = embedded.kept.min(axis=0)
    expected = np.full((embedded.kept.max(axis=0) - origin)[::-1] // PATCH + 1, np.nan)
    counts = np.zeros(expected.shape)
    for (x, y), cosine in zip((embedded.kept - origin) // PATCH, cosines, strict=True):
        expected[y, x] = (0 if np.isnan(expected[y, x]) else expected[y, x]) + cosine
        counts[y, x] += 1
    expected = expected / np.maximum(counts, 1)

    def is_there():
        found = window.overlay()
        if found is None or found.shape != expected.shape:
            return False
        return np.allclose(found, expected, atol=3e-3, equal_nan=True)

    until(is_there, "the similarity that NumPy computes")
    window.page.evaluate('Bokeh.documents[0].get_model_by_name("opacity").value = 1')
    low = np.percentile(cosines, 1)
    row, column = np.argwhere(counts == 1)[9]
    x, y = origin + np.array([column + 0.5, row + 0.5]) * PATCH
    color = heat_colors(np.clip((expected[row, column] - low) / (1 - low), 0, 1)).astype(int)
    until(lambda: np.abs(window.color(int(x), int(y)) - color).max() <= 3, "its colour")


def cell_means(corners, values, tokens_per_side):
    """(rows, columns): the mean of the values of each cell's tokens, and the corner of the first cell."""
    origin = corners.min(axis=0)
    cells = {}
    for corner, value in zip(((corners - origin) // (tokens_per_side * PATCH)).astype(int), values, strict=True):
        cells.setdefault((corner[1], corner[0]), []).append(value)
    means = np.full(np.max(list(cells), axis=0) + 1, np.nan)
    for place, of_cell in cells.items():
        means[place] = np.mean(of_cell)
    return means, origin


def test_tokens_of_a_grid_too_large_for_the_browser_share_cells_and_are_clicked_one_by_one(window, opened, monkeypatch):
    monkeypatch.setattr("sparsepath_vit.slides.view.contents._MOST_CELLS", 100)
    slide = opened._slides[0]
    embedded = slide.embedded
    features = embedded.features.rows(np.arange(len(embedded.kept))).astype(float)
    norms = np.linalg.norm(features, axis=1)
    values = slide.values("norm of the features")
    merged = slide.merged(values)
    assert merged > 1
    expected, origin = cell_means(embedded.kept, norms, merged)
    window.choose("layer", "norm of the features")

    def shows(numbers):
        found = window.overlay()
        is_it = found is not None and found.shape == numbers.shape
        return is_it and np.allclose(found, numbers, rtol=1e-3, atol=3e-3, equal_nan=True)

    until(lambda: shows(expected), "the norms, merged")
    window.page.evaluate('Bokeh.documents[0].get_model_by_name("opacity").value = 1')
    colors = values.colors(merged)
    row, column = np.argwhere(colors.present)[3]
    x, y = (origin + np.array([column + 0.5, row + 0.5]) * merged * PATCH).astype(int)
    until(lambda: np.abs(window.color(x, y) - colors.colors[row, column].astype(int)).max() <= 2, "its colour")
    token = 25
    window.click(*(embedded.kept[token] + PATCH / 2))
    cosines = features @ features[token] / norms / norms[token]
    until(lambda: shows(cell_means(embedded.kept, cosines, merged)[0]), "the similarity to one token, merged")


def test_similar_places_of_all_slides_are_listed_and_jumped_to(window, opened):
    window.show(0, 0)
    embedded = opened._slides[0].embedded
    window.click(*(embedded.kept[25] + PATCH / 2))
    labels = 'Bokeh.documents[0].get_model_by_name("thumbnails").data.label'
    until(lambda: window.page.evaluate(labels + ".length"), "the similar places")
    names = window.page.evaluate(f"Array.from({labels})")
    assert len(names) == 10 and names[0] == "1.000\nslide" and any(name.endswith("second") for name in names)
    similarities = [float(name.split()[0]) for name in names]
    assert similarities == sorted(similarities, reverse=True)
    number = next(index for index, name in enumerate(names) if name.endswith("second"))

    def has_jumped():  # a click before the thumbnails are drawn meets none, and until then their frame is elsewhere
        left, top, width, height = window.page.evaluate(FRAME.replace('"slide"', '"places"'))
        window.page.mouse.click(left + width * (number + 0.5) / 10, top + height / 3)
        window.page.wait_for_timeout(1000)
        return window.value("slide_choice") == "second"

    until(has_jumped, "the other slide")
    until(lambda: window.value("layer") == "similarity" and window.overlay() is not None, "its similarity")


def test_a_click_on_glass_says_so(window):
    window.show(0, 0)
    window.click(600, 480)
    until(lambda: "no token was kept within two tokens" in window.text("message"), "the sentence")


def test_a_drawn_polygon_is_pooled_and_saved_for_qupath(window, opened):
    slide = opened._slides[0]
    window.show(0, 0)
    window.page.evaluate(
        'Bokeh.documents[0].get_model_by_name("slide").toolbar.active_drag ='
        ' Bokeh.documents[0].get_model_by_name("slide").toolbar.tools.find((tool) => tool.type == "LassoSelectTool")'
    )
    corners = np.array([(100, 120), (300, 120), (300, 250), (180, 320), (100, 250), (100, 125)])
    left, top, *_ = window.page.evaluate(FRAME)
    mouse = window.page.mouse
    mouse.move(left + 100, top + 120)
    mouse.down()
    for x, y in corners[1:].tolist():
        mouse.move(left + x, top + y, steps=2)
    mouse.up()
    until(lambda: "polygon 1" in window.text("polygons"), "the polygon")
    with window.page.expect_download() as download:
        window.page.get_by_role("button", name="Save the polygons as GeoJSON").click()
    assert download.value.suggested_filename == "slide_polygons.geojson"
    saved = json.loads(download.value.path().read_text())
    (feature,) = saved["features"]
    ring = np.array(feature["geometry"]["coordinates"][0])
    assert feature["geometry"]["type"] == "Polygon" and (ring[0] == ring[-1]).all()
    for corner in corners:
        assert np.abs(ring - corner).max(axis=1).min() <= 1.5
    expected = pool_polygon(slide.embedded, ring[:-1])
    measured = feature["properties"]["measurements"]
    assert measured["kept tokens"] == expected.num_kept > 20
    assert measured["tissue area mm^2"] == pytest.approx(expected.tissue_area, rel=0.05)
    assert measured["area mm^2"] == pytest.approx(0.5**2 * 1e-6 * 33000, rel=0.1)
    with window.page.expect_download() as download:
        window.page.get_by_role("button", name="Save their mean features as CSV").click()
    header, row = download.value.path().read_text().splitlines()
    assert header.startswith("polygon,tissue_area_mm2,area_mm2,kept_tokens,feature_0,feature_1")
    pooled = np.array(row.split(",")[4:], dtype=float)
    assert np.corrcoef(pooled, expected.pooled)[0, 1] > 0.99
    until(lambda: window.value("layer") == "similarity", "what is similar to the polygon")
    window.page.get_by_role("button", name="Remove the polygons").click()
    until(lambda: window.text("polygons") == "", "the polygon's end")


def test_outlines_of_regions_and_tissue_are_drawn(window, opened):
    window.show_the_slide_alone()
    until(lambda: window.shows(opened._slides[0].slide, 0, 0), "the slide alone")
    before = window.picture().astype(int)
    window.page.evaluate('Bokeh.documents[0].get_model_by_name("outlines").active = [0, 1]')
    region = opened._slides[0].regions().boxes[0].astype(int)

    def lines():
        changed = np.abs(window.picture().astype(int) - before).max(-1) > 40
        x, y, width, height = region
        return changed[y + 5 : y + height - 5, x + width].mean() > 0.9 and changed.sum() > 2000

    until(lines, "the outlines")


def test_a_slide_without_an_embedding_says_which_command_makes_it(chromium, embedded):
    from sparsepath_vit.slides.view import open_viewer

    with open_viewer([embedded[0]]) as viewer:
        window = Window(chromium, viewer)
        assert "sparsepath embed slide.tiff --model MODEL --out dense --dense" in window.text("message")
        until(lambda: window.shows(Slide(embedded[0]), 100, 60), "the slide")
        window.click(200, 200)
        window.page.close()
        assert not window.errors


def test_what_lies_under_the_mouse_is_said(window, opened):
    slide = opened._slides[0]
    grid = slide.values("prune score").colors()
    until(lambda: window.overlay() is not None, "the prune scores")
    row, column = np.argwhere(grid.present)[50]
    x, y = grid.origin + np.array([column + 0.5, row + 0.5]) * PATCH
    window.show(0, 0)
    left, top, *_ = window.page.evaluate(FRAME)
    window.page.mouse.move(left + x, top + y)
    until(lambda: "prune_scores" in window.text("position"), "the position")
    said = window.text("position")
    found = [int(part) for part in re.findall(r"[xy] = (\d+)", said)]
    assert np.abs(np.array(found) - (x, y)).max() <= 1 and f"({x * 0.0005:.3f}, {y * 0.0005:.3f} mm)" in said
    assert float(said.split("prune_scores ")[1]) == pytest.approx(grid.values[row, column], rel=1e-3)
    # Regression: other colours came, and the text was that of the former ones until the mouse moved.
    window.choose("layer", "kept tokens")
    until(lambda: "kept" in window.text("position"), "the number of the other colours")
    window.choose("layer", "nothing")
    until(lambda: window.text("position") == said.split(",  ")[0], "the position alone")


def test_polygons_of_a_file_and_probabilities_are_drawn(chromium, embedded, tmp_path):
    from sparsepath_vit.slides.view import open_viewer

    ring = [[120, 140], [360, 140], [360, 300], [120, 300], [120, 140]]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    properties = {"classification": {"name": "Tumor"}}
    feature = {"type": "Feature", "geometry": geometry, "properties": properties}
    (tmp_path / "pieces.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    width = EmbeddedSlide(embedded[1]).features.shape[1]
    weight = np.random.default_rng(0).normal(size=(2, width)).astype(np.float32)
    save_file({"weight": weight, "bias": np.zeros(2, dtype=np.float32)}, tmp_path / "probe.safetensors")
    extra = {"polygons": [tmp_path / "pieces.geojson"], "probe": tmp_path / "probe.safetensors"}
    with open_viewer([embedded[0]], [embedded[1]], **extra) as viewer:
        window = Window(chromium, viewer)
        window.show_the_slide_alone()
        until(lambda: window.shows(viewer._slides[0].slide, 0, 0), "the slide")
        before = window.picture().astype(int)
        window.page.evaluate('Bokeh.documents[0].get_model_by_name("outlines").active = [2]')

        def is_outlined():
            changed = np.abs(window.picture().astype(int) - before).max(-1) > 40
            return changed[150:290, 120].mean() > 0.9 and changed[140, 130:350].mean() > 0.9

        until(is_outlined, "the polygon")
        window.choose("layer", "probability of class 1")
        expected = viewer._slides[0].values("probability of class 1").grid()[0]
        until(lambda: window.overlay() is not None, "the probabilities")
        assert np.allclose(window.overlay(), expected, atol=1e-5, equal_nan=True)
        window.page.close()
        assert not window.errors
