# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""One forward pass over regions of a slide, or over all of its tissue.

Background never enters the network: patch tokens outside the tissue are dropped before the first layer.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from ..runtime.cost import tokens_after_pruning
from ..runtime.pixels import prepare
from .backends import SlideError
from .reader import Slide
from .tissue import TissueMask, find_tissue

if TYPE_CHECKING:
    from ..model.configuration_sparsepath_vit import SparsePathViTConfig
    from ..model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
    from ..model.modeling_outputs_sparsepath_vit import SparsePathViTModelOutput
    from ..model.modeling_sparsepath_vit import SparsePathViTModel
    from ..model.token_grid import TokenGrid

Item = TypeVar("Item")
Result = TypeVar("Result")

_STRIP_PIXELS = 8 * 2**20  # a strip's pixels, patches and positions exist beside the tokens of the whole slide
_STRIP_ROWS = 32
_SECONDS_UNTIL_PROGRESS = 2.0
_GAP_TOKENS = 16  # shorter background between tissue is read along: seeking costs more


class Stopwatch:
    """Counts the seconds that an iterator keeps its user waiting."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items."""
        while True:
            start = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - start
            yield item


@dataclass(frozen=True)
class Embedding:
    """What the model made of one region or of one whole slide. K tokens are left of the N tissue tokens.

    Attributes:
        pooled: (pooled_size,) float32.
        patch_features: (K, hidden_size) float16 after the final norm, in raster order; None where not asked for. With
            `config.unprune` removed tokens come back, and K is N.
        patch_positions: (K, 2) int32, (row, column) of each of these tokens in the token grid.
        patch_weights: (K,) int32, how many tissue tokens each of these stands for; None where the model leaves no
            representatives of what it prunes.
        token_positions: (N, 2) int32, (row, column) of each tissue token.
        prune_scores: (N,) float32 of the tissue tokens; None where the model does not prune.
        grid_size: (rows, columns) of the token grid.
    """

    pooled: np.ndarray
    patch_features: np.ndarray | None
    patch_positions: np.ndarray
    patch_weights: np.ndarray | None
    token_positions: np.ndarray
    prune_scores: np.ndarray | None
    grid_size: tuple[int, int]


@torch.no_grad()
def embed_regions(
    model: "SparsePathViTModel",
    processor: "SparsePathViTImageProcessor",
    images: Sequence[np.ndarray],
    tissue_tokens: Sequence[np.ndarray],
    dense: bool = False,
) -> list[Embedding]:
    """Embeds a batch of regions of any sizes in one packed forward.

    Args:
        model: in evaluation mode; the device of its weights is used.
        processor: the model's image processor.
        images: (height, width, 3) uint8 each, at the resolution the model is to see.
        tissue_tokens: (rows, columns) bool each, True for tissue; at least one token per region.
        dense: whether to return the features of the patch tokens.
    """
    batch = prepare(processor, list(images), model.device)
    patch_mask = batch["patch_mask"]  # (batch, canvas rows, canvas columns): patches that lie in the image
    for index, tokens in enumerate(tissue_tokens):
        rows, columns = tokens.shape
        patch_mask[index, :rows, :columns] &= torch.from_numpy(tokens).to(patch_mask.device)
    outputs = model(batch["pixel_values"], patch_mask=patch_mask, image_sizes=batch["image_sizes"])
    has_weights = model.config.leaves_representatives
    return [
        _embedding(outputs, index, patch_mask[index], tokens.shape, dense, has_weights)
        for index, tokens in enumerate(tissue_tokens)
    ]


@torch.no_grad()
def embed_slide(
    model: "SparsePathViTModel",
    processor: "SparsePathViTImageProcessor",
    slide: Slide,
    mpp: float | None = 0.5,
    tissue: TissueMask | None = None,
    dense: bool = True,
    reading: Stopwatch | None = None,
    show_progress: bool = False,
) -> Embedding:
    """Embeds all tissue of a slide as one sparse token grid in one forward.

    Pixels are read and embedded strip by strip, and only where there is tissue: the slide's pixels are never in
    memory at once. The result equals that of the same pixels passed as one image with the tissue as `patch_mask`.

    Args:
        model: in evaluation mode, with block-sparse attention; the device of its weights is used.
        processor: the model's image processor.
        slide: the slide.
        mpp: resolution in micrometres per pixel; None for level 0.
        tissue: which tokens to embed; found by `find_tissue` where None.
        dense: whether to return the features of the patch tokens.
        reading: counts the time spent waiting for pixels.
        show_progress: whether to draw a progress bar over the layers and their strips.

    Raises:
        SlideError: the slide cannot be read, or has no tissue.
        ValueError: the model's attention implementation would need a dense mask.

    Example:
    ```python
    >>> with Slide("CMU-1.svs") as slide:
    ...     embedding = embed_slide(model, processor, slide, mpp=0.5)
    >>> embedding.pooled.shape, embedding.patch_features.shape
    ```
    """
    implementation = model.config._attn_implementation
    if implementation != "block_sparse":
        raise ValueError(
            f"attn_implementation={implementation!r} needs a mask over all pairs of a slide's tokens: call "
            'model.set_attn_implementation("block_sparse").'
        )
    tissue = find_tissue(slide) if tissue is None else tissue
    patch_size = model.config.patch_size
    present = tissue.token_grid(slide, patch_size, mpp)
    if not present.any():
        raise SlideError(f"{slide.path}: the tissue is smaller than half a patch token at {mpp} micrometres per pixel.")
    # Closed also after an error: the slide may be closed next, and no thread may still read it then.
    with closing(slide_strips(slide, present, patch_size, mpp)) as strips:
        waited_for = strips if reading is None else reading.watch(strips)
        pixels = (prepare(processor, [strip], model.device)["pixel_values"] for strip in waited_for)
        return forward_strips(model, pixels, present, dense, slide.name if show_progress else None)


