# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`TokenGrid`: where every present patch token is, and what it stands for; nothing else.

Tokens of a batch lie one image after the other. An image's tokens are its G global tokens followed by its present patch
tokens in *block-major* order: rows of blocks from the top, blocks from the left, inside a block row by row. A
neighbourhood of blocks is then one contiguous run of keys per block row, also after pruning, when blocks are ragged.

    packed tokens: [ globals of image 0 | patch tokens of image 0 | globals of image 1 | patch tokens of image 1 | ...

Where all images keep equally many tokens, the packed tokens are a plain batch (batch, tokens): see `batch_shape`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .stratified_sampling import cell_counts, cell_sides


@dataclasses.dataclass(frozen=True, eq=False)
class TokenGrid:
    """Positions and weights of the present patch tokens of a batch, in block-major order.

    Made once by `TokenGrid.create`, made smaller by `select`. T is the number of present patch tokens of the whole
    batch, G the number of global tokens of each image, M = T + batch * G the number of packed tokens.

    Attributes:
        grid_sizes: (rows, columns) of the full token grid, per image.
        counts: present patch tokens, per image; host integers, so that reading them never waits for a device.
        num_global_tokens: G.
        window_size: tokens per block side; `None` is a single block, dense attention.
        neighbor_radius: block rows and columns a token sees beyond its own.
        rows: (T,) int64, token row of each patch token.
        columns: (T,) int64, token column of each patch token.
        blocks: (T,) int64, ascending: the entry of `block_offsets` at which the token's block starts.
        block_offsets: (entries,) int64 packed token indices. Each block row of each image owns `block columns + 1`
            consecutive entries: where its blocks start, and where the last one ends. The keys of the blocks
            first..last of a block row are the packed tokens `block_offsets[first] : block_offsets[last + 1]`.
        entry_shifts: (entries,) int64, how many global tokens precede the patch tokens of an entry's image.
        num_context_tokens: at most how many context tokens each image has, see `draw_context_tokens`; 0 for none.
        weights: (T,) int64, how many patch tokens of the image each stands for; `None` where all stand for themselves.
        prepared: what attention backends need of this grid, by backend, so that it is made once for all layers. They
            fill it; a grid made from this one, by pruning or on another device, begins anew.
    """

    grid_sizes: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]
    num_global_tokens: int
    window_size: int | None
    neighbor_radius: int
    rows: torch.Tensor
    columns: torch.Tensor
    blocks: torch.Tensor
    block_offsets: torch.Tensor
    entry_shifts: torch.Tensor
    num_context_tokens: int = 0
    weights: torch.Tensor | None = None
    prepared: dict[str, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @classmethod
    def create(
        cls,
        grid_sizes: Sequence[tuple[int, int]],
        *,
        num_global_tokens: int,
        window_size: int | None,
        neighbor_radius: int = 1,
        present: torch.Tensor | None = None,
        device: torch.device | str | None = None,
        num_context_tokens: int = 0,
    ) -> "TokenGrid":
        """Puts the present patch tokens of a batch in block-major order.

        Args:
            grid_sizes: (rows, columns) of each image's token grid.
            num_global_tokens: G.
            window_size: tokens per block side, `None` for dense attention.
            neighbor_radius: see the class.
            present: (batch, rows, columns) bool on a canvas that holds every image's grid in its top left corner;
                `None` where every patch token is present.
            device: where the tensors live; by default where `present` lives.
            num_context_tokens: see the class.

        Raises:
            ValueError: a grid without tokens, an image without a present patch token, a mask that does not fit, a
                window without tokens, or a negative radius or number of context tokens.
        """
        _check_pattern(window_size, neighbor_radius, num_context_tokens)
        if present is not None:
            _check_present(present, grid_sizes)
            device = present.device if device is None else device
        images = [
            _block_major(size, window_size, None if present is None else present[index], device)
            for index, size in enumerate(grid_sizes)
        ]
        counts = tuple(rows.shape[0] for rows, _, _ in images)
        _check_counts(counts)
        entries = [rows * (columns + 1) for rows, columns in _block_counts(grid_sizes, window_size)]
        first_entries = [sum(entries[:index]) for index in range(len(entries))]
        blocks = torch.cat([blocks + first for (_, _, blocks), first in zip(images, first_entries, strict=True)])
        entry_shifts = _entry_shifts(entries, num_global_tokens, blocks.device)
        return cls(
            grid_sizes=tuple((rows, columns) for rows, columns in grid_sizes),
            counts=counts,
            num_global_tokens=num_global_tokens,
            window_size=window_size,
            neighbor_radius=neighbor_radius,
            rows=torch.cat([rows for rows, _, _ in images]),
            columns=torch.cat([columns for _, columns, _ in images]),
            blocks=blocks,
            block_offsets=_block_offsets(blocks, entry_shifts),
            entry_shifts=entry_shifts,
            num_context_tokens=num_context_tokens,
        )

    def select(self, kept: torch.Tensor, counts: Sequence[int], weights: torch.Tensor | None = None) -> "TokenGrid":
        """The grid of the kept patch tokens.

        Args:
            kept: (K,) int64 indices into the T patch tokens, ascending.
            counts: how many of them belong to each image; their sum is K.
            weights: (K,) int64, what they stand for from now on; by default what they stood for before.
        """
        if weights is None and self.weights is not None:
            weights = self.weights[kept]
        blocks = self.blocks[kept]
        return dataclasses.replace(
            self,
            counts=tuple(counts),
            rows=self.rows[kept],
            columns=self.columns[kept],
            blocks=blocks,
            block_offsets=_block_offsets(blocks, self.entry_shifts),
            weights=weights,
        )

    def with_global_tokens(self, num_global_tokens: int) -> "TokenGrid":
        """The same patch tokens behind another number of global tokens, for tokens that join or leave them."""
        entry_shifts = self.entry_shifts // self.num_global_tokens * num_global_tokens
        return dataclasses.replace(
            self,
            num_global_tokens=num_global_tokens,
            block_offsets=self.block_offsets - self.entry_shifts + entry_shifts,
            entry_shifts=entry_shifts,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TokenGrid":
        """The same grid on another device; the name and arguments let Accelerate move it with the tokens."""
        if torch.device(device) == self.device:
            return self
        moved = {
            field.name: getattr(self, field.name).to(device, non_blocking=non_blocking)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)

    @property
    def batch_size(self) -> int:
        """Number of images."""
        return len(self.counts)

    @property
    def device(self) -> torch.device:
        """Where the positions live."""
        return self.rows.device

    @property
    def is_uniform(self) -> bool:
        """Whether all images have equally many present patch tokens."""
        return all(count == self.counts[0] for count in self.counts)

    @property
    def batch_shape(self) -> tuple[int, int]:
        """(batch, G + K) of uniform images, (1, M) of packed ragged ones."""
        if self.is_uniform:
            return self.batch_size, self.num_global_tokens + self.counts[0]
        return 1, self.num_tokens

    @property
    def num_tokens(self) -> int:
        """M: all tokens of the batch, global and patch."""
        return sum(self.counts) + self.batch_size * self.num_global_tokens

    @property
    def image_offsets(self) -> tuple[int, ...]:
        """(batch + 1) packed index of each image's first global token, and the end of the last image."""
        offsets = [0]
        for count in self.counts:
            offsets.append(offsets[-1] + self.num_global_tokens + count)
        return tuple(offsets)

    @property
    def block_counts(self) -> tuple[tuple[int, int], ...]:
        """(block rows, block columns) of each image."""
        return _block_counts(self.grid_sizes, self.window_size)

    @property
    def windows(self) -> tuple[int, ...]:
        """Token rows and columns of a block, of each image."""
        return _windows(self.grid_sizes, self.window_size)

    @property
    def token_rows(self) -> tuple[tuple[int, int], ...]:
        """(start, end) of each image's token rows whose pixels are embedded: all of them."""
        return tuple((0, rows) for rows, _ in self.grid_sizes)

    @property
    def is_dense(self) -> bool:
        """Whether every token's neighbourhood is its whole image: the pattern is plain dense attention."""
        return all(max(block_counts) - 1 <= self.neighbor_radius for block_counts in self.block_counts)

    @property
    def has_context(self) -> bool:
        """Whether there are context tokens that some query would see."""
        return self.num_context_tokens > 0 and not self.is_dense

    @property
    def weighs_keys(self) -> bool:
        """Whether some key counts for more than itself: there are context tokens to see, or representatives."""
        return self.weights is not None or self.has_context

    @property
    def canvas_size(self) -> tuple[int, int]:
        """(rows, columns) that hold every image's grid."""
        return max(rows for rows, _ in self.grid_sizes), max(columns for _, columns in self.grid_sizes)

    def images(self) -> torch.Tensor:
        """(T,) int64, the image each patch token belongs to."""
        return torch.cat(
            [
                torch.full((count,), index, dtype=torch.int64, device=self.device)
                for index, count in enumerate(self.counts)
            ]
        )

    def images_of_tokens(self) -> torch.Tensor:
        """(M,) int64, the image each packed token belongs to."""
        lengths = [self.num_global_tokens + count for count in self.counts]
        return torch.cat([torch.full((length,), index, device=self.device) for index, length in enumerate(lengths)])

    def cells(self, num_samples: int | Sequence[int]) -> tuple[torch.Tensor, tuple[int, ...]]:
        """The cells that samples of each image are drawn from.

        Args:
            num_samples: at most how many samples of each image; one number, or one an image.

        Returns:
            (T,) int64, the cell of each patch token, counted over all images; and the number of cells of each image,
            host integers.
        """
        numbers = [num_samples] * self.batch_size if isinstance(num_samples, int) else num_samples
        sides = cell_sides(self.grid_sizes, numbers)
        counts = [cell_counts(size, side) for size, side in zip(self.grid_sizes, sides, strict=True)]
        num_cells = tuple(cell_rows * cell_columns for cell_rows, cell_columns in counts)
        first_cells = [sum(num_cells[:index]) for index in range(self.batch_size)]
        images = self.images()
        side = per_image(sides, self.device)[images]
        cell_columns = per_image([columns for _, columns in counts], self.device)[images]
        first_cell = per_image(first_cells, self.device)[images]
        return first_cell + (self.rows // side) * cell_columns + self.columns // side, num_cells

    def patch_indices(self) -> torch.Tensor:
        """(T,) int64, where the patch tokens lie among the M packed tokens."""
        return torch.arange(sum(self.counts), device=self.device) + self.num_global_tokens * (self.images() + 1)

    def global_indices(self) -> torch.Tensor:
        """(batch * G,) int64, where the global tokens lie among the M packed tokens."""
        starts = per_image(self.image_offsets[:-1], self.device)
        return (starts[:, None] + torch.arange(self.num_global_tokens, device=self.device)).reshape(-1)

    def canvas_indices(self) -> torch.Tensor:
        """(T,) int64, raster index of each patch token on the (batch, canvas rows, canvas columns) canvas."""
        canvas_rows, canvas_columns = self.canvas_size
        return (self.images() * canvas_rows + self.rows) * canvas_columns + self.columns

    def raster_order(self) -> torch.Tensor:
        """(T,) int64: taking the patch tokens in this order puts them in raster order, image by image."""
        return torch.argsort(self.canvas_indices())

    def raster_permutation(self) -> torch.Tensor:
        """(M,) int64: taking the packed tokens in this order puts each image's patch tokens in raster order."""
        patch_indices = self.patch_indices()
        permutation = torch.arange(self.num_tokens, device=self.device)
        permutation[patch_indices] = patch_indices[self.raster_order()]
        return permutation

    def to_raster(self, tokens: torch.Tensor) -> torch.Tensor:
        """Puts tokens in the public order: global tokens first, then the patch tokens in raster order.

        Args:
            tokens: (*batch_shape, features).

        Returns:
            (batch, G + K, features), K the largest count; images with fewer tokens end in zeros.
        """
        in_raster = tokens.reshape(self.num_tokens, -1)[self.raster_permutation()]
        if self.is_uniform:
            return in_raster.view(*self.batch_shape, -1)
        images = in_raster.split([self.num_global_tokens + count for count in self.counts])
        return torch.nn.utils.rnn.pad_sequence(list(images), batch_first=True)


def per_image(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """(batch,) int64 on the device; filled there, because a copy from the host stalls it and breaks a CUDA graph."""
    if all(statically_known_true(value == values[0]) for value in values):
        return torch.full((len(values),), values[0], dtype=torch.int64, device=device)
    return torch.cat([torch.full((1,), value, dtype=torch.int64, device=device) for value in values])


def _block_major(
    size: tuple[int, int], window_size: int | None, present: torch.Tensor | None, device: torch.device | str | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, columns and block entries of one image's present patch tokens, in block-major order."""
    num_rows, num_columns = size
    if num_rows < 1 or num_columns < 1:
        raise ValueError(f"grid_sizes holds {size}: every image needs at least one patch token.")
    raster = torch.arange(num_rows * num_columns, device=device)
    if present is not None:
        raster = raster[present[:num_rows, :num_columns].reshape(-1)]
    rows, columns = raster // num_columns, raster % num_columns
    (window,) = _windows([size], window_size)
    block_columns = -(-num_columns // window)
    blocks = (rows // window) * (block_columns + 1) + columns // window
    # The sort is stable, so that the tokens of a block stay in raster order.
    blocks, order = torch.sort(blocks, stable=True)
    return rows[order], columns[order], blocks


def _block_counts(grid_sizes: Sequence[tuple[int, int]], window_size: int | None) -> tuple[tuple[int, int], ...]:
    """(block rows, block columns) of each image."""
    windows = _windows(grid_sizes, window_size)
    return tuple(
        (-(-rows // window), -(-columns // window)) for (rows, columns), window in zip(grid_sizes, windows, strict=True)
    )


def _windows(grid_sizes: Sequence[tuple[int, int]], window_size: int | None) -> tuple[int, ...]:
    """Token rows and columns of a block, of each image."""
    return tuple(max(size) if window_size is None else window_size for size in grid_sizes)


def _entry_shifts(entries: Sequence[int], num_global_tokens: int, device: torch.device) -> torch.Tensor:
    """How many global tokens precede the patch tokens of each entry's image, from the entries of each image."""
    return torch.cat(
        [
            torch.full((count,), num_global_tokens * (index + 1), dtype=torch.int64, device=device)
            for index, count in enumerate(entries)
        ]
    )


def _block_offsets(blocks: torch.Tensor, entry_shifts: torch.Tensor) -> torch.Tensor:
    """Packed index at which each entry's block starts: the tokens of earlier entries and the globals before them."""
    entries = torch.arange(entry_shifts.shape[0], device=blocks.device)
    return torch.searchsorted(blocks, entries) + entry_shifts


def _check_counts(counts: tuple[int, ...]) -> None:
    if 0 in counts:
        raise ValueError(
            f"patch_mask leaves image {counts.index(0)} without a present patch token, so nothing can be computed "
            "for it. Drop the image from the batch, or mask less of it."
        )


def _check_pattern(window_size: int | None, neighbor_radius: int, num_context_tokens: int) -> None:
    if window_size is not None and window_size < 1:
        raise ValueError(f"window_size={window_size} is not possible: it takes at least 1, or None (dense).")
    if neighbor_radius < 0:
        raise ValueError(f"neighbor_radius={neighbor_radius} is not possible: it takes at least 0 (the own block).")
    if num_context_tokens < 0:
        raise ValueError(
            f"num_context_tokens={num_context_tokens} is not possible: it must be at least 0, which gives none."
        )


def _check_present(present: torch.Tensor, grid_sizes: Sequence[tuple[int, int]]) -> None:
    if present.dtype != torch.bool:
        raise ValueError(f"patch_mask is {present.dtype}: it takes torch.bool, True where a patch token is present.")
    canvas = (max(rows for rows, _ in grid_sizes), max(columns for _, columns in grid_sizes))
    fits = present.ndim == 3 and present.shape[1] >= canvas[0] and present.shape[2] >= canvas[1]
    if not fits or present.shape[0] != len(grid_sizes):
        raise ValueError(
            f"patch_mask has shape {tuple(present.shape)}: it takes (batch, rows, columns) of the token grid, here "
            f"({len(grid_sizes)}, {canvas[0]}, {canvas[1]})."
        )
