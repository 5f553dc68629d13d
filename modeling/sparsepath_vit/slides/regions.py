# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Which slides and which of their regions to embed: tissue-covering regions, folders and CSV manifests."""

import logging
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from ..runtime.tables import TableRow, read_table
from .annotations import Polygon
from .errors import SlideError
from .folders import SLIDE_SUFFIXES, LeftOut, report_left_out, same_slide_key, search_folder
from .reader import Slide
from .resolution import is_credible
from .tissue import TissueMask

logger = logging.getLogger(__name__)

MANIFEST_COLUMNS = ("slide", "mpp", "x", "y", "width", "height", "label", "name", "tissue_mask")
# What TRIDENT (wsi), slide2vec (image_path, sample_id, mask_path, spacing_at_level_0) and CLAM (slide_id) call them.
_COLUMNS_OF_OTHERS = {
    **dict.fromkeys(("wsi", "image_path", "slide_id"), "slide"),
    **{"spacing_at_level_0": "mpp", "sample_id": "name", "mask_path": "tissue_mask"},
}
_MOST_PADDED_PIXELS = 2**26  # of a region that reaches beyond the slide and is four times as large as it, or more
_LARGEST_COORDINATE = 2**53  # up to here floats are exact


@dataclass(frozen=True)
class Region:
    """A rectangle of a slide: its top left corner in level-0 pixels, its size in output pixels.

    Where it has an outline (level-0 pixels from the corner of `Slide.frame`), only what lies in it counts.
    """

    x: float
    y: float
    width: int
    height: int
    label: str | None = None
    outline: Polygon | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Box:
    """A rectangle of a slide, as manifests give it: level-0 pixels from the corner of `Slide.frame`.

    It may reach over the slide's edge. An annotation is the box around its outline.
    """

    x: int
    y: int
    width: int
    height: int
    label: str | None = None
    outline: Polygon | None = field(default=None, compare=False, repr=False)

    def at(self, slide: Slide, mpp: float | None) -> Region:
        """This box as a region at `mpp`, rounded down to whole output pixels. What lies beyond the slide is white.

        Raises:
            SlideError: nothing of the box lies inside the slide, or far more than all of the slide.
        """
        slide_width, slide_height = slide.dimensions
        x, y = self.x + slide.frame[0], self.y + slide.frame[1]
        right, bottom = x + self.width, y + self.height
        place = f"the region x={x}..{right}, y={y}..{bottom} (level-0 pixels)"
        where = f"{slide.path}, which is {slide_width} x {slide_height}: move or shrink it"
        if x >= slide_width or y >= slide_height or right <= 0 or bottom <= 0:
            raise SlideError(f"{place} is not inside {where}.")
        scale_x, scale_y = slide.scale(mpp)
        width, height = math.floor(self.width / scale_x + 1e-6), math.floor(self.height / scale_y + 1e-6)
        is_far_larger = self.width * self.height > 4 * slide_width * slide_height
        if is_far_larger and width * height > _MOST_PADDED_PIXELS:
            raise SlideError(f"{place} is far larger than {where}.")
        return Region(x, y, width, height, self.label, self.outline)

    def overhangs(self, slide: Slide) -> bool:
        """Whether a part of the box lies beyond the slide's edge."""
        slide_width, slide_height = slide.dimensions
        x, y = self.x + slide.frame[0], self.y + slide.frame[1]
        return min(x, y) < 0 or x + self.width > slide_width or y + self.height > slide_height


@dataclass(frozen=True)
class SlideInput:
    """One slide to embed.

    Attributes:
        path: the slide file.
        mpp: of level 0, where the manifest gives it; it goes before what the file states.
        boxes: the regions to embed; none for all tissue.
        label: of the whole slide.
        name: of the result; None for the file's. The one DICOM series of a folder is called like the folder.
        tissue_mask: a file that says where the tissue of this slide is; None where the manifest names none.
        gives_labels: whether a manifest with a column `label` gave this; else nothing was said about labels.
    """

    path: Path
    mpp: float | None = None
    boxes: tuple[Box, ...] = ()
    label: str | None = None
    name: str | None = None
    tissue_mask: Path | None = None
    gives_labels: bool = field(default=False, compare=False)


class FoundInputs(NamedTuple):
    """The slides behind what was given, and what of the folders and links is no slide of its own."""

    slides: list[SlideInput]
    left_out: list[LeftOut]


