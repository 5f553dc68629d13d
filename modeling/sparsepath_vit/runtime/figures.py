# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Pictures of the attention pattern and of what pruning kept, drawn with Pillow alone."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..model.attention_specification import attention_pattern
from ..model.token_grid import TokenGrid
from .atomic_files import atomic_path

BACKGROUND, UNSEEN, NEIGHBOURHOOD, OWN_BLOCK, QUERY, GLOBAL = (
    (255, 255, 255),
    (226, 229, 234),
    (142, 190, 232),
    (44, 111, 176),
    (214, 69, 65),
    (233, 163, 59),
)
INK = (40, 44, 52)


def save_image(image: Image.Image, path: Path) -> None:
    """Writes a PNG under a temporary name and renames it, so that no half-written picture is ever seen."""
    with atomic_path(path) as temporary:
        image.save(temporary, format="PNG")


def block_pattern_figure(
    *,
    grid_size: tuple[int, int] = (20, 20),
    window_size: int = 4,
    neighbor_radius: int = 1,
    num_global_tokens: int = 5,
    query: tuple[int, int] = (9, 10),
    kept_share: float = 0.4,
    seed: int = 0,
) -> Image.Image:
    """Which tokens a patch token sees: dense, block-local, and block-local after pruning.

    Drawn from the specification (`attention_pattern`), not from a sketch of it.

    Args:
        grid_size: (rows, columns) of the token grid.
        window_size: tokens per block side.
        neighbor_radius: blocks seen beyond the own.
        num_global_tokens: G.
        query: (row, column) of the patch token that asks.
        kept_share: share of tokens shown in the third panel.
        seed: of the pruned tokens, which are drawn at random here.
    """
    settings = {"num_global_tokens": num_global_tokens, "neighbor_radius": neighbor_radius}
    dense = TokenGrid.create([grid_size], window_size=None, **settings)
    local = TokenGrid.create([grid_size], window_size=window_size, **settings)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(local.rows), generator=generator)
    scores[(local.rows == query[0]) & (local.columns == query[1])] = 1.0
    kept = scores.topk(round(kept_share * len(scores))).indices.sort().values
    pruned = local.select(kept, [len(kept)])
    panels = [
        _pattern_panel(grid, query, title)
        for grid, title in (
            (dense, "dense: every token"),
            (local, f"block-local: w = {window_size}, r = {neighbor_radius}"),
            (pruned, f"and pruned: {kept_share:.0%} kept"),
        )
    ]
    gap = 28
    width = sum(panel.width for panel in panels) + gap * (len(panels) - 1)
    figure = Image.new("RGB", (width, panels[0].height), BACKGROUND)
    left = 0
    for panel in panels:
        figure.paste(panel, (left, 0))
        left += panel.width + gap
    return figure


def _pattern_panel(grid: TokenGrid, query: tuple[int, int], title: str, cell: int = 14) -> Image.Image:
    """One token grid: the query, what it sees, and the global tokens above."""
    rows, columns = grid.grid_sizes[0]
    index = int(((grid.rows == query[0]) & (grid.columns == query[1])).nonzero()[0])
    seen = attention_pattern(grid)[0, grid.num_global_tokens + index]
    num_seen = int(seen.sum())
    top = 3 * cell + 10
    panel = Image.new("RGB", (columns * cell + 1, top + rows * cell + 22), BACKGROUND)
    draw = ImageDraw.Draw(panel)
    draw.text((0, 0), title, fill=INK, font_size=14)
    for position in range(grid.num_global_tokens):
        _draw_cell(draw, position * cell, top - cell - 6, cell, GLOBAL)
    draw.text((grid.num_global_tokens * cell + 6, top - cell - 7), "global tokens", fill=INK, font_size=12)
    own_block = grid.blocks[index]
    patches = zip(grid.rows.tolist(), grid.columns.tolist(), grid.blocks, seen[grid.num_global_tokens :], strict=True)
    for row, column, block, is_seen in patches:
        color = UNSEEN if not is_seen else OWN_BLOCK if block == own_block else NEIGHBOURHOOD
        color = QUERY if (row, column) == query else color
        _draw_cell(draw, column * cell, top + row * cell, cell, color)
    draw.text((0, top + rows * cell + 4), f"{num_seen} of {grid.num_tokens} tokens seen", fill=INK, font_size=12)
    return panel


