# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What the kernel needs to know of a grid and of a layer where there are context tokens; tensors of a grid are int32.

The context tokens of each image are laid out in the same number of slots, a multiple of what a kernel takes at a time,
so that no step of a loop needs a bound: slots without a token count for nothing.
"""

from typing import NamedTuple

import torch

from .attention_backend import LayerContext
from .token_grid import TokenGrid, per_image

# Columns of `ContextTables.entries`.
ENTRY_COLUMNS = ("start", "end", "image", "row", "column", "rows", "columns")
# The queries that context tokens are shown in the backward at a time; they are of one block.
QUERIES_PER_STEP = 32
# Slots are a multiple of this.
CONTEXT_SLOTS = 64


class ContextTables(NamedTuple):
    """Of a grid, an entry for each of `TokenGrid.block_offsets`: a block, or the end of a block row, which is empty.

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


class ContextSlots(NamedTuple):
    """The context tokens of a layer, (images, slots) int32 each.

    Attributes:
        tokens: packed token indices; a slot without a token has some token of its image.
        weights: how many patch tokens each stands for; 0 in a slot without one.
        block_rows, block_columns: the block it lies in.
        lengths: (images,) int32, how many slots of each image are worth a look, a multiple of `CONTEXT_SLOTS`.
    """

    tokens: torch.Tensor
    weights: torch.Tensor
    block_rows: torch.Tensor
    block_columns: torch.Tensor
    lengths: torch.Tensor


def context_slots(context: LayerContext, image_offsets: torch.Tensor) -> ContextSlots:
    """The context tokens of a layer in their slots.

    Args:
        context: of the layer.
        image_offsets: (images + 1,) packed index of each image's first global token.
    """
    lengths = [-(-count // CONTEXT_SLOTS) * CONTEXT_SLOTS for count in context.counts]
    listed = torch.stack([context.tokens, context.weights, context.block_rows, context.block_columns])
    parts = listed.split(list(context.counts), dim=1)
    padded = [torch.nn.functional.pad(part, (0, max(lengths) - part.shape[1])) for part in parts]
    tokens, *others = torch.stack(padded, dim=1)  # (images, slots) each
    # Of another image's token not even an infinity may be read.
    tokens = torch.where(others[0] > 0, tokens, image_offsets[:-1, None])
    tables = (tokens, *others, per_image(lengths, tokens.device))
    return ContextSlots(*(table.to(torch.int32).contiguous() for table in tables))
