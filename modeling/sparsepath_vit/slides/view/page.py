# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The page of one browser window: what is clicked, chosen and drawn, and what happens then."""

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from bokeh.document import Document
from bokeh.events import DocumentReady, SelectionGeometry, Tap
from bokeh.layouts import column, row
from bokeh.models import (
    Button,
    CheckboxGroup,
    ColumnDataSource,
    CustomJS,
    Div,
    Range1d,
    Select,
    Slider,
    TapTool,
    Toggle,
)
from bokeh.plotting import figure

from ..errors import SlideError
from ..outlines import feature_collection, outlines
from ..polygon_features import PolygonFeatures, features_table, pool_polygon
from ..similarity import SimilarPlace, similar_places, token_similarity
from ..token_values import similarity_values
from .contents import COLORS, KEPT, PRUNE_SCORE, ViewedSlide
from .figure import SlideFigure, place_label

NOTHING, SIMILARITY = "nothing", "similarity"
REGIONS, TISSUE, PIECES = "regions", "tissue", "polygons"
_NUM_PLACES = 10
_THUMBNAIL_PIXELS = 112
_THUMBNAIL_TOKENS = 16
_MOST_POLYGONS = 20_000
_CONTROLS_WIDTH = 260
_DOWNLOAD = """
const link = document.createElement("a")
link.href = URL.createObjectURL(new Blob([source.data.text[0]], {type: source.data.kind[0]}))
link.download = source.data.name[0]
link.click()
URL.revokeObjectURL(link.href)
"""


