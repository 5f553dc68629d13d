# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Token pruning: score, keep, select, and bring back. The only place where tokens disappear and where they return.

The prune score of a patch token is the attention it receives from the global tokens (arXiv 2601.12150): the tokens with
the lowest score are removed once, after an early layer. What is removed may leave representatives: of each cell of the
grid one removed token stays, with the weight of all that were removed there.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers.utils.generic import maybe_autocast

from .processes import Range, common
from .prune_score_operator import has_prune_score_kernel, kernel_prune_scores
from .stratified_sampling import middle_of_cells
from .token_grid import TokenGrid
from .token_shares import TokenShare, deal_rows_anew, share_of
from .token_strips import known_block_row_ends


class Pruning(NamedTuple):
    """What one pruning step did, and what it takes to bring the removed tokens back.

    Attributes:
        grid: where the T patch tokens before pruning were.
        scores: (T,) float32, by which they were ranked.
        kept: (K,) int64, which of them are left, representatives among them; ascending.
        hidden_states: (*grid.batch_shape, features) the tokens before pruning; `None` where nobody wants them back,
            since at 60,000 tokens they would be a sizeable part of the peak memory.
    """

    grid: TokenGrid
    scores: torch.Tensor
    kept: torch.Tensor
    hidden_states: torch.Tensor | None

    def score_map(self) -> torch.Tensor:
        """(batch, rows * columns) float32 scores on the grid all images fit in, 0 where no token was present."""
        rows, columns = self.grid.canvas_size
        scores = self.scores.new_zeros(self.grid.batch_size * rows * columns)
        return scores.index_put((self.grid.canvas_indices(),), self.scores).view(self.grid.batch_size, -1)


