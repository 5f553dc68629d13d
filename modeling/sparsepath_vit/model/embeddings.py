# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""From pixels to tokens: patches, resampled position embeddings, CLS and register tokens, in the grid's order."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from .configuration_sparsepath_vit import SparsePathViTConfig
from .patch_embeddings import SparsePathViTPatchEmbeddings
from .token_grid import TokenGrid, per_image

# At inference a larger image is embedded in strips of this many token rows, so that neither its patches nor its
# position map are in memory at once beside the tokens themselves.
ROWS_PER_STRIP = 32
_TOKENS_AT_ONCE = 4_096  # of a wide image fewer rows

# Called as a forward proceeds, with the number of patch tokens that the embeddings or a layer have just finished.
OnTokens = Callable[[int], None]


def token_grid_of_sizes(
    config: SparsePathViTConfig,
    grid_sizes: Sequence[tuple[int, int]],
    present: torch.Tensor | None = None,
    device: torch.device | str | None = None,
) -> TokenGrid:
    """`TokenGrid.create` with a model's global tokens, blocks and context tokens.

    Args:
        config: of the model.
        grid_sizes: (rows, columns) of each image's token grid.
        present: (batch, rows, columns) bool; `None` where every patch token is present.
        device: where the tensors live; by default where `present` lives.

    Raises:
        ValueError: what `TokenGrid.create` refuses.
    """
    return TokenGrid.create(
        grid_sizes,
        num_global_tokens=config.num_global_tokens,
        window_size=config.window_size,
        neighbor_radius=config.neighbor_radius,
        present=present,
        device=device,
        num_context_tokens=config.num_context_tokens,
    )


def resampling_weights(
    new_size: int, old_size: int, like: torch.Tensor, antialias: bool = True, offset: float = 0.0
) -> torch.Tensor:
    """One axis of bicubic resampling as a matrix.

    Resampling is separable and linear, so the library's own kernel applied to the identity gives its weights.

    Args:
        new_size: samples wanted along the axis.
        old_size: samples there are.
        like: a tensor of the dtype and on the device wanted.
        antialias: as for `torch.nn.functional.interpolate`; it matters when enlarging too, as torch then takes another
            cubic kernel (a = -0.5 with antialiasing, -0.75 without).
        offset: the samples lie as if there were `new_size + offset` of them.

    Returns:
        (new_size, old_size), of the dtype and on the device of `like`.
    """
    identity = torch.eye(old_size, dtype=like.dtype, device=like.device)
    # Compiling is asked first: the comparison would bind a graph to this size, or exclude it. The kernel at scale 1 is
    # the identity.
    if not torch.compiler.is_compiling() and new_size == old_size and not offset:
        return identity
    # Where torch is given a scale it takes samples at that scale, and rounds only their number.
    target = {"scale_factor": ((new_size + offset) / old_size, 1.0)} if offset else {"size": (new_size, old_size)}
    # One channel: torch resamples an (old, old, 1) image of `old` channels in the wrong memory order.
    resampled = nn.functional.interpolate(identity[None, None], mode="bicubic", antialias=antialias, **target)
    return resampled[0, 0]


