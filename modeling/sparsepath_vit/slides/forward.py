# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""One forward pass over regions of a slide, or over all of its tissue.

Background never enters the network: patch tokens outside the tissue are dropped before the first layer.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from ..model.process_split import do_together
from ..runtime.cost import tokens_after_pruning
from ..runtime.pixels import prepare
from ..runtime.short_repr import ShortRepr
from .backends import SlideError
from .float16_rows import float16_rows
from .global_attention import GlobalAttention
from .reader import Slide
from .tiles import TileFeatures, Tiles, pool_tiles
from .tissue import TissueMask, find_tissue

if TYPE_CHECKING:
    from ..model.configuration_sparsepath_vit import SparsePathViTConfig
    from ..model.encoder_sparsepath_vit import EncoderOutput
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


@dataclass(frozen=True, repr=False)
class Embedding(ShortRepr):
    """What the model made of one region or of one whole slide. K tokens are left of the N tissue tokens.

    Attributes:
        pooled: (pooled_size,) float32.
        patch_features: (K, hidden_size) float16 after the final norm, in raster order; None where not asked for. With
            `config.unprune` removed tokens come back, and K is N. Of a whole slide on a CPU they lie in the memory that
            the model's tokens had.
        patch_positions: (K, 2) int32, (row, column) of each of these tokens in the token grid.
        patch_weights: (K,) int32, how many tissue tokens each of these stands for; None where the model leaves no
            representatives of what it prunes.
        token_positions: (N, 2) int32, (row, column) of each tissue token.
        prune_scores: (N,) float32 of the tissue tokens; None where the model does not prune.
        grid_size: (rows, columns) of the token grid.
        tiles: the patch tokens averaged over tiles; None where not asked for.
        attention: (K, G) float32, attention of the global tokens to each of these tokens in the last layer, the mean
            over heads; or (K, G, heads); NaN for tokens that came back after pruning. None where not asked for.
    """

    pooled: np.ndarray
    patch_features: np.ndarray | None
    patch_positions: np.ndarray
    patch_weights: np.ndarray | None
    token_positions: np.ndarray
    prune_scores: np.ndarray | None
    grid_size: tuple[int, int]
    tiles: TileFeatures | None = None
    attention: np.ndarray | None = None


