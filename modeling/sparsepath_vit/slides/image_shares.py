# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""How much of an image one of several processes holds, known before they start."""

import itertools
from typing import NamedTuple

import torch

from ..model.configuration_sparsepath_vit import SparsePathViTConfig
from ..model.streamed_layers import tokens_per_strip
from ..model.token_grid import TokenGrid
from ..model.token_shares import deal_rows
from ..model.token_strips import known_block_row_ends, strip_ranges_of_rows


class ImageShare(NamedTuple):
    """The share of one process in patch tokens.

    Attributes:
        held: its own and those around, which come from its neighbours.
        of_image: its own as a share of all tokens of the image.
        tokens_of_strip: own tokens of its largest strip.
        tokens_around_strip: tokens of that strip with those around.
    """

    held: int
    of_image: float
    tokens_of_strip: int
    tokens_around_strip: int


def largest_share(config: SparsePathViTConfig, grid: TokenGrid, processes: int, device: torch.device) -> ImageShare:
    """What the process with most tokens holds; with one process all of the image.

    Args:
        config: of the model.
        grid: of one image.
        processes: how many share it.
        device: on which they run.

    Raises:
        ValueError: they cannot share it.
    """
    row_ends = known_block_row_ends(grid, 0)
    _check(config, grid, processes, len(row_ends) - 1)
    most_tokens = tokens_per_strip(config, device, is_shared=processes > 1) or grid.num_tokens
    rows = max(
        itertools.pairwise(deal_rows(row_ends, processes)), key=lambda share: row_ends[share[1]] - row_ends[share[0]]
    )
    own = row_ends[rows[1]] - row_ends[rows[0]]
    first, last = max(0, rows[0] - grid.neighbor_radius), min(len(row_ends) - 1, rows[1] + grid.neighbor_radius)
    strips = strip_ranges_of_rows(grid, 0, row_ends, rows, most_tokens)
    return ImageShare(
        held=row_ends[last] - row_ends[first],
        of_image=own / grid.counts[0],
        tokens_of_strip=max(strip.own[1] - strip.own[0] for strip in strips),
        tokens_around_strip=max(strip.around[1] - strip.around[0] for strip in strips),
    )


def _check(config: SparsePathViTConfig, grid: TokenGrid, processes: int, block_rows: int) -> None:
    if processes < 1:
        raise ValueError(f"processes={processes} is not possible: it must be at least 1.")
    if processes == 1:
        return
    if processes > block_rows:
        raise ValueError(
            f"processes={processes} are more than the {block_rows} rows of blocks of the image: each needs at least "
            f"one. Start at most {block_rows}."
        )
    for name, value in (("num_context_tokens", grid.has_context), ("unprune", config.unprune)):
        if value:
            raise ValueError(f"processes={processes} cannot share an image with {name}={getattr(config, name)!r}.")
