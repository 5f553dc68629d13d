# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Ways to choose, of each cell, the one token that stands for all of it: candidates for the library's definition."""

import math
from dataclasses import dataclass

import torch

_BUSY_SHARE = 0.2  # of the area in cells of half the side: with the rest in cells of twice the side, as many cells


@dataclass(frozen=True)
class Tokens:
    """The present patch tokens of one image, in raster order.

    Attributes:
        rows, columns: (T,) int64, places in the grid.
        grid_size: (rows, columns) of the whole grid.
        weights: (T,) float64, how many patch tokens each stands for; 1 before pruning.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    grid_size: tuple[int, int]
    weights: torch.Tensor

    @classmethod
    def full(cls, grid_size: tuple[int, int]) -> "Tokens":
        """A token at each place."""
        rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid_size), indexing="ij")
        return cls(rows.flatten(), columns.flatten(), grid_size, torch.ones(rows.numel(), dtype=torch.float64))

    def select(self, indices: torch.Tensor, weights: torch.Tensor) -> "Tokens":
        """Some of them, ascending, with new weights."""
        return Tokens(self.rows[indices], self.columns[indices], self.grid_size, weights)

    @property
    def places(self) -> torch.Tensor:
        """(T,) indices into the whole grid."""
        return self.rows * self.grid_size[1] + self.columns

    def cells(self, side: int, width: int | None = None) -> torch.Tensor:
        """(T,) the cell of each token, for cells of `side` x `side`, or of `side` x `width`."""
        width = width or side
        return (self.rows // side) * -(-self.grid_size[1] // width) + self.columns // width


@dataclass(frozen=True)
class LayerState:
    """What a rule may look at in a layer.

    Attributes:
        layer: counted from 0.
        mass: (T,) attention of the global queries here, mean over heads.
        mass_before: likewise in the layer before; None in the first.
        key: (heads, T, head_dim).
        value: (heads, T, head_dim).
        mass_of_mean: (T,) attention of the image's mean query, mean over heads; None where no rule asks for it.
    """

    layer: int
    mass: torch.Tensor
    mass_before: torch.Tensor | None
    key: torch.Tensor
    value: torch.Tensor
    mass_of_mean: torch.Tensor | None = None

    def mass_by(self, mass_of: str) -> torch.Tensor | None:
        """(T,) what a rule calls attention mass, see `DrawRule.mass_of`."""
        if mass_of == "with mean query":
            return (self.mass + self.mass_of_mean) / 2
        return self.mass if mass_of == "own" else self.mass_before


@dataclass(frozen=True)
class Drawn:
    """The context tokens of a layer.

    Attributes:
        tokens: (M,) indices into the patch tokens.
        log_weights: (M,) float32, added to their logits.
        value: (heads, M, head_dim), where it is not the tokens' own.
    """

    tokens: torch.Tensor
    log_weights: torch.Tensor
    value: torch.Tensor | None = None


@dataclass(frozen=True)
class DrawRule:
    """One way to choose context tokens.

    Attributes:
        place: "random" (each token of a cell by its weight), "fixed" (the one nearest the cell's middle), "paired"
            (random, but the cells of each s x s group of cells of s x s tokens take all places once).
        layers: "same" draw in all layers, or "anew" in each.
        exact: tokens of the largest attention mass that stand for themselves, while the others are sampled.
        mass_of: from CLS in the "own" layer, or the "previous" one (then the first layer has none); "with mean query",
            the mean of that from CLS and from the image's mean query.
        importance: share of a token's chance in its cell that goes by attention mass instead of by weight.
        busy: whether the fifth of the area where keys vary most has cells of half the side, the rest of twice the side.
        wide: whether cells may be wider than high, where the bound leaves room for twice as many as square ones.
        mean_values: whether a drawn key carries the mean value of its cell.
        nests: whether the side of cells divides that of blocks or is a multiple of it.
        references: most regions of blocks whose mean query corrects what its blocks have in common; 0 for none.
    """

    place: str = "random"
    layers: str = "same"
    exact: int = 0
    mass_of: str = "own"
    importance: float = 0.0
    busy: bool = False
    wide: bool = False
    mean_values: bool = False
    nests: bool = True
    references: int = 0


def cell_side(grid_size: tuple[int, int], num_samples: int, window: int) -> int:
    """The smallest side that gives at most `num_samples` cells and nests with the blocks."""
    side = 1
    while num_cells(grid_size, side) > num_samples or (window % side and side % window):
        side += 1
    return side


def wide_cell(grid_size: tuple[int, int], num_samples: int, window: int) -> tuple[int, int]:
    """(rows, columns) of the smallest cell that nests with the blocks and is square, or one size wider than high."""
    width = cell_side(grid_size, num_samples, window)
    smaller = [side for side in range(1, width) if not (window % side and side % window)]
    height = smaller[-1] if smaller else width
    fits = -(-grid_size[0] // height) * -(-grid_size[1] // width) <= num_samples
    return (height if fits else width), width


def region_side(grid_size: tuple[int, int], num_regions: int, window: int) -> int:
    """The smallest multiple of the window that gives at most `num_regions` regions."""
    side = window
    while num_cells(grid_size, side) > num_regions:
        side += window
    return side


def num_cells(grid_size: tuple[int, int], side: int) -> int:
    """Cells that cover a grid."""
    return math.prod(-(-length // side) for length in grid_size)


def sum_by(groups: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """(T,) for each token the sum of the values of its group."""
    return torch.zeros(int(groups.max()) + 1, dtype=values.dtype).scatter_add(0, groups, values)[groups]


def random_numbers(tokens: Tokens, seed: int) -> torch.Tensor:
    """(T,) float64 in (0, 1), by place."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(math.prod(tokens.grid_size), generator=generator, dtype=torch.float64)[tokens.places]


def first_of_cells(cells: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Of each cell the token with the lowest number, ascending; of equal ones the first."""
    ranking = order.argsort(stable=True)
    ranking = ranking[cells[ranking].argsort(stable=True)]  # by cell, then by number
    is_first = torch.ones(len(ranking), dtype=torch.bool)
    is_first[1:] = cells[ranking][1:] != cells[ranking][:-1]
    return ranking[is_first].sort().values


def draw(tokens: Tokens, state: LayerState, rule: DrawRule, num_samples: int, window: int, seed: int) -> Drawn:
    """The context tokens of a layer.

    Args:
        tokens: the present patch tokens.
        state: the layer.
        rule: how they are chosen.
        num_samples: upper bound of tokens, those that stand for themselves included.
        window: tokens per block side.
        seed: of the draw.
    """
    mass = state.mass_by(rule.mass_of)
    num_exact = rule.exact if mass is not None else 0
    side = cell_side(tokens.grid_size, num_samples - rule.exact, window if rule.nests else 1)
    is_sampled = torch.ones(len(tokens.rows), dtype=torch.bool)
    if num_exact:
        is_sampled[mass.topk(min(num_exact, len(is_sampled))).indices] = False
    sampled, exact = is_sampled.nonzero()[:, 0], (~is_sampled).nonzero()[:, 0]
    cells = _busy_cells(tokens, state, side) if rule.busy else tokens.cells(side)
    if rule.wide:
        cells = tokens.cells(*wide_cell(tokens.grid_size, num_samples - rule.exact, window))
    cells = cells[sampled]
    chances = _chances(tokens, mass, rule, sampled, cells)
    seed = seed + 7919 * (state.layer + 1) if rule.layers == "anew" else seed
    chosen = first_of_cells(cells, _order(tokens, rule, side, seed, sampled, chances))
    weights = tokens.weights[sampled]
    log_weights = (weights / chances)[chosen].log()
    if rule.place != "random":  # no chance is known: it stands for the weight of its cell
        log_weights = sum_by(cells, weights)[chosen].log()
    chosen_tokens = sampled[chosen]
    value = _mean_values(state.value[:, sampled], cells, weights)[:, chosen] if rule.mean_values else None
    if len(exact) and value is not None:
        value = torch.cat([value, state.value[:, exact]], dim=1)
    return Drawn(
        torch.cat([chosen_tokens, exact]), torch.cat([log_weights, tokens.weights[exact].log()]).float(), value
    )


def _chances(
    tokens: Tokens, mass: torch.Tensor | None, rule: DrawRule, sampled: torch.Tensor, cells: torch.Tensor
) -> torch.Tensor:
    """(sampled,) the chance of each token to be the one of its cell."""
    weights = tokens.weights[sampled]
    chances = weights / sum_by(cells, weights)
    if rule.importance and mass is not None:
        mass = mass[sampled].double().clamp_min(1e-12)
        chances = (1 - rule.importance) * chances + rule.importance * mass / sum_by(cells, mass)
    return chances


def _order(
    tokens: Tokens, rule: DrawRule, side: int, seed: int, sampled: torch.Tensor, chances: torch.Tensor
) -> torch.Tensor:
    """(sampled,) numbers of which the lowest of a cell is taken."""
    rows, columns = tokens.rows[sampled], tokens.columns[sampled]
    if rule.place == "fixed":
        middle = side // 2
        return (rows % side - middle).square() + (columns % side - middle).square()
    if rule.place == "paired":
        # Cells of a group of side x side share one permutation of the places, each begins at another.
        group = (rows // side**2) * (tokens.grid_size[1] // side**2 + 1) + columns // side**2
        within = (rows // side % side) * side + columns // side % side
        place = (rows % side) * side + columns % side
        generator = torch.Generator().manual_seed(seed)
        permutations = torch.rand(int(group.max()) + 1, side**2, generator=generator).argsort(dim=1)
        return (place - permutations[group, within]) % side**2
    # -log(number) / rate is exponential, and the smallest of several belongs to each with the chance of its rate.
    return -random_numbers(tokens, seed)[sampled].log() / chances


def _busy_cells(tokens: Tokens, state: LayerState, side: int) -> torch.Tensor:
    """(T,) cells of twice the side, but of half the side in the fifth where keys vary most."""
    coarse, fine = tokens.cells(2 * side), tokens.cells(max(side // 2, 1))
    members = sum_by(coarse, torch.ones(len(coarse)))
    key = state.key.transpose(0, 1).flatten(1)  # (T, heads * head_dim)
    sums = torch.zeros(int(coarse.max()) + 1, key.shape[1]).index_add(0, coarse, key)
    spread = sum_by(coarse, (key - sums[coarse] / members[:, None]).square().sum(dim=1)) / members
    is_busy = spread > spread.quantile(1 - _BUSY_SHARE)
    return torch.where(is_busy, fine + int(coarse.max()) + 1, coarse)


def _mean_values(value: torch.Tensor, cells: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(heads, tokens, head_dim), for each token the weighted mean value of its cell."""
    weights = weights.float()
    sums = value.new_zeros(value.shape[0], int(cells.max()) + 1, value.shape[2])
    sums = sums.index_add(1, cells, value * weights[:, None])
    return sums[:, cells] / sum_by(cells, weights)[:, None]


def draw_representatives(tokens: Tokens, removed: torch.Tensor, num_samples: int, window: int, seed: int) -> Drawn:
    """Of each cell that lost tokens one of the removed, with the weight of all that were removed there."""
    cells = tokens.cells(cell_side(tokens.grid_size, num_samples, window))[removed]
    weights = tokens.weights[removed]
    chances = weights / sum_by(cells, weights)
    chosen = first_of_cells(cells, -random_numbers(tokens, seed + 104729)[removed].log() / chances)
    return Drawn(removed[chosen], sum_by(cells, weights)[chosen].log().float())