class SparsePathViTEmbeddings(nn.Module):
    """CLS and register tokens and the present patch tokens with their position embeddings, in the grid's order."""

    def __init__(self, config: SparsePathViTConfig) -> None:
        super().__init__()
        self.config = config
        self.position_grid = config.image_size // config.patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        if config.num_register_tokens:
            self.register_tokens = nn.Parameter(torch.zeros(1, config.num_register_tokens, config.hidden_size))
        num_positions = config.num_prefix_position_embeddings + self.position_grid**2
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, config.hidden_size))
        self.patch_embeddings = SparsePathViTPatchEmbeddings(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def token_grid(
        self,
        pixel_values: torch.Tensor,
        patch_mask: torch.Tensor | None,
        image_sizes: torch.Tensor | Sequence[tuple[int, int]] | None,
    ) -> TokenGrid:
        """Says which patch tokens of a batch are present, and puts them in order.

        Args:
            pixel_values: (batch, channels, height, width).
            patch_mask: (batch, rows, columns) bool, True where a patch token is present; `None` for all.
            image_sizes: (height, width) in pixels of each image; `None` where each fills the canvas.

        Raises:
            ValueError: pixels that are misshapen or not finite, sizes or a mask that do not fit them.
        """
        self.patch_embeddings.check(pixel_values)
        batch, _, height, width = pixel_values.shape
        patch_size = self.config.patch_size
        canvas = (height // patch_size, width // patch_size)
        if patch_mask is not None and patch_mask.shape != (batch, *canvas):
            raise ValueError(
                f"patch_mask has shape {tuple(patch_mask.shape)}: it takes (batch, rows, columns) of the token grid, "
                f"here {(batch, *canvas)}."
            )
        grid_sizes = [canvas] * batch
        if image_sizes is not None:
            sizes = image_sizes.tolist() if isinstance(image_sizes, torch.Tensor) else list(image_sizes)
            _check_image_sizes(sizes, batch, height, width)
            # Rounded up by a sum: torch.compile fails on products of `-(-rows // patch_size)` where sizes are open.
            grid_sizes = [tuple((side + patch_size - 1) // patch_size for side in size) for size in sizes]
        present = None if patch_mask is None else patch_mask.to(pixel_values.device)
        return token_grid_of_sizes(self.config, grid_sizes, present, pixel_values.device)

    def forward(self, pixel_values: torch.Tensor, grid: TokenGrid, on_tokens: OnTokens | None = None) -> torch.Tensor:
        """Embeds the present tokens of a batch.

        Args:
            pixel_values: (batch, channels, height, width).
            grid: which patch tokens are present, and their order.
            on_tokens: called as it proceeds, with the number of patch tokens just embedded.

        Returns:
            (*grid.batch_shape, hidden_size).

        Raises:
            ValueError: a grid of other images.
        """
        patch_size, rows = self.config.patch_size, pixel_values.shape[-2] // self.config.patch_size
        # Compiling is asked first: comparing the rows would bind the graph to images of this size.
        if not torch.compiler.is_compiling():
            _check_grid(grid, pixel_values.shape[0], (rows, pixel_values.shape[-1] // patch_size))
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled() and rows > ROWS_PER_STRIP:
            # The canvas may be larger than an image.
            images = [
                image[:, :, : height * patch_size, : width * patch_size].split(ROWS_PER_STRIP * patch_size, dim=2)
                for image, (height, width) in zip(pixel_values.split(1), grid.grid_sizes, strict=True)
            ]
            return self._embed_in_strips(images, grid, on_tokens)
        patches = self.patch_embeddings(pixel_values)  # (batch, canvas rows, canvas columns, hidden_size)
        canvas_rows, canvas_columns = patches.shape[1:3]
        canvas_indices = (grid.images() * canvas_rows + grid.rows) * canvas_columns + grid.columns
        patch_tokens = patches.flatten(0, 2)[canvas_indices] + self._positions_of_batch(grid)
        if on_tokens is not None:
            on_tokens(sum(grid.counts))
        return self.dropout(self._with_global_tokens(patch_tokens, grid))

    def embed_strips(
        self, strips: Iterable[torch.Tensor], grid: TokenGrid, on_tokens: OnTokens | None = None
    ) -> torch.Tensor:
        """Embeds one image that arrives in strips, so that its pixels need never be in memory at once.

        Args:
            strips: (1, channels, height, width) pixels from the top of the image down, each a whole number of patches
                high and as wide as the grid.
            grid: the present patch tokens of that one image.
            on_tokens: as in `forward`.

        Returns:
            (1, G + N, hidden_size).

        Raises:
            ValueError: strips that do not fit the grid, or pixels the model would misread.
        """
        if grid.batch_size != 1:
            raise ValueError(f"grid holds {grid.batch_size} images: strips are those of one image.")
        return self._embed_in_strips([strips], grid, on_tokens)

    def _embed_in_strips(
        self, images: Sequence[Iterable[torch.Tensor]], grid: TokenGrid, on_tokens: OnTokens | None
    ) -> torch.Tensor:
        """Each image's strips into one buffer: there is nothing else of the size of the tokens."""
        num_tokens, num_globals = grid.num_tokens, grid.num_global_tokens
        # Absent patches share a last place beyond the tokens: asking the device which are present would stall it.
        tokens = self.cls_token.new_empty(num_tokens + 1, self.config.hidden_size)
        first_patch = 0
        for strips, size, rows, count, start in zip(
            images, grid.grid_sizes, grid.token_rows, grid.counts, grid.image_offsets[:-1], strict=True
        ):
            tokens[start : start + num_globals] = self._global_tokens()
            patches = slice(first_patch, first_patch + count)
            places = torch.full(size, num_tokens, device=grid.device)  # where the patch of each row and column goes
            places[grid.rows[patches], grid.columns[patches]] = torch.arange(
                start + num_globals, start + num_globals + count, device=grid.device
            )
            for share in self._embed_image(strips, places, rows, tokens):
                if on_tokens is not None:  # of background there may be more in one strip than in another
                    on_tokens(int(count * share[1]) - int(count * share[0]))
            first_patch += count
        return self.dropout(tokens[:num_tokens].view(*grid.batch_shape, -1))

    def _embed_image(
        self, strips: Iterable[torch.Tensor], places: torch.Tensor, rows: tuple[int, int], tokens: torch.Tensor
    ) -> Iterator[tuple[float, float]]:
        """Writes the patch tokens of one image to their places, (rows, columns) indices of (tokens, hidden_size).

        The strips hold its token rows from `rows[0]` to `rows[1]`. Yields what share of them was done before each strip
        and after it.
        """
        size, (first_row, last_row) = tuple(places.shape), rows
        for part in self._checked_parts(strips, size[1]):
            patches = self.patch_embeddings(part)[0]  # (rows, columns, hidden_size)
            end_row = first_row + patches.shape[0]
            if patches.shape[1] != size[1] or end_row > last_row:
                raise ValueError(
                    f"strips hold {patches.shape[1]} token columns and at least {end_row - rows[0]} token rows: the "
                    f"grid has {size[1]} columns and {last_row - rows[0]} rows."
                )
            patches = patches + self._position_map(size, first_row, patches.shape[0])
            tokens[places[first_row:end_row]] = patches
            yield tuple((row - rows[0]) / (last_row - rows[0]) for row in (first_row, end_row))
            first_row = end_row
        if first_row != last_row:
            raise ValueError(f"strips hold {first_row - rows[0]} token rows: the grid has {last_row - rows[0]}.")

    def _checked_parts(self, strips: Iterable[torch.Tensor], columns: int) -> Iterator[torch.Tensor]:
        """The strips of an image that is `columns` tokens wide, of a wide one in parts."""
        height = max(1, _TOKENS_AT_ONCE // columns) * self.config.patch_size
        for strip in strips:
            self.patch_embeddings.check(strip)
            yield from strip.split(height, dim=2)

    def _position_map(self, size: tuple[int, int], first_row: int, num_rows: int) -> torch.Tensor:
        """Position embeddings of some rows of a grid, resampled bicubically: (num_rows, columns, hidden_size)."""
        side, antialias = self.position_grid, self.config.position_antialias
        offset = self.config.position_interpolation_offset
        if offset and size == (side, side):  # the offset first: comparing sizes would bind a graph to them
            offset = 0.0
        positions = self.position_embeddings[0, self.config.num_prefix_position_embeddings :]
        positions = positions.to(torch.promote_types(positions.dtype, torch.float32))
        with maybe_autocast(positions.device.type, enabled=False):  # autocast would resample in its lower precision
            row_weights = resampling_weights(size[0], side, positions, antialias, offset)
            row_weights = row_weights[first_row : first_row + num_rows]
            column_weights = resampling_weights(size[1], side, positions, antialias, offset)
            by_row = row_weights @ positions.view(side, -1)  # (num_rows, side * hidden_size)
            position_map = column_weights @ by_row.view(-1, side, self.config.hidden_size)
        return position_map.to(self.position_embeddings.dtype)

    def _positions_of_batch(self, grid: TokenGrid) -> torch.Tensor:
        """Position embeddings of the present patch tokens: (T, hidden_size)."""
        size = grid.grid_sizes[0]
        if all(other == size for other in grid.grid_sizes):
            return self._position_map(size, 0, size[0])[grid.rows, grid.columns]
        # Lists and `==`, no dict and no `index`: torch.compile would compile anew for every size, or not at all.
        distinct_sizes: list[tuple[int, int]] = []
        first_entries: list[int] = []  # of each in the table
        starts: list[int] = []  # of each image
        end = 0
        for size in grid.grid_sizes:
            known = [entry for other, entry in zip(distinct_sizes, first_entries, strict=True) if other == size]
            if not known:
                distinct_sizes.append(size)
                first_entries.append(end)
                known = [end]
                end += size[0] * size[1]
            starts += known
        position_table = torch.cat([self._position_map(size, 0, size[0]).flatten(0, 1) for size in distinct_sizes])
        images = grid.images()
        columns_of_image = per_image([columns for _, columns in grid.grid_sizes], grid.device)
        starts_of_image = per_image(starts, grid.device)
        return position_table[starts_of_image[images] + grid.rows * columns_of_image[images] + grid.columns]

    def _with_global_tokens(self, patch_tokens: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
        """Puts each image's global tokens before its patch tokens: (T, hidden_size) -> (*batch_shape, hidden_size)."""
        global_tokens = self._global_tokens()
        if grid.is_uniform:
            patch_tokens = patch_tokens.view(grid.batch_size, grid.counts[0], -1)
            return torch.cat([global_tokens.expand(grid.batch_size, -1, -1), patch_tokens], dim=1)
        images = patch_tokens.split(grid.counts)
        return torch.cat([tokens for image in images for tokens in (global_tokens, image)])[None]

    def _global_tokens(self) -> torch.Tensor:
        """CLS and register tokens with their position embeddings: (G, hidden_size)."""
        global_tokens = self.cls_token[0]
        if self.config.num_register_tokens:
            global_tokens = torch.cat([global_tokens, self.register_tokens[0]])
        num_prefix = self.config.num_prefix_position_embeddings
        if num_prefix:
            prefix_positions = self.position_embeddings[0, :num_prefix]
            global_tokens = torch.cat([global_tokens[:num_prefix] + prefix_positions, global_tokens[num_prefix:]])
        return global_tokens


def _check_grid(grid: TokenGrid, batch: int, canvas: tuple[int, int]) -> None:
    """Refuses a grid that was made for other images than a batch on a canvas of (rows, columns) tokens."""
    if grid.batch_size != batch or grid.canvas_size[0] > canvas[0] or grid.canvas_size[1] > canvas[1]:
        raise ValueError(
            f"grid holds {grid.batch_size} images of up to {grid.canvas_size} tokens, pixel_values {batch} of up to "
            f"{canvas}: model.token_grid(pixel_values) makes the grid that fits."
        )


def _check_image_sizes(sizes: list, batch: int, height: int, width: int) -> None:
    def fits(size: Any) -> bool:
        is_pair = isinstance(size, Sequence) and len(size) == 2 and all(isinstance(side, int) for side in size)
        return is_pair and 0 < size[0] <= height and 0 < size[1] <= width

    if len(sizes) != batch or not all(fits(size) for size in sizes):
        raise ValueError(
            f"image_sizes is {sizes}: it takes one (height, width) in whole pixels per image, here {batch}, each "
            f"within the canvas of {height} x {width} px."
        )