@torch.no_grad()
def forward_strips(
    model: "SparsePathViTModel",
    strips: Iterable[torch.Tensor],
    present: np.ndarray,
    dense: bool,
    progress: str | None = None,
) -> Embedding:
    """The model on one image that arrives in strips.

    Args:
        model: in evaluation mode.
        strips: (1, channels, height, width) from the top down, each a whole number of patches high, of the width of
            the grid.
        present: (rows, columns) bool.
        dense: whether to return the features of the patch tokens.
        progress: the title of a progress bar over the layers and their strips; `None` for no bar.
    """
    patch_mask = torch.from_numpy(present).to(model.device)
    grid = model.token_grid_of_image(patch_mask)
    with _progress_bar(model.config, grid, progress) as bar:
        outputs = model.finish(model.encode(strips, grid, on_tokens=bar.update), may_overwrite=True)
    return _embedding(outputs, 0, patch_mask, present.shape, dense, model.config.leaves_representatives)


def _progress_bar(config: "SparsePathViTConfig", grid: "TokenGrid", title: str | None) -> tqdm:
    """One bar for a whole forward: each patch token counts once for the embeddings and once for each layer."""
    layers_before = (
        min(config.prune_after_layer, config.num_hidden_layers) if config.prunes else config.num_hidden_layers
    )
    tokens, kept = sum(grid.counts), sum(tokens_after_pruning(config, grid))
    total = (1 + layers_before) * tokens + (config.num_hidden_layers - layers_before) * kept
    return tqdm(
        total=total,
        desc=title,
        unit="token",
        unit_scale=True,
        leave=False,
        delay=_SECONDS_UNTIL_PROGRESS,
        disable=title is None,
    )


def strip_rows(columns: int, patch_size: int) -> int:
    """Token rows per strip of a slide that is `columns` tokens wide."""
    return max(1, min(_STRIP_ROWS, _STRIP_PIXELS // (columns * patch_size * patch_size)))


def slide_strips(slide: Slide, present: np.ndarray, patch_size: int, mpp: float | None) -> Iterator[np.ndarray]:
    """The pixels of a slide in strips from the top down, white where no token is present.

    Args:
        slide: the slide.
        present: (rows, columns) bool, the tokens of the whole slide.
        patch_size: pixels per token side.
        mpp: resolution.

    Yields:
        (token rows * patch_size, columns * patch_size, 3) uint8; the next strip is read meanwhile.
    """
    rows, columns = present.shape
    rows_per_strip = strip_rows(columns, patch_size)
    scale_x, scale_y = slide.scale(mpp)

    def read(first: int) -> np.ndarray:
        tokens = present[first : first + rows_per_strip]
        strip = np.full((len(tokens) * patch_size, columns * patch_size, 3), 255, dtype=np.uint8)
        for start, end in _runs(tokens.any(axis=0)):
            left, width = start * patch_size, (end - start) * patch_size
            top = first * patch_size * scale_y
            strip[:, left : left + width] = slide.read_region(left * scale_x, top, width, len(strip), mpp, pad=True)
        return strip

    yield from read_ahead(read, range(0, rows, rows_per_strip), workers=1)


def _runs(present: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of the runs of True, with short gaps closed."""
    columns = np.flatnonzero(present)
    if not len(columns):
        return []
    breaks = np.flatnonzero(np.diff(columns) > _GAP_TOKENS)
    starts = columns[np.concatenate([[0], breaks + 1])]
    ends = columns[np.concatenate([breaks, [len(columns) - 1]])] + 1
    return [(int(start), int(end)) for start, end in zip(starts, ends, strict=True)]


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`read` of every item, in order, done by threads up to `workers` items ahead of who takes the results."""
    pool = ThreadPoolExecutor(workers)
    pending: deque = deque()
    try:
        for item in items:
            pending.append(pool.submit(read, item))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _embedding(
    outputs: "SparsePathViTModelOutput",
    index: int,
    patch_mask: torch.Tensor,
    grid_size: tuple[int, int],
    dense: bool,
    has_weights: bool,
) -> Embedding:
    """One image of a batch; `patch_mask` is (canvas rows, canvas columns) bool, True where a token was present."""
    positions = outputs.patch_positions[index]
    positions = positions[positions[:, 0] >= 0]  # images that keep fewer tokens are padded
    features, scores, weights = None, None, None
    if has_weights:  # all are 1 where everything came back, or nothing was removed from this batch
        ones = torch.ones(len(positions), dtype=torch.int32)
        weights = ones if outputs.patch_weights is None else outputs.patch_weights[index, : len(positions)]
        weights = weights.int().cpu().numpy()
    if dense:
        first = outputs.last_hidden_state.shape[1] - outputs.patch_positions.shape[1]
        features = outputs.last_hidden_state[index, first : first + len(positions)].half().cpu().numpy()
    if outputs.prune_scores is not None:
        scores = outputs.prune_scores[index].view(patch_mask.shape)[patch_mask].float().cpu().numpy()
    return Embedding(
        pooled=outputs.pooler_output[index].float().cpu().numpy(),
        patch_features=features,
        patch_positions=positions.int().cpu().numpy(),
        patch_weights=weights,
        token_positions=patch_mask.nonzero().int().cpu().numpy(),
        prune_scores=scores,
        grid_size=tuple(grid_size),
    )