class SlidePage:
    """The controls, the figure and the strip of similar places of one window.

    Args:
        slides: what can be shown.
        document: of the window; it is filled.
        pool: threads that compute, so that tiles go on arriving.
        tile_url: of the tiles, with {slide}, {Z}, {X} and {Y} in it.
    """

    def __init__(
        self, slides: Sequence[ViewedSlide], document: Document, pool: ThreadPoolExecutor, tile_url: str
    ) -> None:
        self._slides, self._document, self._pool, self._tile_url = slides, document, pool, tile_url
        self._names = [slide.slide.name for slide in slides]
        self._similarities: dict[ViewedSlide, np.ndarray] = {}
        self._places: list[SimilarPlace] = []
        self._polygons: list[list[PolygonFeatures]] = [[] for _ in slides]
        self._number = 0
        self.view = SlideFigure()
        self._add_controls()
        self._add_places()
        self.view.figure.on_event(Tap, lambda event: self._later(self._show_similar_to, event.x, event.y))
        self.view.figure.on_event(SelectionGeometry, self._take_geometry)
        document.title = f"{self._names[0]}: SparsePathViT"
        document.add_root(
            row(
                column(*self._controls, width=_CONTROLS_WIDTH, sizing_mode="stretch_height"),
                column(self.view.figure, self.view.position, self.strip, sizing_mode="stretch_both"),
                sizing_mode="stretch_both",
            )
        )
        self._show_slide(0)
        document.on_event(DocumentReady, self._opened)

    def _opened(self, event: DocumentReady) -> None:
        """The window is there: the slide fills it, and what the first click needs is computed while the user looks."""
        self.view.fit()
        for slide in self._slides:
            if slide.embedded is not None:
                self._pool.submit(slide.embedded.features.norms)

    @property
    def _slide(self) -> ViewedSlide:
        return self._slides[self._number]

    def _layers(self) -> list[str]:
        """What the tokens of the slide can be coloured by."""
        return [NOTHING, *self._slide.layers] + [SIMILARITY] * (self._slide in self._similarities)

    def _add_controls(self) -> None:
        self.slide_choice = Select(title="Slide", options=self._names, value=self._names[0], name="slide_choice")
        self.slide_choice.visible = len(self._slides) > 1
        self.layer_choice = Select(title="Colour of the tokens", options=[NOTHING], value=NOTHING, name="layer")
        self.is_shown = Toggle(label="Show the colours", active=True, name="shown")
        self.is_shown.js_link("active", self.view.colors, "visible")
        self.opacity = Slider(title="Opacity", start=0, end=1, step=0.05, value=0.5, name="opacity")
        self.opacity.width = _CONTROLS_WIDTH - 30
        self.opacity.js_link("value", self.view.colors.glyph, "global_alpha")
        self.outline_choice = CheckboxGroup(labels=[REGIONS, TISSUE, PIECES], active=[], name="outlines")
        self.message = Div(text="", name="message", width=_CONTROLS_WIDTH - 20)
        self.polygon_text = Div(text="", name="polygons", width=_CONTROLS_WIDTH - 20)
        self._export = ColumnDataSource({"text": [""], "name": [""], "kind": [""]})
        self.export_button = Button(label="Save the polygons as GeoJSON", disabled=True, name="export")
        self.export_button.js_on_click(CustomJS(args={"source": self._export}, code=_DOWNLOAD))
        self._table = ColumnDataSource({"text": [""], "name": [""], "kind": [""]})
        self.table_button = Button(label="Save their mean features as CSV", disabled=True, name="table")
        self.table_button.js_on_click(CustomJS(args={"source": self._table}, code=_DOWNLOAD))
        self.clear_button = Button(label="Remove the polygons", disabled=True, name="clear")
        self.clear_button.on_click(self._clear_polygons)
        self.slide_choice.on_change("value", lambda _, old, new: self._show_slide(self._names.index(new)))
        self.layer_choice.on_change("value", lambda _, old, new: self._later(self._show_layer, new))
        self.outline_choice.on_change("active", lambda _, old, new: self._later(self._show_outlines))
        self._controls = [
            self.slide_choice, self.layer_choice, self.is_shown, self.opacity, self.outline_choice,
            self.polygon_text, self.export_button, self.table_button, self.clear_button, self.message,
        ]  # fmt: skip

    def _add_places(self) -> None:
        self._thumbnails = ColumnDataSource({"image": [], "x": [], "label": []}, name="thumbnails")
        self.strip = figure(
            height=_THUMBNAIL_PIXELS + (30 if len(self._slides) == 1 else 44),
            sizing_mode="stretch_width",
            x_range=Range1d(0, _NUM_PLACES),
            y_range=Range1d(-0.25 if len(self._slides) == 1 else -0.38, 1),
            tools="",
            toolbar_location=None,
            name="places",
            visible=False,
        )
        self.strip.axis.visible = False
        self.strip.grid.visible = False
        pictures = self.strip.image_rgba("image", "x", 0, 0.94, 1, source=self._thumbnails, origin="top_left")
        pictures.nonselection_glyph = None
        self.strip.text("x", -0.03, "label", source=self._thumbnails, text_font_size="12px", text_baseline="top")
        self.strip.add_tools(TapTool(renderers=[pictures]))
        self.strip.on_event(Tap, lambda event: self._jump(int(event.x)))

    def _later(self, work: Callable[..., Any], *arguments: object) -> None:
        """Does `work` after what is being done now has reached the window; what it cannot do is said there."""

        async def run() -> None:
            try:
                await work(*arguments)
            except SlideError as error:
                self._say(str(error))

        self._document.add_next_tick_callback(run)

    async def _compute(self, work: Callable[..., Any], *arguments: object) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *arguments))

    def _say(self, text: str) -> None:
        self.message.text = _escaped(text)

    def _hint(self) -> str:
        """What can be done here."""
        slide = self._slide
        if slide.notice is not None:
            return slide.notice
        if slide.embedded is not None:
            return "Click on tissue: where else does it look like this? The lasso and the box draw polygons."
        return (
            f"Only the slide is shown. `sparsepath embed {slide.slide.path.name} --model MODEL --out dense --dense` "
            "stores its tokens; pass its file as --embedding, or the model as --model."
        )

    def _show_slide(self, number: int) -> None:
        self._number = number
        slide = self._slide
        self.view.show(slide, self._tile_url.replace("{slide}", str(number)))
        self.layer_choice.options = layers = self._layers()
        chosen = next(name for name in (SIMILARITY, PRUNE_SCORE, COLORS, KEPT, NOTHING) if name in layers)
        if self.layer_choice.value != chosen:
            self.layer_choice.value = chosen
        elif chosen != NOTHING:
            self._later(self._show_layer, chosen)
        self._say(self._hint())
        self._later(self._show_outlines)
        self._show_polygons()

    async def _show_layer(self, name: str) -> None:
        if name == NOTHING:
            self.view.clear_overlay()
            return
        slide = self._slide
        if name == SIMILARITY:
            values = similarity_values(slide.embedded, self._similarities[slide])
        else:
            values = await self._compute(slide.values, name)
        if slide is self._slide:
            self.view.show_overlay(slide, values)

    async def _show_similar_to(self, x: float, y: float) -> None:
        slide = self._slide
        if slide.embedded is None:
            return
        self._say(self._hint())
        token = slide.embedded.nearest_token(*slide.to_slide(np.array([x, y])))
        self.view.mark(slide, slide.embedded.kept[token], slide.embedded.token_size)
        await self._show_similar(slide.embedded.features.rows(np.array([token]))[0])

    async def _show_similar(self, query: np.ndarray) -> None:
        """Colours the tokens of all slides by their similarity to (channels,) and lists the most similar places."""
        searched = [slide for slide in self._slides if slide.embedded is not None]
        embedded = [slide.embedded for slide in searched]
        cosines = await self._compute(lambda: [token_similarity(slide, query) for slide in embedded])
        self._similarities = dict(zip(searched, cosines, strict=True))
        places = await self._compute(similar_places, embedded, query, cosines)
        numbers = [self._slides.index(slide) for slide in searched]
        self._places = [replace(place, slide=numbers[place.slide]) for place in places]
        self.layer_choice.options = self._layers()
        if self.layer_choice.value == SIMILARITY:
            await self._show_layer(SIMILARITY)
        else:
            self.layer_choice.value = SIMILARITY
        self._thumbnails.data = await self._compute(self._draw_places)
        self.strip.visible = True

    def _draw_places(self) -> dict[str, list]:
        images = []
        for place in self._places:
            slide = self._slides[place.slide]
            side = _THUMBNAIL_TOKENS * max(slide.embedded.token_size)
            pixels = slide.pyramid.around(*place.center, side, _THUMBNAIL_PIXELS)
            opaque = np.dstack([pixels, np.full(pixels.shape[:2], 255, dtype=np.uint8)])
            images.append(opaque.view(np.uint32).reshape(pixels.shape[:2]))
        labels = [place_label(place, self._names) for place in self._places]
        return {"image": images, "x": list(range(len(images))), "label": labels}

    def _jump(self, number: int) -> None:
        if not 0 <= number < len(self._places):
            return
        place = self._places[number]
        if place.slide != self._number:
            self.slide_choice.value = self._names[place.slide]
        slide = self._slide
        size = slide.embedded.token_size
        x, y = slide.to_page(np.array(place.center))
        self.view.jump(x, y, 4 * _THUMBNAIL_TOKENS * size[0] * slide.unit[0])
        self.view.mark(slide, slide.embedded.kept[place.token], size)

    async def _show_outlines(self) -> None:
        slide = self._slide
        wanted = {self.outline_choice.labels[number] for number in self.outline_choice.active}
        view = self.view
        view.region_lines.visible, view.tissue_lines.visible, view.piece_lines.visible = (
            name in wanted for name in (REGIONS, TISSUE, PIECES)
        )
        if REGIONS in wanted and not len(view.regions.data["left"]):
            view.show_regions(slide, await self._compute(slide.regions))
        if TISSUE in wanted and slide.embedded is not None and not view.tissue.data["xs"]:
            view.show_rings(slide, view.tissue, await self._compute(_tissue_rings, slide))
        if PIECES in wanted and not view.pieces.data["xs"]:
            self._show_pieces(slide)

    def _show_pieces(self, slide: ViewedSlide) -> None:
        polygons = [polygon for found in slide.polygons.values() for polygon in found.polygons]
        if len(polygons) > _MOST_POLYGONS:
            self._say(f"{len(polygons):,} polygons are too many to draw: the first {_MOST_POLYGONS:,} are shown.")
            polygons = polygons[:_MOST_POLYGONS]
        names = [polygon.class_name or "without a class" for polygon in polygons]
        classes = list(dict.fromkeys(names))
        colors = ["#1f9e89", "#d64541", "#6a3d9a", "#e9a33b", "#2c6fb0", "#b15928", "#33a02c", "#e377c2"]
        shown = [colors[classes.index(name) % len(colors)] for name in names]
        rings = [[ring + slide.slide.frame[:2] for ring in polygon.rings] for polygon in polygons]
        self.view.show_rings(slide, self.view.pieces, rings, color=shown, name=names)

    def _take_geometry(self, event: SelectionGeometry) -> None:
        geometry = event.geometry
        if not event.final or self._slide.embedded is None:
            return
        if geometry["type"] == "rect":
            (left, right), (low, high) = ((geometry[f"{axis}0"], geometry[f"{axis}1"]) for axis in "xy")
            ring = np.array([[left, high], [right, high], [right, low], [left, low]])
        else:
            ring = np.array([geometry["x"], geometry["y"]]).T
        self._later(self._take_polygon, self._slide.to_slide(ring))

    async def _take_polygon(self, ring: np.ndarray) -> None:
        """Adds a polygon of level-0 pixels, and shows what is similar to it."""
        number = self._number
        self._say(self._hint())
        polygon = await self._compute(pool_polygon, self._slides[number].embedded, ring)
        self._polygons[number].append(polygon)
        self._show_polygons()
        await self._show_similar(polygon.pooled)

    def _show_polygons(self) -> None:
        slide, polygons = self._slide, self._polygons[self._number]
        zero = slide.slide.frame[:2]
        rings = [slide.to_page(polygon.ring).T for polygon in polygons]
        self.view.drawn.data = {"xs": [ring[0] for ring in rings], "ys": [ring[1] for ring in rings]}
        lines = [
            f"polygon {number}: {polygon.tissue_area:.4g} mm² of tissue in {polygon.area:.4g} mm², "
            f"{polygon.num_kept:,} kept tokens"
            for number, polygon in enumerate(polygons, start=1)
        ]
        self.polygon_text.text = "<br>".join(lines)
        for button in (self.export_button, self.table_button, self.clear_button):
            button.disabled = not polygons
        features = [polygon.annotation(f"polygon {number}", zero) for number, polygon in enumerate(polygons, start=1)]
        self._export.data = {
            "text": [json.dumps(feature_collection(features))],
            "name": [f"{slide.slide.name}_polygons.geojson"],
            "kind": ["application/geo+json"],
        }
        self._table.data = {
            "text": [features_table(polygons)],
            "name": [f"{slide.slide.name}_polygons.csv"],
            "kind": ["text/csv"],
        }

    def _clear_polygons(self) -> None:
        self._polygons[self._number].clear()
        self._show_polygons()


def _tissue_rings(slide: ViewedSlide) -> list[list[np.ndarray]]:
    """The outlines of the tissue tokens, in level-0 pixels."""
    embedded = slide.embedded
    corner = embedded.tissue.min(axis=0)
    columns, rows = np.rint((embedded.tissue - corner) / embedded.token_size).astype(int).T
    grid = np.zeros((rows.max() + 1, columns.max() + 1), dtype=bool)
    grid[rows, columns] = True
    return [[ring * embedded.token_size + corner for ring in rings] for rings in outlines(grid)]


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
