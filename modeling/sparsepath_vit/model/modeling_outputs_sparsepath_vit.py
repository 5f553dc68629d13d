# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What the models return. Everything is in raster order; G global tokens come first, K patch tokens follow."""

import dataclasses

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from .encoder_sparsepath_vit import EncoderOutput
from .token_grid import TokenGrid, per_image
from .token_shares import TokenShare
from .token_strips import block_row_ends

# At inference the final norm and the way back to raster order, or pooling, take about so many tokens at a time.
_TOKENS_AT_ONCE = 4_096


@dataclasses.dataclass
class SparsePathViTModelOutput(BaseModelOutputWithPooling):
    """Output of `SparsePathViTModel`: that of any Transformers vision model, then where its patch tokens are.

    Images of a batch that keep different numbers of tokens are padded to the largest: with zeros in the states, with -1
    in `patch_positions`.

    Attributes:
        last_hidden_state: (batch, G + K, hidden_size) after the final norm; with `config.unprune` (batch, G + N, ...).
        pooler_output: (batch, hidden_size) of the CLS token, or (batch, 2 * hidden_size) of the CLS token and the mean
            of the kept patch tokens, each counted as often as the patch tokens it stands for.
        hidden_states: before the first and after each layer, (batch, G + N, hidden_size), and (batch, G + K, ...) for
            the layers after pruning. Before the final norm.
        attentions: per layer (batch, heads, tokens, tokens).
        patch_positions: (batch, K, 2) int64, (row, column) in the token grid of each patch token of
            `last_hidden_state`: the kept ones, or with `config.unprune` all that were present.
        grid_sizes: (batch, 2) int64, (rows, columns) of each image's token grid.
        prune_scores: (batch, rows * columns) float32 on the grid all images fit in, 0 where no token was present;
            `None` without pruning.
        patch_weights: (batch, K) int64, how many patch tokens of the image each of them stands for: 1, or for a
            representative as many as were removed in its cell; `None` without representatives. Padded with 0.
    """

    patch_positions: torch.Tensor | None = None
    grid_sizes: torch.Tensor | None = None
    prune_scores: torch.Tensor | None = None
    patch_weights: torch.Tensor | None = None

    def to_dense_map(self, fill: float = 0.0) -> torch.Tensor:
        """Puts the kept patch tokens where they belong.

        Args:
            fill: value at removed and absent places.

        Returns:
            (batch, hidden_size, rows, columns) on the grid all images fit in.
        """
        return patch_tokens_to_map(self.last_hidden_state, self.patch_positions, self.grid_sizes, fill)


def patch_tokens_to_map(
    last_hidden_state: torch.Tensor, patch_positions: torch.Tensor, grid_sizes: torch.Tensor, fill: float
) -> torch.Tensor:
    """(batch, G + K, features) tokens at (batch, K, 2) positions -> (batch, features, rows, columns)."""
    batch, num_kept, _ = patch_positions.shape
    patch_tokens = last_hidden_state[:, last_hidden_state.shape[1] - num_kept :]
    rows, columns = grid_sizes.amax(dim=0).tolist()
    dense_map = patch_tokens.new_full((batch, rows, columns, patch_tokens.shape[-1]), fill)
    is_token = patch_positions[..., 0] >= 0  # (batch, K), False where an image kept fewer tokens
    images = torch.arange(batch, device=is_token.device)[:, None].expand_as(is_token)[is_token]
    token_rows, token_columns = patch_positions[is_token].unbind(-1)
    dense_map = dense_map.index_put((images, token_rows, token_columns), patch_tokens[is_token])
    return dense_map.permute(0, 3, 1, 2)  # (batch, rows, columns, features) -> (batch, features, rows, columns)


@dataclasses.dataclass
class SparsePathViTImageClassifierOutput(ImageClassifierOutput):
    """Output of `SparsePathViTForImageClassification`.

    Attributes:
        loss: of the labels, where given.
        logits: (batch, num_labels).
        hidden_states: as in `SparsePathViTModelOutput`.
        attentions: as in `SparsePathViTModelOutput`.
        patch_positions: as in `SparsePathViTModelOutput`.
        grid_sizes: as in `SparsePathViTModelOutput`.
        prune_scores: as in `SparsePathViTModelOutput`.
        patch_weights: as in `SparsePathViTModelOutput`.
    """

    patch_positions: torch.Tensor | None = None
    grid_sizes: torch.Tensor | None = None
    prune_scores: torch.Tensor | None = None
    patch_weights: torch.Tensor | None = None