def _draw_cell(draw: ImageDraw.ImageDraw, left: int, top: int, cell: int, color: tuple[int, int, int]) -> None:
    draw.rectangle((left + 1, top + 1, left + cell - 1, top + cell - 1), fill=color)


def prune_map_figure(
    image: Image.Image,
    prune_scores: torch.Tensor,
    patch_positions: torch.Tensor,
    grid_size: Sequence[int],
    *,
    max_side: int = 1024,
) -> Image.Image:
    """The image, its prune scores, and the tokens that were kept, side by side.

    Args:
        image: RGB, as the processor saw it.
        prune_scores: (rows * columns,) of one image; the colour follows the rank, since a few tokens take most of the
            attention.
        patch_positions: (K, 2) row and column of the kept tokens.
        grid_size: (rows, columns) of the token grid.
        max_side: pixels of each panel's longer side.
    """
    rows, columns = (int(side) for side in grid_size)
    scale = max_side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    tissue = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    ranks = prune_scores.argsort().argsort().float().view(rows, columns) / max(1, rows * columns - 1)
    heat = color_overlay(tissue, heat_colors(ranks.numpy()), 0.55)
    kept = np.zeros((rows, columns), dtype=bool)
    positions = patch_positions[patch_positions[:, 0] >= 0].numpy()
    kept[positions[:, 0], positions[:, 1]] = True
    white = np.full((rows, columns, 3), 255, dtype=np.uint8)
    panels = [tissue, heat, color_overlay(tissue, white, 0.82 * ~kept)]
    gap = 12
    figure = Image.new("RGB", (3 * size[0] + 2 * gap, size[1] + 24), BACKGROUND)
    titles = ("region", "prune score (rank)", f"kept: {len(positions):,} of {rows * columns:,} tokens")
    draw = ImageDraw.Draw(figure)
    for number, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        left = number * (size[0] + gap)
        figure.paste(panel, (left, 24))
        draw.text((left, 3), title, fill=INK, font_size=15)
    return figure


def color_overlay(
    image: Image.Image,
    colors: np.ndarray,
    opacity: np.ndarray | float,
    box: tuple[int, int, int, int] | None = None,
) -> Image.Image:
    """An image with colours over it, one per token or per pixel.

    Args:
        image: RGB.
        colors: (rows, columns, 3) uint8.
        opacity: in [0, 1], of all or (rows, columns) of each.
        box: (left, top, width, height) of the colours in pixels of the image; all of it by default. What lies beyond
            the image is cut off. Colours are not smoothed where they are enlarged, and averaged where they are reduced.
    """
    left, top, width, height = box or (0, 0, *image.size)
    rows, columns = colors.shape[:2]
    alpha = np.broadcast_to(np.rint(255 * np.asarray(opacity)).astype(np.uint8), (rows, columns))
    resampling = Image.Resampling.NEAREST if width >= columns and height >= rows else Image.Resampling.BOX
    stretched = Image.fromarray(np.dstack([colors, alpha])).resize((width, height), resampling)
    layer = Image.new("RGBA", image.size)
    layer.paste(stretched, (left, top))
    return Image.alpha_composite(image.convert("RGBA"), layer).convert("RGB")


def heat_colors(values: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1] as colours from dark violet over red to yellow: (...) -> (..., 3) uint8."""
    stops = np.array([[0.10, 0.04, 0.30], [0.55, 0.12, 0.47], [0.90, 0.36, 0.28], [0.99, 0.92, 0.55]])
    positions = np.linspace(0.0, 1.0, len(stops))
    channels = [np.interp(values, positions, stops[:, channel]) for channel in range(3)]
    return (np.stack(channels, axis=-1) * 255).astype(np.uint8)