@torch.no_grad()
def embed_regions(
    model: "SparsePathViTModel",
    processor: "SparsePathViTImageProcessor",
    images: Sequence[np.ndarray],
    tissue_tokens: Sequence[np.ndarray],
    dense: bool = False,
    tiles: Tiles | None = None,
    attention: str | None = None,
) -> list[Embedding]:
    """Embeds a batch of regions of any sizes in one packed forward.

    Args:
        model: in evaluation mode; the device of its weights is used.
        processor: the model's image processor.
        images: (height, width, 3) uint8 each, at the resolution the model is to see.
        tissue_tokens: (rows, columns) bool each, True for tissue; at least one token per region.
        dense: whether to return the features of the patch tokens.
        tiles: over which tiles to average them, from the region's top left corner.
        attention: whether to return that of the global tokens: "mean" of all heads, "heads" each, or None.
    """
    batch = prepare(processor, list(images), model.device, config=model.config)
    patch_mask = batch["patch_mask"]  # (batch, canvas rows, canvas columns): patches that lie in the image
    for index, tokens in enumerate(tissue_tokens):
        rows, columns = tokens.shape
        patch_mask[index, :rows, :columns] &= torch.from_numpy(tokens).to(patch_mask.device)
    grid = model.token_grid(batch["pixel_values"], patch_mask, batch["image_sizes"])
    encoded, outputs, listener = _encode(model, batch["pixel_values"], grid, attention)
    has_weights = model.config.leaves_representatives
    return [
        _with_attention(
            _embedding(outputs, index, patch_mask[index], tokens.shape, dense, has_weights, tiles),
            encoded,
            listener,
            index,
        )
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
    tiles: Tiles | None = None,
    attention: str | None = None,
    show_progress: bool = False,
) -> Embedding:
    """Embeds all tissue of a slide as one sparse token grid in one forward.

    Pixels are read and embedded strip by strip, and only where there is tissue: the slide's pixels are never in
    memory at once. The result equals that of the same pixels passed as one image with the tissue as `patch_mask`.
    Under `model.split_over_processes()` each process reads the pixels of its own rows, and returns the patch features,
    positions and weights of these; all else is that of the whole slide.

    Args:
        model: in evaluation mode, with block-sparse attention; the device of its weights is used.
        processor: the model's image processor.
        slide: the slide.
        mpp: resolution in micrometres per pixel; None for level 0.
        tissue: which tokens to embed; found by `find_tissue` where None.
        dense: whether to return the features of the patch tokens.
        reading: counts the time spent waiting for pixels.
        tiles: over which tiles to average the patch tokens, from the slide's top left corner.
        attention: whether to return that of the global tokens; see `embed_regions`.
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
    patch_size, split = model.config.patch_size, model.process_split
    if split is not None and (tiles is not None or attention is not None):
        raise ValueError(
            "Over several processes neither tiles nor attention can be had: pass tiles=None, attention=None."
        )
    present = do_together(model, lambda: _tissue_tokens(model, slide, tissue, mpp))
    rows = (
        (0, len(present)) if split is None else split.token_rows(model.token_grid_of_image(torch.from_numpy(present)))
    )
    # Closed also after an error: the slide may be closed next, and no thread may still read it then.
    with closing(slide_strips(slide, present, patch_size, mpp, rows)) as strips:
        waited_for = strips if reading is None else reading.watch(strips)
        pixels = (prepare(processor, [strip], model.device)["pixel_values"] for strip in waited_for)
        title = slide.name if show_progress else None
        return forward_strips(model, pixels, present, dense, tiles, attention, title)


def _tissue_tokens(
    model: "SparsePathViTModel", slide: Slide, tissue: TissueMask | None, mpp: float | None
) -> np.ndarray:
    """(rows, columns) bool, the tokens of a whole slide that are tissue."""
    implementation = model.config._attn_implementation
    if implementation != "block_sparse":
        raise ValueError(
            f"attn_implementation={implementation!r} needs a mask over all pairs of a slide's tokens: call "
            'model.set_attn_implementation("block_sparse").'
        )
    tissue = find_tissue(slide) if tissue is None else tissue
    present = tissue.token_grid(slide, model.config.patch_size, mpp)
    if not present.any():
        raise SlideError(f"{slide.path}: the tissue is smaller than half a patch token at {mpp} micrometres per pixel.")
    return present


@torch.no_grad()
def forward_strips(
    model: "SparsePathViTModel",
    strips: Iterable[torch.Tensor],
    present: np.ndarray,
    dense: bool,
    tiles: Tiles | None = None,
    attention: str | None = None,
    progress: str | None = None,
) -> Embedding:
    """The model on one image that arrives in strips.

    Args:
        model: in evaluation mode.
        strips: (1, channels, height, width) from the top down, each a whole number of patches high, of the width of
            the grid.
        present: (rows, columns) bool.
        dense: whether to return the features of the patch tokens.
        tiles: over which tiles to average them.
        attention: whether to return that of the global tokens; see `embed_regions`.
        progress: the title of a progress bar over the layers and their strips; `None` for no bar.
    """
    patch_mask = torch.from_numpy(present).to(model.device)
    grid = model.token_grid_of_image(patch_mask)
    with _progress_bar(model.config, grid, progress) as bar:
        encoded, outputs, listener = _encode(model, strips, grid, attention, bar.update)
    has_weights = model.config.leaves_representatives
    embedding = _embedding(outputs, 0, patch_mask, present.shape, dense, has_weights, tiles, may_overwrite=True)
    return _with_attention(embedding, encoded, listener, 0)


def _encode(
    model: "SparsePathViTModel",
    pixels: torch.Tensor | Iterable[torch.Tensor],
    grid: "TokenGrid",
    attention: str | None,
    on_tokens: Callable[[int], object] | None = None,
) -> tuple["EncoderOutput", "SparsePathViTModelOutput", GlobalAttention | None]:
    """The forward of the model, and what listened to it where attention is asked for."""
    listener = None if attention is None else GlobalAttention(model, attention)
    encoded = model.encode(pixels, grid, after_layer=listener, on_tokens=on_tokens)
    return encoded, model.finish(encoded, may_overwrite=True), listener


def _with_attention(
    embedding: Embedding, encoded: "EncoderOutput", listener: GlobalAttention | None, index: int
) -> Embedding:
    """`embedding` of image `index`, with the attention to its patch tokens where it was asked for."""
    if listener is None:
        return embedding
    positions, probabilities = (of_image.cpu().numpy() for of_image in listener.of_image(encoded, index))
    if len(positions) < len(embedding.patch_positions):  # tokens came back that the last layer has not seen
        columns = embedding.grid_size[1]
        shown, seen = (places[:, 0] * columns + places[:, 1] for places in (embedding.patch_positions, positions))
        everywhere = np.full((len(shown), *probabilities.shape[1:]), np.nan, dtype=np.float32)
        everywhere[np.searchsorted(shown, seen)] = probabilities
        probabilities = everywhere
    return replace(embedding, attention=probabilities)


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


def slide_strips(
    slide: Slide, present: np.ndarray, patch_size: int, mpp: float | None, token_rows: tuple[int, int] | None = None
) -> Iterator[np.ndarray]:
    """The pixels of a slide in strips from the top down, white where no token is present.

    Args:
        slide: the slide.
        present: (rows, columns) bool, the tokens of the whole slide.
        patch_size: pixels per token side.
        mpp: resolution.
        token_rows: (start, end) of those that are read; all where None.

    Yields:
        (token rows * patch_size, columns * patch_size, 3) uint8; the next strip is read meanwhile.
    """
    columns, (start, end) = present.shape[1], token_rows or (0, len(present))
    rows_per_strip = strip_rows(columns, patch_size)
    scale_x, scale_y = slide.scale(mpp)

    def read(first: int) -> np.ndarray:
        tokens = present[first : min(end, first + rows_per_strip)]
        strip = np.full((len(tokens) * patch_size, columns * patch_size, 3), 255, dtype=np.uint8)
        for run_start, run_end in _runs(tokens.any(axis=0)):
            left, width = run_start * patch_size, (run_end - run_start) * patch_size
            top = first * patch_size * scale_y
            strip[:, left : left + width] = slide.read_region(left * scale_x, top, width, len(strip), mpp, pad=True)
        return strip

    yield from read_ahead(read, range(start, end, rows_per_strip), workers=1)


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
    tiles: Tiles | None,
    may_overwrite: bool = False,
) -> Embedding:
    """One image of a batch; `patch_mask` is (canvas rows, canvas columns) bool, True where a token was present.

    With `may_overwrite` nobody needs the outputs afterwards, and features in float16 take their place.
    """
    positions = outputs.patch_positions[index]
    positions = positions[positions[:, 0] >= 0]  # images that keep fewer tokens are padded
    features, scores, weights, tile_features = None, None, None, None
    if has_weights:  # all are 1 where everything came back, or nothing was removed from this batch
        ones = torch.ones(len(positions), dtype=torch.int32)
        weights = ones if outputs.patch_weights is None else outputs.patch_weights[index, : len(positions)]
    if dense or tiles is not None:
        first = outputs.last_hidden_state.shape[1] - outputs.patch_positions.shape[1]
        features = outputs.last_hidden_state[index, first : first + len(positions)]  # (K, hidden_size)
    if tiles is not None:
        tile_features = pool_tiles(features, positions, weights, patch_mask[: grid_size[0], : grid_size[1]], tiles)
    if outputs.prune_scores is not None:
        scores = outputs.prune_scores[index].view(patch_mask.shape)[patch_mask].float().cpu().numpy()
    return Embedding(
        pooled=outputs.pooler_output[index].float().cpu().numpy(),
        patch_features=float16_rows(features, may_overwrite) if dense else None,
        patch_positions=positions.int().cpu().numpy(),
        patch_weights=None if weights is None else weights.int().cpu().numpy(),
        token_positions=patch_mask.nonzero().int().cpu().numpy(),
        prune_scores=scores,
        grid_size=tuple(grid_size),
        tiles=tile_features,
    )