def normalised_in_raster(
    norm: nn.LayerNorm, tokens: torch.Tensor, grid: TokenGrid, may_overwrite: bool = False
) -> torch.Tensor:
    """The final norm, and the way back to raster order.

    At inference it works on a part of the tokens at a time. Block-major and raster order differ only within each row of
    blocks, so the result can take the place of the tokens, where they all are of equally many tokens an image.

    Args:
        norm: the final norm.
        tokens: (*grid.batch_shape, hidden_size).
        grid: where they are.
        may_overwrite: whether nobody needs the tokens afterwards.

    Returns:
        (batch, G + K, hidden_size), K the largest count; images with fewer tokens end in zeros.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not grid.is_uniform:
        return grid.to_raster(norm(tokens))
    permutation, ends = grid.raster_permutation(), _ends_of_parts(grid)
    may_overwrite = may_overwrite and ends is not None
    packed = tokens.flatten(0, 1)
    output = packed if may_overwrite else torch.empty_like(packed)
    if ends is None:
        ends = [*range(_TOKENS_AT_ONCE, grid.num_tokens, _TOKENS_AT_ONCE), grid.num_tokens]
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        output[start:end] = norm(packed[permutation[start:end]])
    return output.view(tokens.shape)


def _ends_of_parts(grid: TokenGrid) -> list[int] | None:
    """Packed indices that part the tokens between rows of blocks; `None` where only the device knows these."""
    ends = []
    for image, start in enumerate(grid.image_offsets[:-1]):
        of_image = block_row_ends(grid, image)
        if of_image is None:
            return None
        ends += [start + grid.num_global_tokens + end for end in of_image[1:]]
    # Short rows of blocks join the part before them.
    parts = [0]
    for end, following in zip(ends, [*ends[1:], None], strict=True):
        if following is None or following - parts[-1] > _TOKENS_AT_ONCE:
            parts.append(end)
    return parts[1:]


def pooled_features(last_hidden_state: torch.Tensor, grid: TokenGrid, pooling: str) -> torch.Tensor:
    """What stands for a whole image.

    Args:
        last_hidden_state: (batch, G + K, hidden_size) in raster order, zero where an image has fewer tokens.
        grid: of these tokens.
        pooling: "cls", or "cls_mean" for the CLS token and the weighted mean of the patch tokens.

    Returns:
        (batch, pooled_size).
    """
    # A copy: a view would keep all tokens alive as long as somebody holds the pooled features.
    cls_token = last_hidden_state[:, 0].clone()
    if pooling == "cls":
        return cls_token
    parts = last_hidden_state[:, grid.num_global_tokens :].split(_TOKENS_AT_ONCE, dim=1)
    weights = weights_in_raster(grid)
    whole = grid.whole if isinstance(grid, TokenShare) else grid
    if weights is None:
        mean = sum(part.float().sum(dim=1) for part in parts) / per_image(whole.counts, cls_token.device)[:, None]
    else:
        shares = (weights / weights_in_raster(whole).sum(dim=1, keepdim=True)).split(_TOKENS_AT_ONCE, dim=1)
        mean = sum((share[:, :, None] * part.float()).sum(dim=1) for share, part in zip(shares, parts, strict=True))
    if whole is not grid:  # the parts of the mean that the processes have
        mean = torch.stack(grid.processes.gather(mean)).sum(dim=0)
    return torch.cat([cls_token, mean.to(cls_token.dtype)], dim=-1)


def positions_in_raster(grid: TokenGrid) -> torch.Tensor:
    """(batch, K, 2) int64 (row, column) of the patch tokens in raster order, padded with -1."""
    positions = torch.stack([grid.rows, grid.columns], dim=-1)[grid.raster_order()].split(grid.counts)
    return nn.utils.rnn.pad_sequence(list(positions), batch_first=True, padding_value=-1)


def weights_in_raster(grid: TokenGrid) -> torch.Tensor | None:
    """(batch, K) int64 weights of the patch tokens in raster order, padded with 0; `None` where all are 1."""
    if grid.weights is None:
        return None
    weights = grid.weights[grid.raster_order()].split(grid.counts)
    return nn.utils.rnn.pad_sequence(list(weights), batch_first=True)


def sizes_of_grids(grid: TokenGrid) -> torch.Tensor:
    """(batch, 2) int64 (rows, columns) of each image's token grid."""
    return torch.stack([per_image(sides, grid.device) for sides in zip(*grid.grid_sizes, strict=True)], 1)


def hidden_states_in_raster(encoded: EncoderOutput) -> tuple[torch.Tensor, ...] | None:
    """The tokens before the first and after each layer, (batch, G + N, hidden_size) each; `None` if not kept."""
    return tuple(tokens.grid.to_raster(tokens.hidden_states) for tokens in encoded.states) or None


def attentions_in_raster(encoded: EncoderOutput) -> tuple[torch.Tensor, ...] | None:
    """The probabilities of each layer, (batch, heads, tokens, tokens) each; `None` if not kept."""
    return tuple(_attentions_in_raster(*weights_and_grid) for weights_and_grid in encoded.attentions) or None


def _attentions_in_raster(weights: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
    """Probabilities in the grid's order -> (batch, heads, tokens, tokens) in raster order, padded with zeros."""
    order = grid.raster_permutation()
    length = grid.num_global_tokens + max(grid.counts)
    images = []
    for image, (start, end) in enumerate(zip(grid.image_offsets[:-1], grid.image_offsets[1:], strict=True)):
        # Uniform images lie on the batch axis, ragged ones one after the other on the token axes.
        batch_index, shift = (image, start) if grid.is_uniform else (0, 0)
        tokens = order[start:end] - shift
        padding = length - (end - start)
        in_raster = weights[batch_index][:, tokens[:, None], tokens[None, :]]  # (heads, queries, keys)
        images.append(nn.functional.pad(in_raster, (0, padding, 0, padding)))
    return torch.stack(images)
