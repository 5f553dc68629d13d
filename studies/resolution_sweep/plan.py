# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a resolution sweep measures: variants of the model, views of the regions, ablations, and the rows they make."""

import logging
from dataclasses import dataclass, field, replace
from typing import Any

from sparsepath_vit.tasks.classification.linear_probe import ProbeSettings

logger = logging.getLogger(__name__)

VIEWS = ("field_of_view", "pixels", "resolution")
PARTS = ("resolution", "window", "prune_ratio", "prune_layer")


@dataclass(frozen=True)
class Variant:
    """One way to run the model on a region.

    Attributes:
        sparse: whether attention is block-local.
        pruned: whether tokens are removed.
        order: in which order, see `variants.PRUNING_ORDERS`.
        tiled: whether the region is cut into tiles whose features are averaged.
        drops_background: whether white patches are left out.
        in_every_view: whether it is run in all views, or at a fixed field of view only.
    """

    sparse: bool = False
    pruned: bool = False
    order: str = "score"
    tiled: bool = False
    drops_background: bool = False
    in_every_view: bool = False


VARIANTS = {
    "dense": Variant(in_every_view=True),
    "sparse": Variant(sparse=True, in_every_view=True),
    "pruned": Variant(sparse=True, pruned=True, in_every_view=True),
    "tiles": Variant(tiled=True),
    "background_dropped": Variant(sparse=True, drops_background=True),
    "random_pruning": Variant(sparse=True, pruned=True, order="random"),
    "inverse_pruning": Variant(sparse=True, pruned=True, order="inverse"),
}


@dataclass(frozen=True)
class SweepSettings:
    """What is swept.

    Attributes:
        sizes: pixels of a region's longer side.
        variants: names in `VARIANTS`.
        views: how a size is understood. "field_of_view": the whole region in that many pixels. "pixels": the middle of
            the region at its own resolution. "resolution": the whole region in as many pixels as the largest size, but
            with the detail of the smaller one, so that the number of tokens stays and only the resolution changes.
        parts: of `PARTS`: the sweep over sizes, and ablations at `ablation_size`.
        window_size: of the sparse variants.
        prune_ratio: of the pruned variants.
        prune_after_layer: of the pruned variants; None for the model's own.
        tile_size: pixels of a tile's side.
        windows, prune_ratios, prune_layers: of the ablations.
        ablation_size: pixels; None for the largest of `sizes`.
        probe: how the linear probe is fitted and evaluated; its `features` say batch size and workers.
        repeats: timed runs of a region, after one that is not timed; 0 times nothing.
        memory_limit: bytes a forward may take; None for what is free.
    """

    sizes: tuple[int, ...]
    variants: tuple[str, ...] = tuple(VARIANTS)
    views: tuple[str, ...] = VIEWS
    parts: tuple[str, ...] = PARTS
    window_size: int = 8
    prune_ratio: float = 0.6
    prune_after_layer: int | None = None
    tile_size: int = 224
    windows: tuple[int, ...] = (2, 4, 8, 16, 64)
    prune_ratios: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    prune_layers: tuple[int, ...] = (1, 2, 4, 8)
    ablation_size: int | None = None
    probe: ProbeSettings = field(default_factory=ProbeSettings)
    repeats: int = 3
    memory_limit: int | None = None

    def __post_init__(self) -> None:
        for name, values, known in (
            ("variants", self.variants, VARIANTS),
            ("views", self.views, VIEWS),
            ("parts", self.parts, PARTS),
        ):
            if unknown := [value for value in values if value not in known]:
                raise ValueError(f"{name}={', '.join(unknown)} unknown: choose from {', '.join(known)}.")
        if not self.sizes or min(self.sizes) < 1 or self.tile_size < 1:
            raise ValueError(f"sizes={self.sizes}, tile_size={self.tile_size}: at least one size, in pixels.")


@dataclass(frozen=True)
class SweepRow:
    """What one row measures; see `SweepSettings` and `Variant`."""

    part: str
    view: str
    size: int
    variant: str
    window_size: int | None
    prune_ratio: float
    prune_after_layer: int

    @property
    def how(self) -> Variant:
        """Of `VARIANTS`."""
        return VARIANTS[self.variant]


def plan(settings: SweepSettings, depth: int, prune_after_layer: int) -> list[SweepRow]:
    """All rows, the cheap ones first within each part.

    Args:
        settings: of the sweep.
        depth: layers of the model; ablations of deeper pruning are left out.
        prune_after_layer: where the pruned variants prune, unless the settings say.
    """
    layer = settings.prune_after_layer or prune_after_layer
    rows = []

    def add(part: str, view: str, size: int, name: str, **changes: Any) -> None:
        variant = VARIANTS[name]
        window_size = settings.window_size if variant.sparse else None
        row = SweepRow(part, view, size, name, window_size, settings.prune_ratio if variant.pruned else 0.0, layer)
        rows.append(replace(row, **changes))

    if "resolution" in settings.parts:
        for view in settings.views:
            for size in sorted(set(settings.sizes)):
                for name in settings.variants:
                    if view == "field_of_view" or VARIANTS[name].in_every_view:
                        add("resolution", view, size, name)
    size = settings.ablation_size or max(settings.sizes)
    if "window" in settings.parts:
        for window_size in settings.windows:
            add("window", "field_of_view", size, "sparse", window_size=window_size)
    if "prune_ratio" in settings.parts:
        for ratio in settings.prune_ratios:
            add("prune_ratio", "field_of_view", size, "pruned", prune_ratio=ratio)
    if "prune_layer" in settings.parts:
        for number in settings.prune_layers:
            if number <= depth:
                add("prune_layer", "field_of_view", size, "pruned", prune_after_layer=number)
            else:
                logger.info("pruning after layer %d is left out: the model has %d layers", number, depth)
    return rows