class EncodedTokens(NamedTuple):
    """The tokens at one depth of the network.

    Attributes:
        hidden_states: (*grid.batch_shape, features), in the grid's order.
        grid: where they are.
        pruning: the step that removed the others; `None` before it, and where nothing is pruned.
    """

    hidden_states: torch.Tensor
    grid: TokenGrid
    pruning: Pruning | None = None

    def with_removed(self) -> list[tuple[torch.Tensor, TokenGrid]]:
        """These tokens and their grid; before them, where they were kept, those that pruning started from."""
        own = [(self.hidden_states, self.grid)]
        if self.pruning is None or self.pruning.hidden_states is None:
            return own
        return [(self.pruning.hidden_states.to(own[0][0].device), self.pruning.grid.to(own[0][0].device)), *own]

    def apply(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "EncodedTokens":
        """A function of each token, such as a norm or a projection, applied to these and to those pruning removed."""
        pruning = self.pruning
        if pruning is not None and pruning.hidden_states is not None:
            pruning = pruning._replace(hidden_states=function(pruning.hidden_states))
        return EncodedTokens(function(self.hidden_states), self.grid, pruning)

    def to_map(self) -> torch.Tensor:
        """The patch tokens where they belong, removed ones with the features they were removed with.

        Returns:
            (batch, features, rows, columns) on the grid all images fit in; zero at places that were never present, and
            at removed ones where the tokens before pruning were not kept.
        """
        layered: torch.Tensor | float = 0.0
        for hidden_states, grid in self.with_removed():
            layered = scatter_to_map(hidden_states, grid, layered)
        return layered

    def restored(self) -> "EncodedTokens":
        """All tokens there were before pruning: see `restore_tokens`.

        Raises:
            ValueError: pruning did not keep what it removed.
        """
        if self.pruning is None:
            return self
        if self.pruning.hidden_states is None:
            raise ValueError(
                "The removed tokens were not kept, so they cannot come back: set config.unprune='scatter' before "
                "encoding."
            )
        (all_tokens, grid), (tokens, _) = self.with_removed()
        kept = self.pruning.kept.to(tokens.device)
        return EncodedTokens(restore_tokens(tokens, all_tokens, grid, kept), grid)


def prune(
    tokens: EncodedTokens,
    scores: torch.Tensor,
    prune_ratio: float,
    keeps_removed: bool,
    num_representatives: int = 0,
) -> EncodedTokens:
    """Removes the patch tokens with the lowest scores.

    Args:
        tokens: those there are.
        scores: (T,) of their patch tokens.
        prune_ratio: share of each image's present patch tokens that is removed.
        keeps_removed: whether `EncodedTokens.restored` and `to_map` are to bring them back.
        num_representatives: at most how many removed tokens of each image stay for the others.

    Returns:
        The global tokens and the kept patch tokens, representatives among them at their places.
    """
    whole = tokens.grid.whole if isinstance(tokens.grid, TokenShare) else tokens.grid
    kept, counts = kept_tokens(scores, whole, prune_ratio)
    if num_representatives and counts != whole.counts:
        kept, kept_grid = with_representatives(kept, whole, num_representatives)
    else:
        kept_grid = whole.select(kept, counts)
    pruning = Pruning(whole, scores, kept, tokens.hidden_states if keeps_removed else None)
    if whole is not tokens.grid:
        return EncodedTokens(*_select_share(tokens.hidden_states, tokens.grid, kept, kept_grid), pruning)
    return EncodedTokens(select_tokens(tokens.hidden_states, whole, kept, kept_grid), kept_grid, pruning)


def _select_share(
    hidden_states: torch.Tensor, share: TokenShare, kept: torch.Tensor, kept_grid: TokenGrid
) -> tuple[torch.Tensor, TokenShare]:
    """`select_tokens` where several processes share an image: the tokens and the grid of this one.

    Where the kept tokens lie unevenly the block rows are dealt anew, and tokens move to other processes.
    """
    packed, num_globals = hidden_states[0], share.num_global_tokens
    row_ends = known_block_row_ends(kept_grid, 0)
    kept_share = share_of(kept_grid, share.processes, row_ends, deal_rows_anew(row_ends, share.first_rows))
    selected = packed.new_empty(kept_share.num_tokens, packed.shape[1])
    selected[:num_globals] = packed[:num_globals]
    # What each process has of the kept tokens, before any move.
    before = [(row_ends[first], row_ends[end]) for first, end in itertools.pairwise(share.first_rows)]

    def indices(tokens: Range) -> torch.Tensor:
        return kept[slice(*tokens)] + share.places((0, 0)).start

    def places(tokens: Range) -> torch.Tensor:
        return selected[kept_share.places(tokens)]

    if stay := common(before[share.processes.rank], kept_share.owned[share.processes.rank]):
        torch.index_select(packed, 0, indices(stay), out=places(stay))
    share.processes.exchange(before, kept_share.owned, lambda tokens: packed[indices(tokens)], places)
    return selected[None], kept_share


@torch.no_grad()
def prune_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: TokenGrid,
    *,
    scale: float,
    kind: str = "attention",
    logsumexp: torch.Tensor | None = None,
) -> torch.Tensor:
    """How much the global tokens attend to each patch token.

    The softmax runs in float32 over all keys of a global query, global tokens included; a key that stands for several
    patch tokens counts as often, and receives the attention of them all.

    Args:
        query, key, value: (batch, heads, tokens, head_dim) with (batch, tokens) = `grid.batch_shape`.
        grid: where the tokens are.
        scale: factor on the logits.
        kind: "attention" averages over heads and all global queries, "cls_attention" over heads of the CLS query only,
            "attention_value" averages probability times the norm of the value.
        logsumexp: of the logits of all queries, see `attention_with_logsumexp`; with it the kernel can run. `None`
            where attention left none.

    Returns:
        (T,) float32, in the grid's order.
    """
    if logsumexp is not None and grid.weights is None and has_prune_score_kernel(query, grid, kind):
        return kernel_prune_scores(query, key, value, logsumexp, grid, scale, kind)
    heads, head_dim = query.shape[1], query.shape[3]
    packed = query.transpose(1, 2).reshape(-1, heads, head_dim)
    queries = packed[grid.global_indices()].view(grid.batch_size, -1, heads, head_dim).transpose(1, 2)
    return attention_received(queries[:, :, :1] if kind == "cls_attention" else queries, key, value, grid, scale, kind)


