# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The picture on the page: tiles of the slide, one overlay of token colours, outlines, and what the mouse points at.

Its coordinates are those of `ViewedSlide.to_page`: micrometres, with y pointing up and so negative, because Bokeh's
tile layers know no other direction.
"""

from collections.abc import Sequence

import numpy as np
from bokeh.models import (
    BoxSelectTool,
    ColorBar,
    ColumnDataSource,
    CustomJS,
    Div,
    FixedTicker,
    HoverTool,
    LassoSelectTool,
    LinearColorMapper,
    MetricLength,
    Range1d,
    ScaleBar,
    WMTSTileSource,
)
from bokeh.plotting import figure

from ...runtime.figures import heat_colors
from ..similarity import SimilarPlace
from ..token_values import TokenValues, bar_labels
from .contents import Regions, ViewedSlide
from .pyramid import TILE_SIZE

_TOOLS = "pan,wheel_zoom,box_zoom,reset"
_BAR_PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)
_PALETTE = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in heat_colors(np.linspace(0, 1, 256)).tolist()]
_NO_PALETTE = ["#ffffff"]
_NAME_LENGTH = 13  # letters under a thumbnail
_INVISIBLE = 1 / 512  # an alpha of 0 takes the text's place away, too
_EMPTY_IMAGE = {"image": [], "values": [], "x": [], "y": [], "dw": [], "dh": []}
_KEEP_POINTER = "pointer.data = {x: [cb_obj.x], y: [cb_obj.y]}"
_SAY_POSITION = """
if (pointer.data.x.length == 0) { position.text = ""; return }
const x = pointer.data.x[0], y = pointer.data.y[0]
const [unit_x, unit_y] = facts.data.unit[0]
let text = `x = ${Math.floor(x / unit_x)}, y = ${Math.floor(-y / unit_y)} px`
if (facts.data.is_known[0]) { text += ` (${(x / 1000).toFixed(3)}, ${(-y / 1000).toFixed(3)} mm)` }
const {values, dw, dh} = overlay.data
if (values.length > 0 && renderer.visible) {
  const grid = values[0], [rows, columns] = grid.shape
  const column = Math.floor((x - overlay.data.x[0]) / dw[0] * columns)
  const row = rows - 1 - Math.floor((y - overlay.data.y[0]) / dh[0] * rows)
  if (column >= 0 && column < columns && row >= 0 && row < rows) {
    const value = grid[row * columns + column]
    if (isFinite(value)) { text += `,  ${facts.data.name[0]} ${value.toPrecision(4)}` }
  }
}
position.text = text
"""


class SlideFigure:
    """The figure and its layers; it shows what it is told to."""

    def __init__(self) -> None:
        self.figure = figure(
            sizing_mode="stretch_both",
            min_height=300,
            tools=_TOOLS,
            active_scroll="wheel_zoom",
            active_drag="pan",
            x_range=Range1d(0, 1),
            y_range=Range1d(-1, 0),
            match_aspect=True,
            toolbar_location="above",
            background_fill_color="white",
            name="slide",
        )
        self.figure.toolbar.logo = None
        # They draw polygons, and select nothing.
        self.figure.add_tools(LassoSelectTool(renderers=[], continuous=False), BoxSelectTool(renderers=[]))
        self.figure.axis.visible = False
        self.figure.grid.visible = False
        self.position = Div(text="", name="position", height=20)
        self.overlay = ColumnDataSource(dict(_EMPTY_IMAGE), name="overlay")
        self._facts = ColumnDataSource({"unit": [[1.0, 1.0]], "is_known": [False], "name": [""]})
        self._pointer = ColumnDataSource({"x": [], "y": []})  # where the mouse was last, on the page
        self._tiles = self.figure.add_tile(WMTSTileSource(), level="underlay", name="tiles")
        # Row 0 of the grid is at the top.
        place = {"origin": "top_left", "anchor": "bottom_left"}
        self.colors = self.figure.image_rgba(
            "image", "x", "y", "dw", "dh", source=self.overlay, global_alpha=0.5, **place
        )
        self._add_outlines()
        self._add_color_bar()
        self._add_scale_bar()
        self._add_scripts()

    def show(self, slide: ViewedSlide, tile_url: str) -> None:
        """Shows another slide, all of it; overlays are taken away.

        Args:
            slide: the slide.
            tile_url: with {Z}, {X} and {Y} in it.
        """
        pyramid, (x, y, width, height) = slide.pyramid, slide.slide.frame
        side = pyramid.side * slide.unit[0]
        # Bokeh shows tiles at 1 to 2 screen pixels a pixel: it is told half their size, so that they are sharp.
        self._tiles.tile_source = WMTSTileSource(
            url=tile_url,
            tile_size=TILE_SIZE // 2,
            min_zoom=0,
            max_zoom=pyramid.max_zoom,
            x_origin_offset=0,
            y_origin_offset=side,
            initial_resolution=side / (TILE_SIZE // 2),
            wrap_around=False,
        )
        self._facts.data = {"unit": [slide.unit.tolist()], "is_known": [slide.mpp is not None], "name": [""]}
        self._pointer.data = {"x": [], "y": []}
        (left, top), (right, bottom) = slide.to_page(np.array([(x, y), (x + width, y + height)])).tolist()
        self._extent = (left, right, bottom, top)
        self.fit()
        self.scale_bar.visible = slide.mpp is not None
        self.clear_overlay()
        for source in (self.marks, self.regions, self.tissue, self.pieces, self.drawn):
            source.data = {name: [] for name in source.data}

    def fit(self) -> None:
        """Shows all of the slide."""
        self._set_ranges(*self._extent)

    def jump(self, x: float, y: float, side: float) -> None:
        """Moves to a square of a side in micrometres around a place on the page."""
        self._set_ranges(x - side / 2, x + side / 2, y - side / 2, y + side / 2)

    def _set_ranges(self, left: float, right: float, bottom: float, top: float) -> None:
        """Shows at least this rectangle, undistorted, in a frame of any shape."""
        try:
            width, height = self.figure.inner_width, self.figure.inner_height
        except ValueError:  # the window has not opened yet, and fits the rectangle itself
            width, height = right - left, top - bottom
        scale = max((right - left) / width, (top - bottom) / height)
        for extent, middle, pixels in (
            (self.figure.x_range, (left + right) / 2, width),
            (self.figure.y_range, (bottom + top) / 2, height),
        ):
            extent.update(start=middle - scale * pixels / 2, end=middle + scale * pixels / 2)

    def show_overlay(self, slide: ViewedSlide, values: TokenValues) -> None:
        """Colours the tokens."""
        merged = slide.merged(values)
        grid, present, colors, (left, top) = values.colors(merged)
        rows, columns = present.shape
        cell = np.asarray(values.token_size) * merged
        image = np.dstack([colors, np.where(present, 255, 0).astype(np.uint8)])
        numbers = grid if grid.ndim == 2 else np.full((rows, columns), np.nan)
        corners = np.array([(left, top), (left + columns * cell[0], top + rows * cell[1])])
        (west, north), (east, south) = slide.to_page(corners).tolist()
        # Before the numbers: with these the window says anew what lies under the mouse.
        self._facts.data = {**self._facts.data, "name": [values.name]}
        self.overlay.data = {
            "image": [np.ascontiguousarray(image).view(np.uint32).reshape(rows, columns)],
            "values": [numbers.astype(np.float32)],
            "x": [west],
            "y": [south],
            "dw": [east - west],
            "dh": [north - south],
        }
        if values.is_colored:
            self._label_bar("first three principal components of the features as red, green and blue", None)
        else:
            self._label_bar(values.unit or values.name, bar_labels(grid[present], values.limits))

    def _label_bar(self, title: str | None, labels: list[float] | None) -> None:
        """What the colours mean; what there is not is written invisibly, so that the slide keeps its place."""
        bar, has_numbers = self.color_bar, labels is not None
        bar.title, bar.title_text_alpha = title or "colours", _INVISIBLE if title is None else 1.0
        bar.color_mapper.palette = _PALETTE if has_numbers else _NO_PALETTE
        bar.major_label_text_alpha = 1.0 if has_numbers else _INVISIBLE
        if has_numbers:
            texts = [f"{label:.3g}" for label in labels]
            bar.major_label_overrides = dict(zip(_BAR_PLACES, texts, strict=True))

    def clear_overlay(self) -> None:
        """Takes the colours away."""
        self.overlay.data = dict(_EMPTY_IMAGE)
        self._label_bar(None, None)

    def mark(self, slide: ViewedSlide, corner: np.ndarray, size: tuple[float, float]) -> None:
        """Draws a frame around the token whose top left corner is this level-0 pixel."""
        (left, top), (right, bottom) = slide.to_page(np.stack([corner, corner + np.asarray(size)])).tolist()
        self.marks.data = {"left": [left], "right": [right], "top": [top], "bottom": [bottom]}

    def show_regions(self, slide: ViewedSlide, regions: Regions | None) -> None:
        """Draws the outlines of the regions that were embedded; their numbers appear under the mouse."""
        if regions is None:
            return
        left, top = slide.to_page(regions.boxes[:, :2]).T
        right, bottom = slide.to_page(regions.boxes[:, :2] + regions.boxes[:, 2:]).T
        self.regions.data = {
            "left": left, "right": right, "top": top, "bottom": bottom,
            "number": np.arange(len(left)), "tissue": regions.tissue, "kept": regions.kept, "label": regions.labels,
        }  # fmt: skip

    def show_rings(
        self, slide: ViewedSlide, source: ColumnDataSource, polygons: Sequence[Sequence[np.ndarray]], **columns: list
    ) -> None:
        """Draws polygons, each its outline and its holes, (points, 2) in level-0 pixels."""
        placed = [[slide.to_page(ring).T for ring in rings] for rings in polygons]
        xs, ys = ([[[ring[axis] for ring in rings]] for rings in placed] for axis in (0, 1))
        source.data = {"xs": xs, "ys": ys, **columns}

    def _add_outlines(self) -> None:
        self.regions = ColumnDataSource(
            {name: [] for name in ("left", "right", "top", "bottom", "number", "tissue", "kept", "label")}
        )
        self.region_lines = self.figure.quad(
            "left", "right", "top", "bottom", source=self.regions, fill_alpha=0, line_color="#2c6fb0", line_width=2
        )
        self.figure.add_tools(
            HoverTool(
                renderers=[self.region_lines],
                tooltips=[
                    ("region", "@number"),
                    ("tissue tokens", "@tissue"),
                    ("kept tokens", "@kept"),
                    ("label", "@label"),
                ],
            )
        )
        self.tissue = ColumnDataSource({"xs": [], "ys": []})
        self.tissue_lines = self.figure.multi_polygons(
            "xs", "ys", source=self.tissue, fill_alpha=0, line_color="#3a8a3a", line_width=1.5
        )
        self.pieces = ColumnDataSource({"xs": [], "ys": [], "color": [], "name": []})
        self.piece_lines = self.figure.multi_polygons(
            "xs", "ys", source=self.pieces, fill_color="color", fill_alpha=0.25, line_color="color", line_width=1.5
        )
        self.drawn = ColumnDataSource({"xs": [], "ys": []})
        self.figure.patches("xs", "ys", source=self.drawn, fill_alpha=0.1, color="#d64541", line_width=2)
        self.marks = ColumnDataSource({"left": [], "right": [], "top": [], "bottom": []})
        self.figure.quad(
            "left", "right", "top", "bottom", source=self.marks, fill_alpha=0, line_color="#00e5ff", line_width=3
        )

    def _add_color_bar(self) -> None:
        self.color_bar = ColorBar(
            color_mapper=LinearColorMapper(palette=_NO_PALETTE, low=0, high=1),
            ticker=FixedTicker(ticks=list(_BAR_PLACES)),
            title="colours",
            orientation="horizontal",
            location="center",
            width=320,
            height=10,
            padding=2,
            title_standoff=2,
            name="color_bar",
        )
        self.figure.add_layout(self.color_bar, "below")

    def _add_scale_bar(self) -> None:
        self.scale_bar = ScaleBar(
            range=self.figure.x_range,
            unit="µm",
            dimensional=MetricLength(include=["nm", "µm", "mm"], ticks=[1, 2, 5, 10, 20, 50, 100, 200, 500]),
            location="bottom_right",
            background_fill_alpha=0.85,
            bar_length=0.15,
            visible=False,
            name="scale_bar",
        )
        self.figure.add_layout(self.scale_bar)

    def _add_scripts(self) -> None:
        """What lies under the mouse is said when the mouse moves, and when the colours under it change."""
        arguments = {"facts": self._facts, "overlay": self.overlay, "renderer": self.colors, "position": self.position}
        say = CustomJS(args={**arguments, "pointer": self._pointer}, code=_SAY_POSITION)
        self.figure.js_on_event("mousemove", CustomJS(args={"pointer": self._pointer}, code=_KEEP_POINTER))
        self._pointer.js_on_change("data", say)
        self.overlay.js_on_change("data", say)
        self.colors.js_on_change("visible", say)


def place_label(place: SimilarPlace, names: Sequence[str]) -> str:
    """What is written under a thumbnail: the similarity, and the slide where there are several."""
    if len(names) == 1:
        return f"{place.similarity:.3f}"
    name = names[place.slide]
    return f"{place.similarity:.3f}\n{name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 1] + '…'}"
