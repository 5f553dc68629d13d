# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The correction of stratified attention by the mean query: a control variate.

All queries of a block look at the same sample of their image, so most of their error is common to them. It is measured
on a query for which the truth is affordable: the mean query of the image attends to all tokens, and once more to
exactly the keys that a block sees. The difference is added to what the block's queries attend to.
"""

from collections.abc import Callable

import torch

from .token_grid import TokenGrid


def mean_queries(query: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """The mean of an image's patch queries, each counted as often as the patch tokens it stands for.

    Args:
        query: (M, heads, head_dim) packed tokens.
        grid: where the tokens are.

    Returns:
        (images, heads, head_dim) in the dtype of `query`, summed in at least float32.
    """
    dtype, means, start = torch.promote_types(query.dtype, torch.float32), [], 0
    for image, count in enumerate(grid.counts):
        first = grid.image_offsets[image] + grid.num_global_tokens
        queries = query[first : first + count]
        if grid.weights is None:
            means.append(queries.mean(dim=0, dtype=dtype))
        else:
            weights = grid.weights[start : start + count].to(dtype)
            shares = (weights / weights.sum())[:, None, None]
            means.append((queries * shares).sum(dim=0, dtype=dtype))
        start += count
    return torch.stack(means).to(query.dtype)


def add_correction(
    attended: torch.Tensor, query: torch.Tensor, grid: TokenGrid, attend: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Corrects what any implementation of attention gave, by asking it once more with the mean query everywhere.

    At a patch token it then says what the mean query gets from the keys that are seen there, at a global token what it
    gets from all. At global tokens, and where all keys are seen, nothing changes.

    Args:
        attended: (batch, heads, tokens, head_dim), what `attend(query)` gave.
        query: (batch, heads, tokens, head_dim).
        grid: where the tokens are.
        attend: attention of queries to the keys and values of the layer, by the pattern of the grid.
    """
    heads, head_dim = query.shape[1], query.shape[3]

    def packed(states: torch.Tensor) -> torch.Tensor:  # -> (M, heads, head_dim)
        return states.transpose(1, 2).reshape(-1, heads, head_dim)

    images = grid.images_of_tokens()
    everywhere = mean_queries(packed(query), grid)[images]
    of_mean = packed(attend(everywhere.view(*grid.batch_shape, heads, head_dim).transpose(1, 2)))
    of_all = of_mean[grid.global_indices()[:: grid.num_global_tokens]][images]  # what CLS's place says
    return attended + (of_all - of_mean).view(*grid.batch_shape, heads, head_dim).transpose(1, 2)