@torch.no_grad()
def attention_received(
    queries: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: TokenGrid,
    scale: float,
    kind: str = "attention",
) -> torch.Tensor:
    """How much some queries attend to each patch token of their image; what `prune_scores` does for global queries.

    Args:
        queries: (images, heads, queries, head_dim), each of which sees all tokens of its image.
        key, value: (batch, heads, tokens, head_dim) with (batch, tokens) = `grid.batch_shape`.
        grid: where the tokens are.
        scale: factor on the logits.
        kind: "attention_value" multiplies with the norm of the value, all others average probabilities.

    Returns:
        (T,) float32, in the grid's order.
    """
    # Autocast would compute the logits in its lower precision.
    with maybe_autocast(key.device.type, enabled=False):
        bias = _log_weights(grid)  # (batch, tokens), or None
        if grid.is_uniform:
            return _image_scores(queries, key, value, bias, scale, kind)[:, grid.num_global_tokens :].reshape(-1)
        scores = []
        for image, (start, end) in enumerate(zip(grid.image_offsets[:-1], grid.image_offsets[1:], strict=True)):
            states = (states[:, :, start:end] for states in (key, value))
            image_bias = None if bias is None else bias[:, start:end]
            received = _image_scores(queries[image : image + 1], *states, image_bias, scale, kind)
            scores.append(received[:, grid.num_global_tokens :])
        return torch.cat(scores, dim=1).reshape(-1)


def _log_weights(grid: TokenGrid) -> torch.Tensor | None:
    """(batch, tokens) float32 logarithms of what each token stands for; `None` where that is itself."""
    if grid.weights is None:
        return None
    packed = torch.zeros(grid.num_tokens, dtype=torch.float32, device=grid.device)
    return packed.index_put((grid.patch_indices(),), grid.weights.float().log()).view(grid.batch_shape)


def _image_scores(
    queries: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    kind: str,
) -> torch.Tensor:
    """Scores of all tokens of images with equally many: (batch, heads, tokens, head_dim) -> (batch, tokens).

    `bias` is (batch, tokens), added to the logits of each key.
    """
    batch, heads, tokens, _ = key.shape
    scores = torch.zeros(batch, tokens, dtype=torch.float32, device=key.device)
    for head in range(heads):  # one head at a time: a float32 copy of all keys of a whole slide would not fit
        logits = queries[:, head].float() @ key[:, head].float().transpose(1, 2) * scale
        if bias is not None:
            logits = logits + bias[:, None, :]
        received = logits.softmax(dim=-1).mean(dim=1)  # (batch, tokens)
        if kind == "attention_value":
            received = received * value[:, head].float().norm(dim=-1)
        scores += received
    return scores / heads


def num_kept(num_present: int, prune_ratio: float) -> int:
    """K = N - floor(p N): how many of N present patch tokens stay."""
    return num_present - math.floor(prune_ratio * num_present)


