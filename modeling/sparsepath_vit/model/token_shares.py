# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`TokenShare`: the block rows of an image that one of several processes works on, and how they are dealt.

A share is a large strip: the own rows, and the rows around them, whose tokens come from the neighbours before each
layer. Every process knows where all tokens of the image are (24 bytes each), and holds the hidden states of its share.

    hidden states of a share: [ globals | rows above | own rows | rows below ]
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch

from .processes import Processes, Range
from .token_grid import TokenGrid
from .token_strips import StripRange, TokenStrip, strip_ranges_of_rows, token_strip

# Rows are dealt anew where a process would have so many times the mean number of tokens.
UNEVEN_FROM = 1.2


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class TokenShare(TokenStrip):
    """The share of one process, as a grid of its own.

    Attributes:
        whole: the grid of the whole image.
        row_ends: (block rows + 1) patch tokens of the image before each block row, and all.
        first_rows: (processes + 1) the first block row of each process, and the number of block rows.
        processes: that share the image.
    """

    whole: TokenGrid
    row_ends: tuple[int, ...]
    first_rows: tuple[int, ...]
    processes: Processes

    @property
    def owned(self) -> list[Range]:
        """The own patch tokens of each process, (start, end) among those of the image."""
        return [_owned(self.row_ends, self.first_rows, rank) for rank in range(self.processes.number)]

    @property
    def held(self) -> list[Range]:
        """The patch tokens of each process with those around, likewise."""
        radius = self.neighbor_radius
        return [_around(self.row_ends, self.first_rows, rank, radius) for rank in range(self.processes.number)]

    @property
    def num_owned(self) -> int:
        """How many patch tokens are this process's own."""
        return self.own[1] - self.own[0]

    @property
    def block_rows(self) -> Range:
        """The own block rows, (start, end)."""
        return self.first_rows[self.processes.rank], self.first_rows[self.processes.rank + 1]

    @property
    def token_rows(self) -> tuple[Range, ...]:
        """(start, end) of the token rows whose pixels are embedded here: the own ones."""
        (rows, _), window = self.grid_sizes[0], self.windows[0]
        return (tuple(min(rows, row * window) for row in self.block_rows),)

    def places(self, tokens: Range) -> slice:
        """Where patch tokens of the image, (start, end), lie among the packed tokens held here."""
        shift = self.num_global_tokens - self.packed_shift
        return slice(tokens[0] + shift, tokens[1] + shift)

    def strips(self, most_tokens: int) -> list[TokenStrip]:
        """The strips of the own block rows, cut once, for all layers; see `strips_of`."""
        name = f"strips of {most_tokens} tokens"
        if name not in self.prepared:
            ranges = strip_ranges_of_rows(self.whole, 0, self.row_ends, self.block_rows, most_tokens)
            strips = [token_strip(self.whole, 0, strip) for strip in ranges]
            # Packed indices of the tokens held here, not of the whole image.
            self.prepared[name] = [
                dataclasses.replace(strip, packed_shift=strip.packed_shift - self.packed_shift) for strip in strips
            ]
        return self.prepared[name]

    def fetch_surroundings(self, hidden_states: torch.Tensor) -> None:
        """Fills in the tokens around the own ones, from the processes that own them.

        Args:
            hidden_states: (G + tokens held, hidden_size).
        """

        def rows(tokens: Range) -> torch.Tensor:
            return hidden_states[self.places(tokens)]

        self.processes.exchange(self.owned, self.held, rows, rows)

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """(own patch tokens,) of each process -> (patch tokens of the image,), in the order of `whole`."""
        return self.processes.gather_rows(values, [end - start for start, end in self.owned])


def share_of(
    whole: TokenGrid,
    processes: Processes,
    row_ends: Sequence[int],
    first_rows: Sequence[int],
    has_surroundings: bool = True,
) -> TokenShare:
    """The share of this process; for the arguments see `TokenShare`."""
    own = _owned(row_ends, first_rows, processes.rank)
    around = _around(row_ends, first_rows, processes.rank, whole.neighbor_radius) if has_surroundings else own
    first, last = first_rows[processes.rank : processes.rank + 2]
    strip = token_strip(whole, 0, StripRange(own, around, (last - first) * whole.windows[0]))
    fields = {field.name: getattr(strip, field.name) for field in dataclasses.fields(strip) if field.init}
    return TokenShare(
        **fields, whole=whole, row_ends=tuple(row_ends), first_rows=tuple(first_rows), processes=processes
    )


def in_proportion(on_tokens: Callable[[int], object] | None, part: int, whole: int) -> Callable[[int], object] | None:
    """Called with the numbers of a part of an image's tokens, it calls `on_tokens` with those of the whole image.

    Args:
        on_tokens: what is called; `None` gives `None`.
        part: how many tokens it will be called with, in all; where there are none, `on_tokens` is called at once.
        whole: how many there are.
    """
    if on_tokens is None:
        return None
    if part == 0:
        on_tokens(whole)
    done = 0

    def of_whole(tokens: int) -> None:
        nonlocal done
        before, done = done, done + tokens
        on_tokens(whole * done // part - whole * before // part)

    return of_whole


def deal_rows(row_ends: Sequence[int], number: int) -> tuple[int, ...]:
    """Deals the block rows of an image, as evenly in tokens as whole rows permit, at least one each.

    Args:
        row_ends: (block rows + 1) patch tokens before each block row, and all.
        number: of processes, at most that of block rows.

    Returns:
        (number + 1) the first block row of each process, and the number of block rows.
    """
    first_rows, rows = [0], len(row_ends) - 1
    for process in range(1, number):
        possible = range(first_rows[-1] + 1, rows - (number - process) + 1)
        even = row_ends[-1] * process / number
        first_rows.append(min(possible, key=lambda row, even=even: abs(row_ends[row] - even)))
    return *first_rows, rows


def deal_rows_anew(row_ends: Sequence[int], first_rows: tuple[int, ...]) -> tuple[int, ...]:
    """`first_rows`, or other ones where these have become uneven and others are less so."""
    number = len(first_rows) - 1
    if _largest_share(row_ends, first_rows) <= UNEVEN_FROM * row_ends[-1] / number:
        return first_rows
    return min(first_rows, deal_rows(row_ends, number), key=lambda rows: _largest_share(row_ends, rows))


def _largest_share(row_ends: Sequence[int], first_rows: Sequence[int]) -> int:
    """Patch tokens of the process that has most."""
    ends = [row_ends[row] for row in first_rows]
    return max(end - start for start, end in itertools.pairwise(ends))


def _owned(row_ends: Sequence[int], first_rows: Sequence[int], rank: int) -> Range:
    return row_ends[first_rows[rank]], row_ends[first_rows[rank + 1]]


def _around(row_ends: Sequence[int], first_rows: Sequence[int], rank: int, radius: int) -> Range:
    own = _owned(row_ends, first_rows, rank)
    if own[0] == own[1]:  # nobody asks
        return own
    return row_ends[max(0, first_rows[rank] - radius)], row_ends[min(len(row_ends) - 1, first_rows[rank + 1] + radius)]
