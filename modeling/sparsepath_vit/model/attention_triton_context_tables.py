# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What the kernel needs to know of a grid where there are context tokens, and where those of a layer are."""

from typing import NamedTuple

import torch

from .token_grid import TokenGrid, per_image

# Columns of `ContextTables.entries`.
ENTRY_COLUMNS = ("start", "end", "image", "row", "column", "rows", "columns")
# The queries that context tokens are shown in the backward at a time; they are of one block.
QUERIES_PER_STEP = 32
# Slots are a multiple of this.
CONTEXT_SLOTS = 64


class ContextTables(NamedTuple):
    """Tables of a grid, int32; entries are those of `TokenGrid.block_offsets`: blocks, and empty ends of block rows.

    Attributes:
        entries: (entries, columns) packed index of the first token and of the end, image, block row and column, and the
            image's block rows and columns.
        tile_entries: (tiles,) the entry of each tile of `AttentionTiles`.
        entry_offsets: (images + 1,) where each image's entries start, and the end.
        steps: (steps, 3) first query, end and entry of the pieces of blocks, those of an image in a row.
        step_bounds: (images, 2) first step of each image and the end of those that hold queries.
    """

    entries: torch.Tensor
    tile_entries: torch.Tensor
    entry_offsets: torch.Tensor
    steps: torch.Tensor
    step_bounds: torch.Tensor


def context_tables(entries: torch.Tensor, tile_entries: torch.Tensor, grid: TokenGrid) -> ContextTables:
    """The tables of a grid; nothing waits for the device.

    Args:
        entries: as in `ContextTables`, int64.
        tile_entries: as there, int64.
        grid: where the tokens are.
    """
    numbers = [rows * (columns + 1) for rows, columns in grid.block_counts]
    steps_of_a_block = -(-(grid.window_size**2) // QUERIES_PER_STEP)
    first = torch.arange(0, steps_of_a_block * QUERIES_PER_STEP, QUERIES_PER_STEP, device=grid.device)
    start = torch.minimum(entries[:, 0, None] + first, entries[:, 1, None])  # (entries, steps of a block)
    end = torch.minimum(start + QUERIES_PER_STEP, entries[:, 1, None])
    entry = torch.arange(len(entries), device=grid.device)[:, None].expand_as(start)
    steps = torch.stack([start, end, entry], dim=2).flatten(0, 1)
    # Of each image first the steps that hold queries: those of image i have the number 2 i, the empty ones 2 i + 1.
    kind = 2 * entries[:, 2].repeat_interleave(steps_of_a_block) + (steps[:, 0] >= steps[:, 1])
    kind, order = torch.sort(kind, stable=True)
    images = torch.arange(grid.batch_size, device=grid.device)
    bounds = torch.searchsorted(kind, torch.stack([2 * images, 2 * images + 1], dim=1))
    entry_offsets = per_image([sum(numbers[:image]) for image in range(len(numbers) + 1)], grid.device)
    tables = (entries, tile_entries, entry_offsets, steps[order], bounds)
    return ContextTables(*(table.to(torch.int32).contiguous() for table in tables))


def context_starts(counts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """(images + 1,) int64 where each image's context tokens start in their list, and the end."""
    if all(count == counts[0] for count in counts):
        return torch.arange(0, len(counts) * counts[0] + 1, counts[0], device=device)
    return per_image([sum(counts[:image]) for image in range(len(counts) + 1)], device)


def slots_of_images(counts: tuple[int, ...]) -> int:
    """How many slots each image has for its context tokens."""
    return -(-max(counts) // CONTEXT_SLOTS) * CONTEXT_SLOTS