def kept_tokens(scores: torch.Tensor, grid: TokenGrid, prune_ratio: float) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The patch tokens with the highest scores of each image; equal scores go to the lower raster index.

    Args:
        scores: (T,) in the grid's order.
        grid: where the tokens are.
        prune_ratio: share of each image's present patch tokens that is removed.

    Returns:
        Indices into the T patch tokens, ascending, and how many of them belong to each image: what
        `TokenGrid.select` takes.
    """
    counts = tuple(num_kept(count, prune_ratio) for count in grid.counts)
    raster_order = grid.raster_order()
    if grid.is_uniform:
        images = [(raster_order.view(grid.batch_size, -1), counts[0])]
    else:
        images = [(order[None], count) for order, count in zip(raster_order.split(grid.counts), counts, strict=True)]
    kept = []
    for order, count in images:  # order: (batch, patch tokens)
        ranking = torch.sort(scores[order], dim=1, descending=True, stable=True).indices
        kept.append(order.gather(1, ranking[:, :count]).sort(dim=1).values.reshape(-1))
    return torch.cat(kept), counts


def with_representatives(
    kept: torch.Tensor, grid: TokenGrid, num_representatives: int
) -> tuple[torch.Tensor, TokenGrid]:
    """Adds to the kept patch tokens one removed token of each cell that lost some.

    It is the one nearest to the middle of all that were removed in its cell, and has the weight of them all. How many
    there are is read from the device: one wait.

    Args:
        kept: what `kept_tokens` returned.
        grid: where the tokens are.
        num_representatives: at most how many of each image there are.

    Returns:
        Indices into the T patch tokens, ascending, and the grid of these tokens.
    """
    cells, num_cells = grid.cells(num_representatives)
    weights = torch.ones_like(cells) if grid.weights is None else grid.weights
    removed_weights = weights.index_fill(0, kept, 0)
    middle = middle_of_cells(cells, sum(num_cells), grid.rows, grid.columns, removed_weights)
    # (T + 1,): cells that lost nothing have a last token that there is not.
    new_weights = torch.cat([weights - removed_weights, weights.new_zeros(1)])
    new_weights = new_weights.scatter(0, middle.tokens, middle.weights)[:-1]
    is_left = new_weights > 0
    counts = torch.stack([image.sum() for image in is_left.split(grid.counts)]).tolist()
    left = is_left.nonzero()[:, 0]
    # Where all are left each stands for what it stood for.
    return left, grid.select(left, counts, None if len(left) == len(cells) else new_weights[left])


def select_tokens(tokens: torch.Tensor, grid: TokenGrid, kept: torch.Tensor, kept_grid: TokenGrid) -> torch.Tensor:
    """Takes the global tokens and the kept patch tokens.

    Args:
        tokens: (*grid.batch_shape, features).
        grid: where they are.
        kept: indices into the patch tokens, ascending.
        kept_grid: `grid.select` of it.

    Returns:
        (*kept_grid.batch_shape, features).
    """
    indices = _packed_indices(grid, kept)
    return tokens.reshape(grid.num_tokens, -1)[indices].view(*kept_grid.batch_shape, -1)


def restore_tokens(tokens: torch.Tensor, all_tokens: torch.Tensor, grid: TokenGrid, kept: torch.Tensor) -> torch.Tensor:
    """Puts the kept tokens back among the removed ones, which have the features they were removed with.

    The inverse of `select_tokens`. The result mixes depths: the kept tokens went through all layers, the removed ones
    only through those before the pruning.

    Args:
        tokens: the global tokens and the kept patch tokens, (*kept grid.batch_shape, features).
        all_tokens: the tokens before pruning, (*grid.batch_shape, features).
        grid: where the tokens before pruning are.
        kept: indices into their patch tokens, ascending.

    Returns:
        (*grid.batch_shape, features).
    """
    features = tokens.shape[-1]
    packed = all_tokens.reshape(grid.num_tokens, features)
    restored = packed.index_copy(0, _packed_indices(grid, kept), tokens.reshape(-1, features))
    return restored.view(*grid.batch_shape, features)


def _packed_indices(grid: TokenGrid, kept: torch.Tensor) -> torch.Tensor:
    """Where the global tokens and the kept patch tokens lie among the packed tokens, ascending."""
    # Packed order is ascending within and across images, so sorting puts each image's global tokens first again.
    return torch.cat([grid.global_indices(), grid.patch_indices()[kept]]).sort().values


def scatter_to_map(tokens: torch.Tensor, grid: TokenGrid, base: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Puts patch tokens back where they belong.

    Args:
        tokens: (*grid.batch_shape, features).
        grid: where the tokens are.
        base: what lies at all other places: a number, or a (batch, features, rows, columns) map, for example of the
            tokens before pruning.

    Returns:
        (batch, features, rows, columns) on the grid's canvas.
    """
    rows, columns = grid.canvas_size
    shape = (grid.batch_size, rows, columns, tokens.shape[-1])
    if isinstance(base, torch.Tensor):
        canvas = base.permute(0, 2, 3, 1).reshape(-1, shape[-1])
    else:
        canvas = tokens.new_full((math.prod(shape[:-1]), shape[-1]), base)
    patch_tokens = tokens.reshape(grid.num_tokens, -1)[grid.patch_indices()]
    return canvas.index_put((grid.canvas_indices(),), patch_tokens).view(shape).permute(0, 3, 1, 2)
