# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""One process's share of a run: slide after slide, region after region, into the store."""

import errno
import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from ..model.patch_presence import covered_patches
from ..runtime.measure import measured
from .backends import SlideError
from .forward import Embedding, Stopwatch, embed_regions, embed_slide, read_ahead
from .reader import Slide
from .records import region_labels, source_of
from .regions import Box, Region, SlideInput, tissue_regions
from .report import EmbedReport
from .store import EmbeddingStore, SlideWriter
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
        mpp: resolution in micrometres per pixel; None for the processor's `target_mpp`, else 0.5. For a slide that
            does not state its own resolution, a number given here is also taken as that.
        region_size: output pixels per region side.
        overlap: output pixels that neighbouring regions share.
        minimum_tissue: share of tissue tokens below which a region is left out; 0 leaves out none that has any.
        whole_slide: all tissue of a slide in one forward instead of regions.
        dense: whether to store the features of the patch tokens too.
        origin: where coordinates of annotations, manifests and results start; see `Slide`.
    """

    mpp: float | None = None
    region_size: int = 3430
    overlap: int = 0
    minimum_tissue: float = 0.0
    whole_slide: bool = False
    dense: bool = False
    origin: str = "bounds"


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
    ) -> None:
        self.model, self.processor, self.settings = model, processor, settings
        self.mpp, self.slide_mpp, self.tissue_mask = mpp, slide_mpp, tissue_mask
        self.batch_size, self.workers, self.show_progress = batch_size, workers, show_progress
        self.patch_size = model.config.patch_size
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
        mask_file = self._mask_file(name)
        source = source_of(item, self.slide_mpp, mask_file)
        if store.is_done(name, source):
            self._correct_labels(name, item, store)
            self.report.skipped += 1
        else:
            self._make(name, item, mask_file, store.writer(name, source))
            self.report.done += 1
        self._record_skipped_regions(name, item, store)

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
        with open_slide(item.path, item.mpp or self.slide_mpp, self.settings.mpp, self.settings.origin) as slide:
            tissue = find_tissue(slide, mask_file)
            regions, blank, impossible = self._regions(slide, tissue, item)
            with writer, closing(self._embed(slide, tissue, regions, name)) as embeddings:
                for region, embedding in embeddings:
                    _write(writer, slide, region, embedding, self.mpp, self.patch_size)
                    self.report.regions += 1
                    self.report.tokens += len(embedding.token_positions)
                if blank:
                    writer.append(skipped_regions=_rows(blank))
                    writer.describe("skipped_regions", {"reason": "no tissue"})
                if impossible:
                    reasons = list(impossible.values())
                    writer.append(impossible_regions=_rows(impossible), impossible_region_reasons=reasons)
                boxes = [box for box in item.boxes if box not in impossible]
                self._describe(writer, slide, name, replace(item, boxes=tuple(boxes)))

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
        regions = tissue_regions(
            slide, tissue, self.patch_size, settings.region_size, self.mpp, settings.overlap, settings.minimum_tissue
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
        dense, reading = self.settings.dense, Stopwatch()
        start = time.perf_counter()
        if self.settings.whole_slide:
            embedding = embed_slide(
                self.model, self.processor, slide, self.mpp, tissue, dense, reading, self.show_progress
            )
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
                embeddings = embed_regions(self.model, self.processor, images, tokens, dense)
                self.report.model_seconds += time.perf_counter() - start
                progress.update(len(batch))
                yield from zip(batch_regions, embeddings, strict=True)
        self.report.reading_seconds += reading.seconds

    def _tissue_tokens(self, slide: Slide, tissue: TissueMask, region: Region) -> np.ndarray:
        """(rows, columns) bool of a region, without the patches at its edge that the processor leaves out."""
        width, height, patch_size = region.width, region.height, self.patch_size
        covered = covered_patches(height, width, patch_size, self.processor.min_patch_coverage).numpy()
        return covered & tissue.token_grid(slide, patch_size, self.mpp, region.x, region.y, width, height)

    def _workers_for(self, regions: list[Region]) -> int:
        """Threads that read ahead, fewer where the regions are so large that waiting ones would fill the memory."""
        largest = max(region.width * region.height * 3 for region in regions)
        return max(1, min(self.workers, _READ_AHEAD_BYTES // largest))

    def _describe(self, writer: SlideWriter, slide: Slide, name: str, item: SlideInput) -> None:
        """Attributes under the names that slide toolkits read, sizes in level-0 pixels beside those at `mpp`."""
        (scale, scale_y), own_mpp = slide.scale(self.mpp), slide.mpp
        sizes = slide.size_at(self.mpp) if self.settings.whole_slide else [self.settings.region_size]
        if item.boxes:
            sizes = [side for box in item.boxes for side in (box.width / scale, box.height / scale_y)]
        patch_size = -(-int(max(sizes)) // self.patch_size) * self.patch_size
        mpp = slide.mpp_xy[0] * scale  # the same along y, also where the slide's own pixels are oblong
        attributes = {
            "name": name,
            "patch_size": patch_size,
            "patch_size_level0": round(patch_size * scale),
            "patch_level": 0,
            "custom_downsample": scale,
            "overlap": self.settings.overlap,
            "mpp": mpp,
            "level0_mpp": own_mpp,
            "level0_magnification": round(10 / own_mpp),
            "target_magnification": round(10 / mpp),
            "level0_width": slide.dimensions[0],
            "level0_height": slide.dimensions[1],
        }
        if slide.frame[:2] != (0, 0):  # the level-0 pixel that all coordinates in the file count from
            attributes["origin_level0"] = slide.frame[:2]
        writer.describe("coords", attributes)
        writer.describe("features", {"name": name, **({"label": item.label} if item.label else {})})
        level0_size = (self.patch_size * scale, self.patch_size * scale_y)
        token_attributes = {"token_size": self.patch_size, "token_size_level0": level0_size}
        for dataset in ("patch_coords", "token_coords"):
            if self.settings.dense:
                writer.describe(dataset, token_attributes)


def _rows(boxes: Iterable[Box]) -> np.ndarray:
    """(boxes, 4) int64: x, y, width, height."""
    return np.asarray([[box.x, box.y, box.width, box.height] for box in boxes], dtype=np.int64)


def open_slide(path: Path, slide_mpp: float | None, mpp: float | None, origin: str = "bounds") -> Slide:
    """Opens a slide; where neither it nor `slide_mpp` gives its resolution, an explicit target `mpp` does."""
    slide = Slide(path, mpp=slide_mpp, origin=origin, apart=True)
    if slide_mpp is None and mpp is not None and not slide.states_mpp:
        logger.warning("%s does not state its resolution; taken to be %g micrometres per pixel.", path, mpp)
        return Slide(path, mpp=mpp, origin=origin, apart=True)
    return slide


def default_workers() -> int:
    """Threads that read ahead: one per core, at most 8."""
    return min(8, os.cpu_count() or 1)


def _write(
    writer: SlideWriter, slide: Slide, region: Region, embedding: Embedding, mpp: float, patch_size: int
) -> None:
    """Adds a region to the file; coordinates of regions and tokens are those of their top left corners in the frame."""
    scale = np.asarray(slide.scale(mpp))
    corner = np.asarray([region.x, region.y]) - slide.frame[:2]  # level-0 pixels

    def level0(positions: np.ndarray) -> np.ndarray:  # (tokens, 2) row, column -> x, y
        return np.rint(corner + positions[:, ::-1] * patch_size * scale).astype(np.int64)

    rows: dict[str, Any] = {
        "features": embedding.pooled[None],
        "coords": np.rint(corner).astype(np.int64)[None],
        "region_sizes": np.asarray([[region.width, region.height]], dtype=np.int32),
    }
    if region.label is not None:
        rows["labels"] = [region.label]
    if embedding.patch_features is not None:
        scores = embedding.prune_scores
        rows |= {
            "patch_features": embedding.patch_features,
            "patch_positions": embedding.patch_positions,
            "patch_coords": level0(embedding.patch_positions),
            "patch_counts": np.asarray([len(embedding.patch_positions)], dtype=np.int64),
            "token_coords": level0(embedding.token_positions),
            "token_counts": np.asarray([len(embedding.token_positions)], dtype=np.int64),
        }
        if scores is not None:
            rows["prune_scores"] = scores
        if embedding.patch_weights is not None:
            rows["patch_weights"] = embedding.patch_weights
    writer.append(**rows)
