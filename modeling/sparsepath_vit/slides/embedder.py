# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""One process's share of a run: slide after slide, region after region, into the store."""

import errno
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from ..model.patch_presence import covered_patches
from ..runtime.measure import measured
from ..runtime.model_identity import encoder_name
from .backends import SlideError
from .dataset_attributes import describe_datasets
from .dataset_rows import region_rows
from .forward import Embedding, Stopwatch, embed_regions, embed_slide, read_ahead
from .opening import slide_to_see_at
from .reader import Slide
from .records import region_labels, source_of
from .region_files import tokens_in_outline, with_regions
from .regions import Box, Region, SlideInput, tissue_regions
from .report import EmbedReport
from .scverse import write_table
from .store import EmbeddingStore, SlideWriter
from .tiles import Tiles
from .tissue import TissueMask, find_tissue

if TYPE_CHECKING:
    from ..model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
    from ..model.modeling_sparsepath_vit import SparsePathViTModel

logger = logging.getLogger(__name__)

DEFAULT_MPP = 0.5
MASK_SUFFIXES = (".geojson", ".json", ".png", ".tif", ".tiff", ".jpg", ".jpeg")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_AHEAD_BYTES = 2**30


@dataclass(frozen=True)
class EmbedSettings:
    """What is taken of every slide of a run.

    Attributes:
        mpp: resolution in micrometres per pixel that the model is to see; None for the processor's `target_mpp`, else
            0.5. It says nothing of a slide's own; plain images that state none are taken to have a number given here.
        region_size: output pixels per region side.
        overlap: output pixels that neighbouring regions share.
        minimum_tissue: share of tissue tokens below which a region (with `tile_size` a tile) is left out; 0 leaves out
            none that has any.
        whole_slide: all tissue of a slide in one forward instead of regions.
        dense: whether to store the features of the patch tokens too.
        origin: where coordinates of annotations, manifests and results start; see `Slide`.
        tile_size: pixels of the tiles over which the patch tokens of a region or slide are averaged, a multiple of the
            patch size: the features are then those of the tiles. None for one vector a region. Regions of a grid are
            rounded up to whole tiles.
        attention: with `dense`, whether to store the attention of the global tokens to the kept patch tokens in the
            last layer: "mean" of all heads, "heads" each; None for not.
        annotation_classes: which classes of annotations to take, of the regions where these are annotations, of the
            tissue mask otherwise; empty for all that QuPath does not ignore.
    """

    mpp: float | None = None
    region_size: int = 3430
    overlap: int = 0
    minimum_tissue: float = 0.0
    whole_slide: bool = False
    dense: bool = False
    origin: str = "bounds"
    tile_size: int | None = None
    attention: str | None = None
    annotation_classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):  # numbers of NumPy are no JSON
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                object.__setattr__(self, field.name, value.item())
        object.__setattr__(self, "annotation_classes", tuple(self.annotation_classes))

    @property
    def grid_region_size(self) -> int:
        """Pixels of the regions of a grid: `region_size`, rounded up to whole tiles."""
        return -(-self.region_size // (self.tile_size or 1)) * (self.tile_size or 1)


class SlideEmbedder:
    """Everything that is the same for all slides of a process, and its report.

    Args:
        model: in evaluation mode.
        processor: the model's image processor.
        settings: what is taken of every slide.
        mpp: the resolution that `settings` come to.
        slide_mpp: full resolution of all slides, where given.
        tissue_mask: "all", a file, or a folder with a file of each slide's name.
        batch_size: regions per forward.
        workers: threads that read ahead.
        show_progress: whether to draw progress bars.
        regions: file or folder of regions that another tool chose, see `region_files`.
        table_format: "anndata" or "zarr", what is written beside each file.
    """

    def __init__(
        self,
        model: "SparsePathViTModel",
        processor: "SparsePathViTImageProcessor",
        settings: EmbedSettings,
        mpp: float,
        slide_mpp: float | None,
        tissue_mask: str | os.PathLike[str] | None,
        batch_size: int,
        workers: int,
        show_progress: bool,
        regions: Path | None = None,
        table_format: str | None = None,
    ) -> None:
        self.model, self.processor, self.settings = model, processor, settings
        self.mpp, self.slide_mpp, self.tissue_mask, self.regions = mpp, slide_mpp, tissue_mask, regions
        self.table_format = table_format
        self.batch_size, self.workers, self.show_progress = batch_size, workers, show_progress
        self.patch_size = model.config.patch_size
        self.tiles: Tiles | None = None
        if settings.tile_size is not None:
            self.tiles = Tiles.of_pixels(settings.tile_size, self.patch_size, settings.minimum_tissue)
        self.report = EmbedReport()

    def run(self, slides: dict[str, SlideInput], store: EmbeddingStore) -> None:
        """Embeds the slides of this process one after the other."""
        with measured(self.model.device) as measurement:
            for name, item in tqdm(slides.items(), unit="slide", disable=not self.show_progress):
                try:
                    self._run_one(name, item, store)
                except (ValueError, OSError, RuntimeError, MemoryError) as error:
                    self._record_failure(item, error, store)
        self.report.seconds, self.report.peak_bytes = measurement.seconds, measurement.peak_bytes

    def _record_failure(self, item: SlideInput, error: Exception, store: EmbeddingStore) -> None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            raise OSError(
                error.errno,
                f"{store.folder} has no space left while {item.path} was written. Slides done so far are kept: free "
                "some space and run the same command again",
            ) from error
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, SlideError) else str(error)
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            reason += " (too little memory: see `sparsepath estimate`, or take smaller regions)"
        logger.error("%s failed: %s", item.path, reason)
        self.report.failed.append((str(item.path), reason))
        store.record_failure(item.path, reason)

    def _run_one(self, name: str, item: SlideInput, store: EmbeddingStore) -> None:
        if self.regions is not None:
            settings = self.settings
            classes = settings.annotation_classes
            item = with_regions(item, name, self.regions, self.slide_mpp, settings.origin, classes)
        mask_file = item.tissue_mask or self._mask_file(name)
        source = source_of(item, self.slide_mpp, mask_file)
        was_done = store.is_done(name, source)
        if not was_done:
            self._make(name, item, mask_file, store.writer(name, source))
        self._finish(name, item, store, was_done)

    def _finish(self, name: str, item: SlideInput, store: EmbeddingStore, was_done: bool) -> None:
        """What follows a slide that is done, now or before."""
        if was_done:
            self._correct_labels(name, item, store)
            self.report.skipped += 1
        else:
            self.report.done += 1
        self._record_skipped_regions(name, item, store)
        if self.table_format is not None:
            write_table(store.path_of(name), self.table_format)

    def _correct_labels(self, name: str, item: SlideInput, store: EmbeddingStore) -> None:
        """What is done has the labels that the manifest gives now."""
        left_out = {*store.skipped_regions(name), *store.impossible_regions(name)}
        labels = (item.label, region_labels(item, left_out))
        stored = store.labels(name)
        if labels == stored:
            return
        if not item.gives_labels:
            logger.warning("%s keeps the labels of an earlier manifest: this one gives none.", store.path_of(name))
            return
        store.set_labels(name, *labels)
        logger.warning("%s: labels corrected.", store.path_of(name))
        self.report.relabelled += 1

    def _make(self, name: str, item: SlideInput, mask_file: str | Path | None, writer: SlideWriter) -> None:
        """Embeds one slide into its file."""
        slide_mpp = item.mpp or self.slide_mpp
        with slide_to_see_at(item.path, slide_mpp, self.settings.mpp, self.settings.origin) as slide:
            # Of regions that are annotations the classes have been chosen: the mask is another file.
            has_outlines = any(box.outline is not None for box in item.boxes)
            tissue = find_tissue(slide, mask_file, classes=() if has_outlines else self.settings.annotation_classes)
            regions, blank, impossible = self._regions(slide, tissue, item)
            with writer, closing(self._embed(slide, tissue, regions, name)) as embeddings:
                for region, embedding in embeddings:
                    self._write(writer, slide, region, embedding)
                if blank:
                    writer.append(skipped_regions=_rows(blank))
                    writer.describe("skipped_regions", {"reason": "no tissue"})
                if impossible:
                    reasons = list(impossible.values())
                    writer.append(impossible_regions=_rows(impossible), impossible_region_reasons=reasons)
                boxes = [box for box in item.boxes if box not in impossible]
                if self.tiles is not None and not writer.rows("features"):
                    raise SlideError(self.tiles.why_none(slide.path, self.settings.tile_size))
                self._describe(writer, slide, name, replace(item, boxes=tuple(boxes)))

    def _write(
        self, writer: SlideWriter, slide: Slide, region: Region, embedding: Embedding, num_patches: int | None = None
    ) -> None:
        """Adds a region to the file and to the report; for the arguments see `region_rows`."""
        writer.append(**region_rows(slide, region, embedding, self.mpp, self.patch_size, num_patches))
        self.report.regions += 1
        self.report.tokens += len(embedding.token_positions)
        self.report.count_tiles(embedding.tiles)

    def _describe(self, writer: SlideWriter, slide: Slide, name: str, item: SlideInput) -> None:
        """Says in the file what lies in it."""
        encoder = encoder_name(self.model, writer.settings["weights"])
        describe_datasets(writer, slide, name, item, self.settings, self.mpp, self.patch_size, encoder)

    def _record_skipped_regions(self, name: str, item: SlideInput, store: EmbeddingStore) -> None:
        """Names regions that were left out in `failures.csv`, also those of an earlier run: the slide's file knows."""
        skipped, impossible = store.skipped_regions(name), store.impossible_regions(name)
        for x, y, width, height in skipped:
            reason = (
                f"no tissue was found in the region x={x}, y={y}, width={width}, height={height}: it was left out, all "
                "else of the slide is embedded. To have it too, pass --tissue-mask all and another folder"
            )
            logger.warning("%s: %s", item.path, reason)
            store.record_failure(item.path, reason)
        for reason in impossible.values():
            logger.warning("%s", reason)
            store.record_failure(item.path, reason)
        self.report.regions_without_tissue += len(skipped)
        self.report.impossible_regions += len(impossible)

    def _mask_file(self, name: str) -> str | Path | None:
        """The tissue mask of one slide, where masks are given."""
        if self.tissue_mask in (None, "all") or not Path(self.tissue_mask).is_dir():
            return self.tissue_mask
        candidates = [Path(self.tissue_mask) / f"{name}{suffix}" for suffix in MASK_SUFFIXES]
        found = [path for path in candidates if path.exists()]
        if not found:
            raise SlideError(f"{self.tissue_mask} holds no tissue mask {name} with one of {', '.join(MASK_SUFFIXES)}.")
        return found[0]

    def _regions(
        self, slide: Slide, tissue: TissueMask, item: SlideInput
    ) -> tuple[list[Region], list[Box], dict[Box, str]]:
        """The regions to embed; of a manifest the boxes without tissue, and those that are impossible with why."""
        settings = self.settings
        if settings.whole_slide:
            return [Region(0, 0, *slide.size_at(self.mpp))], [], {}
        if item.boxes:
            return self._regions_of_boxes(slide, tissue, item.boxes)
        minimum_tissue = 0.0 if self.tiles else settings.minimum_tissue
        regions = tissue_regions(
            slide, tissue, self.patch_size, settings.grid_region_size, self.mpp, settings.overlap, minimum_tissue
        )
        return regions, [], {}

    def _regions_of_boxes(
        self, slide: Slide, tissue: TissueMask, boxes: Sequence[Box]
    ) -> tuple[list[Region], list[Box], dict[Box, str]]:
        regions: list[Region] = []
        blank: list[Box] = []
        impossible: dict[Box, str] = {}
        for box in boxes:
            try:
                region = self._region_of_box(slide, box)
            except SlideError as error:
                impossible[box] = f"{error} It was left out, all else of the slide is embedded"
                continue
            if self._tissue_tokens(slide, tissue, region).any():
                regions.append(region)
            else:
                blank.append(box)
        if not regions:
            reasons = f" {next(iter(impossible.values()))}." if impossible else ""
            raise SlideError(
                f"{slide.path}: no tissue was found in any of the {len(boxes)} regions that were asked for. Check "
                "their coordinates (level-0 pixels), leave them out, or pass --tissue-mask all to embed them whole."
                + reasons
            )
        if padded := sum(box.overhangs(slide) for box in boxes if box not in impossible):
            logger.warning("%s: %d regions reach over its edge; what lies beyond is masked.", slide.path, padded)
        if any(box.label is not None for box in boxes):
            regions = [replace(region, label=region.label or "") for region in regions]
        return regions, blank, impossible

    def _region_of_box(self, slide: Slide, box: Box) -> Region:
        """Raises SlideError for a box that cannot be embedded."""
        region = box.at(slide, self.mpp)
        if box.outline is not None:  # no smaller than a patch, and in whole ones
            sides = (-(-max(side, 1) // self.patch_size) * self.patch_size for side in (region.width, region.height))
            region = replace(region, **dict(zip(("width", "height"), sides, strict=True)))
        if min(region.width, region.height) < self.patch_size:
            raise SlideError(
                f"{slide.path}: the region at x={box.x}, y={box.y} has {region.width} x {region.height} pixels at "
                f"{self.mpp:g} micrometres per pixel, less than one patch of {self.patch_size}: enlarge it, lower "
                "mpp, or leave it out."
            )
        return region

    def _embed(
        self, slide: Slide, tissue: TissueMask, regions: list[Region], name: str
    ) -> Iterator[tuple[Region, Embedding]]:
        """Every region with its embedding, in order; pixels are read ahead by threads, white beyond the slide."""
        dense, attention, reading = self.settings.dense, self.settings.attention, Stopwatch()
        start = time.perf_counter()
        if self.settings.whole_slide:
            slide_options = (tissue, dense, reading, self.tiles, attention, self.show_progress)
            embedding = embed_slide(self.model, self.processor, slide, self.mpp, *slide_options)
            self.report.reading_seconds += reading.seconds
            self.report.model_seconds += time.perf_counter() - start - reading.seconds
            yield regions[0], embedding
            return

        def read(region: Region) -> tuple[Region, np.ndarray, np.ndarray]:
            # Tissue regions end with the last token, which may reach over the slide's edge; so may a manifest's boxes.
            image = slide.read_region(region.x, region.y, region.width, region.height, self.mpp, pad=True)
            return region, image, self._tissue_tokens(slide, tissue, region)

        progress = tqdm(total=len(regions), desc=name, unit="region", leave=False, disable=not self.show_progress)
        # Closed with the last region or the first error: no thread may still read when the slide is closed.
        with progress, closing(read_ahead(read, regions, self._workers_for(regions))) as read_regions:
            waited_for = reading.watch(read_regions)
            while batch := list(islice(waited_for, self.batch_size)):
                batch_regions, images, tokens = zip(*batch, strict=True)
                start = time.perf_counter()
                options = (dense, self.tiles, attention)
                embeddings = embed_regions(self.model, self.processor, images, tokens, *options)
                self.report.model_seconds += time.perf_counter() - start
                progress.update(len(batch))
                yield from zip(batch_regions, embeddings, strict=True)
        self.report.reading_seconds += reading.seconds

    def _tissue_tokens(self, slide: Slide, tissue: TissueMask, region: Region) -> np.ndarray:
        """(rows, columns) bool of a region, without the patches at its edge that the processor leaves out."""
        width, height, patch_size = region.width, region.height, self.patch_size
        covered = covered_patches(height, width, patch_size, self.processor.min_patch_coverage).numpy()
        tokens = covered & tissue.token_grid(slide, patch_size, self.mpp, region.x, region.y, width, height)
        return tokens if region.outline is None else tokens & tokens_in_outline(region, slide, patch_size, self.mpp)

    def _workers_for(self, regions: list[Region]) -> int:
        """Threads that read ahead, fewer where the regions are so large that waiting ones would fill the memory."""
        largest = max(region.width * region.height * 3 for region in regions)
        return max(1, min(self.workers, _READ_AHEAD_BYTES // largest))


def _rows(boxes: Iterable[Box]) -> np.ndarray:
    """(boxes, 4) int64: x, y, width, height."""
    return np.asarray([[box.x, box.y, box.width, box.height] for box in boxes], dtype=np.int64)


def default_workers() -> int:
    """Threads that read ahead: one per core, at most 8."""
    return min(8, os.cpu_count() or 1)