def tissue_regions(
    slide: Slide,
    tissue: TissueMask,
    patch_size: int,
    region_size: int = 3430,
    mpp: float | None = 0.5,
    overlap: int = 0,
    minimum_tissue: float = 0.0,
) -> list[Region]:
    """Regions on a regular grid from the slide's top left corner that cover its tissue, in raster order.

    Sizes are whole patch tokens: `region_size` and `overlap` are rounded up to multiples of `patch_size`, and so are
    the smaller regions at the right and bottom edge (which may reach up to one token over it: read them with
    `pad=True`). With `minimum_tissue=0` every tissue token lies in a region.

    Args:
        slide: the slide.
        tissue: its tissue.
        patch_size: pixels per patch token side.
        region_size: output pixels per region side.
        mpp: resolution of the regions; None for level 0.
        overlap: output pixels that neighbouring regions share.
        minimum_tissue: share of a region's tokens that must be tissue; 0 asks for one token.

    Raises:
        SlideError: an impossible argument, or no region has `minimum_tissue`.
    """
    if region_size < 1 or not 0 <= overlap < region_size or not 0 <= minimum_tissue <= 1:
        raise SlideError(
            f"region_size={region_size}, overlap={overlap}, minimum_tissue={minimum_tissue} are not possible: a region "
            "has at least one pixel, its overlap is smaller than itself, and the share of tissue lies in [0, 1]."
        )
    side = -(-region_size // patch_size)  # in tokens
    shared = min(-(-overlap // patch_size), side - 1)
    scale_x, scale_y = slide.scale(mpp)
    present = tissue.token_grid(slide, patch_size, mpp)
    rows, columns = present.shape
    regions = []
    for row in range(0, max(1, rows - shared), side - shared):
        for column in range(0, max(1, columns - shared), side - shared):
            inside = present[row : row + side, column : column + side]
            if not inside.any() or inside.mean() < minimum_tissue:
                continue
            height, width = (tokens * patch_size for tokens in inside.shape)
            regions.append(Region(column * patch_size * scale_x, row * patch_size * scale_y, width, height))
    if not regions:
        raise SlideError(
            f"{slide.path}: no region of {region_size} pixels has tissue in at least {minimum_tissue:.0%} "
            "of its tokens. Lower minimum_tissue or region_size, or widen the tissue mask."
        )
    return regions


def read_inputs(paths: Sequence[str | os.PathLike[str]]) -> list[SlideInput]:
    """The slides behind files, folders (searched with their subfolders) and CSV manifests, in order, each once.

    A manifest has the columns `slide,mpp,x,y,width,height,label,name,tissue_mask`, of which only `slide` must be there.
    `slide` and `tissue_mask` are relative to the manifest's folder; `mpp` is that of the slide's level 0; x, y, width
    and height are level-0 pixels, empty for all tissue; a slide may have many rows; `name` is that of the result. The
    names of TRIDENT, CLAM and slide2vec for these columns are known, and CLAM's slides without an ending.

    Slides are not opened here. What a folder holds beside slides, and second names of a slide, are logged with the
    reason.

    Raises:
        ValueError: nothing to read, a folder without slides, or a manifest row that cannot be understood.
    """
    found = find_inputs(paths)
    report_left_out(found.left_out)
    return found.slides


def find_inputs(paths: Sequence[str | os.PathLike[str]]) -> FoundInputs:
    """As `read_inputs`, with a list of what was left out instead of a log."""
    found: dict[tuple[object, ...], SlideInput] = {}
    left_out: list[LeftOut] = []
    for path in map(Path, paths):
        if path.is_dir():
            inputs, others = _slides_in(path)
            left_out += others
        elif path.suffix.lower() in (".csv", ".tsv"):
            inputs = read_manifest(path)
        else:
            inputs = [SlideInput(path)]
        for item in inputs:
            known = found.setdefault(same_slide_key(item.path), item)
            said, said_before = ((given.mpp, given.boxes, given.label) for given in (item, known))
            if said != said_before:
                raise ValueError(
                    f"{item.path} is given twice ({known.path}), with different mpp, regions or labels: give it once."
                )
            if item.path.absolute() != known.path.absolute():
                left_out.append(LeftOut(item.path, f"it is {known.path} under another name, or of the same series"))
    if not found:
        raise ValueError("no slides were given: pass files, folders or a CSV with a column 'slide'.")
    return FoundInputs(list(found.values()), left_out)


def _slides_in(folder: Path) -> tuple[list[SlideInput], list[LeftOut]]:
    try:
        slides, left_out = search_folder(folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}.") from error
    if not slides:
        others = "; ".join(f"{path.name}: {reason}" for path, reason in left_out[:10])
        listed = f" It holds {len(left_out)} other entries ({others})." if left_out else ""
        raise ValueError(f"{folder} holds no slides: expected files ending in {', '.join(SLIDE_SUFFIXES)}.{listed}")
    return [SlideInput(path, name=name) for path, name in slides], left_out


def read_manifest(path: Path) -> list[SlideInput]:
    """The slides of a CSV manifest; see `read_inputs`."""
    table = read_table(path, MANIFEST_COLUMNS[:1], MANIFEST_COLUMNS[1:], _COLUMNS_OF_OTHERS)
    ignored = [column for column in table.columns if column and column not in MANIFEST_COLUMNS]
    if ignored:
        logger.warning("%s: the columns %s are not used.", path, ignored)
    slides: dict[Path, SlideInput] = {}
    for row in table.rows:
        place = f"{path}, line {row.line}"
        name = row.cells["slide"]
        if not name:
            raise ValueError(f"{place}: the column 'slide' is empty.")
        slide = _with_ending(path.parent / name, place)
        item = _manifest_row(slide, row, path.parent, place)
        known = slides.get(slide)
        if known is None:
            slides[slide] = _of_folder(item, place) if os.path.isdir(slide) else item
        elif not _agree(known, item) or not known.boxes or not item.boxes:
            raise ValueError(
                f"{place}: {name} stands in several rows; these must agree in mpp, name and tissue_mask, and each give "
                "a region."
            )
        else:
            slides[slide] = replace(known, boxes=known.boxes + item.boxes)
    return list(slides.values())


def _agree(known: SlideInput, item: SlideInput) -> bool:
    """Whether two rows of one slide say the same of it; a folder's series has its name from the first of them."""
    same = (known.mpp, known.tissue_mask) == (item.mpp, item.tissue_mask)
    return same and item.name in (None, known.name)


def _with_ending(slide: Path, place: str) -> Path:
    """A slide that the manifest names without its ending, as CLAM's do; any other path as it is."""
    # os.path, which says no of a name that cannot be one, such as one too long
    if os.path.exists(slide) or slide.suffix.lower() in SLIDE_SUFFIXES or not os.path.isdir(slide.parent):
        return slide
    found = [slide.with_name(slide.name + suffix) for suffix in SLIDE_SUFFIXES]
    found = [path for path in found if os.path.exists(path)]
    if len(found) > 1:
        raise ValueError(f"{place}: {slide} may be {' or '.join(path.name for path in found)}: add the ending.")
    return found[0] if found else slide


def _of_folder(item: SlideInput, place: str) -> SlideInput:
    """`item` with the slide that its path, a folder, is: that of a DICOM series."""
    inputs, _ = _slides_in(item.path)
    if len(inputs) != 1:
        raise ValueError(f"{place}: the folder {item.path} holds {len(inputs)} slides: name each in its own row.")
    return replace(item, path=inputs[0].path, name=item.name or inputs[0].name)


def _manifest_row(slide: Path, row: TableRow, folder: Path, place: str) -> SlideInput:
    def number(column: str, kind: Callable[[str], float]) -> float | None:
        text = row.cells.get(column, "")
        try:
            return kind(text) if text else None
        except ValueError as error:
            kind_name = "number" if kind is float else "whole number"
            raise ValueError(f"{place}: {column}={text!r} is not a {kind_name}.") from error

    mpp = number("mpp", float)
    if mpp is not None and not is_credible(mpp):
        raise ValueError(f"{place}: mpp={mpp} is not the micrometres per pixel of a slide (0.25 at 40x, 0.5 at 20x).")
    label, gives_labels = row.cells.get("label") or None, "label" in row.cells
    mask = row.cells.get("tissue_mask")
    given = SlideInput(
        slide,
        mpp,
        name=row.cells.get("name") or None,
        tissue_mask=folder / mask if mask else None,
        gives_labels=gives_labels,
    )
    box = [number(column, _whole_number) for column in ("x", "y", "width", "height")]
    if all(value is None for value in box):
        return replace(given, label=label)
    if any(value is None for value in box):
        raise ValueError(f"{place}: a region needs x, y, width and height; leave all four empty for all tissue.")
    if box[2] < 1 or box[3] < 1:
        raise ValueError(f"{place}: the region is {box[2]} x {box[3]} pixels; both are at least 1.")
    return replace(given, boxes=(Box(*box, label=label),))


def _whole_number(text: str) -> int:
    """Also of "100.0", which pandas writes where a column has empty cells."""
    number = float(text)
    if not number.is_integer() or abs(number) > _LARGEST_COORDINATE:
        raise ValueError(text)
    return int(number)
