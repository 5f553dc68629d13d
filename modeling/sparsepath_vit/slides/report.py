# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a run over slides did, in numbers and in one line."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .tiles import TileFeatures


@dataclass
class EmbedReport:
    """What a run did, over all its processes.

    Attributes:
        done: slides embedded now.
        skipped: slides that were done before.
        relabelled: of those, slides whose labels were corrected.
        failed: (slide, reason) of the others.
        left_out: (path, reason) of what the folders hold beside slides, and of second names of slides.
        regions: embedded now; a whole slide is one.
        regions_without_tissue: that a manifest asks for and that were left out, of slides done now or before.
        impossible_regions: likewise, that lie outside their slide, or are smaller than a patch or far too large.
        tokens: tissue tokens embedded now.
        tiles: whose features were written now, where tiles were asked for.
        tiles_left_out: others that have tissue, but too little of it, or no token left after pruning.
        seconds: wall time, the longest of the processes.
        model_seconds: share of it in the model, pixel values included.
        reading_seconds: share of it waiting for pixels.
        peak_bytes: the largest of the processes, as `runtime.measure` defines it.
    """

    done: int = 0
    skipped: int = 0
    relabelled: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    regions: int = 0
    regions_without_tissue: int = 0
    impossible_regions: int = 0
    tokens: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0
    reading_seconds: float = 0.0
    peak_bytes: int = 0
    tiles: int = 0
    tiles_left_out: int = 0

    def count_tiles(self, tiles: "TileFeatures | None") -> None:
        """Adds the tiles of one region."""
        if tiles is not None:
            self.tiles += len(tiles.features)
            self.tiles_left_out += tiles.left_out

    @classmethod
    def of_processes(cls, reports: Sequence["EmbedReport"]) -> "EmbedReport":
        """The sum of all processes; times and memory of the largest."""
        total = cls(failed=[failure for report in reports for failure in report.failed])
        total.left_out = [entry for report in reports for entry in report.left_out]
        counts = ("done", "skipped", "relabelled", "regions", "regions_without_tissue", "impossible_regions", "tokens")
        counts += ("tiles", "tiles_left_out")
        for name in counts:
            setattr(total, name, sum(getattr(report, name) for report in reports))
        for name in ("seconds", "model_seconds", "reading_seconds", "peak_bytes"):
            setattr(total, name, max(getattr(report, name) for report in reports))
        return total

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        rest = 1 - (self.model_seconds + self.reading_seconds) / seconds
        relabelled = f" ({self.relabelled} with corrected labels)" if self.relabelled else ""
        others = f", {len(self.left_out)} other files and folders left out (left_out.csv)" if self.left_out else ""
        counts = ((self.regions_without_tissue, "without tissue"), (self.impossible_regions, "impossible"))
        left_out = ", ".join(f"{count} {kind}" for count, kind in counts if count)
        left_out = f" ({left_out} left out)" if left_out else ""
        tiles = f", {self.tiles} tiles ({self.tiles_left_out} left out)" if self.tiles else ""
        return (
            f"{self.done} slides embedded, {self.skipped} done before{relabelled}, {len(self.failed)} failed{others}; "
            f"{self.regions} regions{left_out}{tiles}, {self.tokens:,} tissue tokens in {seconds:.1f} s "
            f"({self.tokens / seconds:,.0f} tokens/s): {self.model_seconds / seconds:.0%} in the model, "
            f"{self.reading_seconds / seconds:.0%} waiting for pixels, {rest:.0%} tissue, writing and the rest; "
            f"peak memory {self.peak_bytes / 2**30:.2f} GiB"
        )
