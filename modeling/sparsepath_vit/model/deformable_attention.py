# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, equation 3), in float32 and in chunks.

Each query samples a few points of each map of a pyramid and averages them with learned weights. Points are float32 in
every dtype of the model: in bfloat16 a coordinate of a large map moves by a pixel.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

try:
    from transformers.integrations import use_kernel_forward_from_hub
except ImportError:  # an optional integration: without it the code below runs everywhere

    def use_kernel_forward_from_hub(layer_name: str) -> Callable[[type], type]:
        """Leaves the layer as it is."""
        return lambda layer: layer


# A chunk of a map of 256 channels and 4 points holds 16 MB of samples; smaller and larger ones measured slower.
QUERIES_PER_CHUNK = 4096


def multi_scale_deformable_attention(
    value: torch.Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
    queries_per_chunk: int = QUERIES_PER_CHUNK,
) -> torch.Tensor:
    """Samples a pyramid bilinearly at each query's points and sums them with its weights.

    Outside a map everything is zero. The sum is the same for every chunk size; in training a chunk's samples are taken
    again in the backward instead of being kept.

    Args:
        value: (batch, sum of height * width, heads, head_dim), the maps one after the other, each in raster order.
        spatial_shapes: (height, width) of each map.
        sampling_locations: (batch, queries, heads, levels, points, 2), (x, y) with 0 and 1 at a map's outer edges.
        attention_weights: (batch, queries, heads, levels, points).
        queries_per_chunk: queries sampled at once.

    Returns:
        (batch, queries, heads * head_dim) in the dtype of `value`.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check_shapes(value, spatial_shapes, sampling_locations, attention_weights)
    batch, _, heads, head_dim = value.shape
    num_queries = sampling_locations.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    with maybe_autocast(value.device.type, enabled=False):
        levels = value.split([height * width for height, width in spatial_shapes], dim=1)
        # (batch, height * width, heads, head_dim) -> (batch * heads, head_dim, height, width)
        maps = [
            level.to(dtype).permute(0, 2, 3, 1).reshape(batch * heads, head_dim, *shape)
            for level, shape in zip(levels, spatial_shapes, strict=True)
        ]
        chunks = []
        keeps_nothing = torch.is_grad_enabled() and num_queries > queries_per_chunk
        for start in range(0, num_queries, queries_per_chunk):
            queries = slice(start, start + queries_per_chunk)
            # (batch, queries, heads, levels, points, ...) -> (batch * heads, queries, levels, points, ...)
            points = sampling_locations[:, queries].to(dtype).transpose(1, 2).flatten(0, 1)
            weights = attention_weights[:, queries].to(dtype).transpose(1, 2).flatten(0, 1)
            if keeps_nothing:
                chunks.append(checkpoint(_weighted_samples, points, weights, *maps, use_reentrant=False))
            else:
                chunks.append(_weighted_samples(points, weights, *maps))
        output = torch.cat(chunks, dim=2)  # (batch * heads, head_dim, queries)
    return output.reshape(batch, heads * head_dim, num_queries).transpose(1, 2).contiguous().to(value.dtype)


def _weighted_samples(points: torch.Tensor, weights: torch.Tensor, *maps: torch.Tensor) -> torch.Tensor:
    """The sum over levels and points: (batch * heads, head_dim, queries)."""
    total = None
    for index, level in enumerate(maps):
        # grid_sample counts from -1 to 1: (batch * heads, head_dim, queries, points)
        samples = nn.functional.grid_sample(
            level, 2 * points[:, :, index] - 1, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        weighted = (samples * weights[:, None, :, index]).sum(dim=-1)
        total = weighted if total is None else total + weighted
    return total


def _check_shapes(
    value: torch.Tensor,
    spatial_shapes: list[tuple[int, int]],
    sampling_locations: torch.Tensor,
    attention_weights: torch.Tensor,
) -> None:
    places = sum(height * width for height, width in spatial_shapes)
    if value.ndim != 4 or value.shape[1] != places:
        raise ValueError(
            f"value has shape {tuple(value.shape)}: it takes (batch, places, heads, head_dim) with the {places} places "
            f"of spatial_shapes={list(spatial_shapes)}."
        )
    expected = (value.shape[0], sampling_locations.shape[1], value.shape[2], len(spatial_shapes))
    fits = sampling_locations.ndim == 6 and tuple(sampling_locations.shape[:4]) == expected
    if not fits or sampling_locations.shape[-1] != 2 or sampling_locations.shape[:-1] != attention_weights.shape:
        raise ValueError(
            f"sampling_locations has shape {tuple(sampling_locations.shape)} and attention_weights "
            f"{tuple(attention_weights.shape)}: they take (batch, queries, heads, levels, points, 2) and the same "
            f"without the 2, here with batch, heads and levels {(expected[0], *expected[2:])}."
        )


@use_kernel_forward_from_hub("MultiScaleDeformableAttention")
class MultiScaleDeformableAttention(nn.Module):
    """`multi_scale_deformable_attention` as a layer that a Hub kernel of the same name can replace on a GPU."""

    def forward(
        self,
        value: torch.Tensor,
        value_spatial_shapes: torch.Tensor,
        value_spatial_shapes_list: list[tuple[int, int]],
        level_start_index: torch.Tensor,
        sampling_locations: torch.Tensor,
        attention_weights: torch.Tensor,
        im2col_step: int,
    ) -> torch.Tensor:
        """See `multi_scale_deformable_attention`; the tensors of shapes and starts and the step are the kernel's."""
        return multi_scale_deformable_attention(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def deformable_attention(
    attend: nn.Module,
    value: torch.Tensor,
    spatial_shapes: list[tuple[int, int]],
    reference_points: torch.Tensor,
    sampling_offsets: torch.Tensor,
    attention_logits: torch.Tensor,
) -> torch.Tensor:
    """Points around each query's reference point, softmax weights over all of them, and the weighted sum; in float32.

    Args:
        attend: a `MultiScaleDeformableAttention`.
        value: (batch, places, heads, head_dim).
        spatial_shapes: (height, width) of each level.
        reference_points: (batch or 1, queries, levels, 2), (x, y) as shares of each level's extent.
        sampling_offsets: (batch, queries, heads, levels, points, 2) in cells of each level.
        attention_logits: (batch, queries, heads, levels, points).

    Returns:
        (batch, queries, heads * head_dim) in the dtype of `value`.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    device = value.device
    with maybe_autocast(device.type, enabled=False):
        sizes = torch.tensor([(width, height) for height, width in spatial_shapes], dtype=dtype, device=device)
        locations = sampling_offsets.to(dtype) / sizes[:, None] + reference_points.to(dtype)[:, :, None, :, None]
        weights = attention_logits.to(dtype).flatten(-2).softmax(dim=-1).view(attention_logits.shape)
        shapes = torch.tensor(spatial_shapes, dtype=torch.int64, device=device)
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(dim=1).cumsum(0)[:-1]])
        output = attend(value.to(dtype), shapes, list(spatial_shapes), starts, locations, weights, 64)
    return output.to(value.dtype)


class DeformableAttention(nn.Module):
    """Queries of one width read maps of another.

    Args:
        query_dim: width of the queries and of the output.
        value_dim: width of the maps.
        attention_dim: width inside; a multiple of `num_heads`.
        num_heads: heads.
        num_levels: maps.
        num_points: points per head and map.
    """

    def __init__(
        self, query_dim: int, value_dim: int, attention_dim: int, num_heads: int, num_levels: int, num_points: int
    ) -> None:
        super().__init__()
        self.points_shape = (num_heads, num_levels, num_points)
        self.sampling_offsets = nn.Linear(query_dim, 2 * math.prod(self.points_shape))
        self.attention_weights = nn.Linear(query_dim, math.prod(self.points_shape))
        self.value_projection = nn.Linear(value_dim, attention_dim)
        self.output_projection = nn.Linear(attention_dim, query_dim)
        self.attend = MultiScaleDeformableAttention()

    def forward(
        self,
        queries: torch.Tensor,
        reference_points: torch.Tensor,
        value: torch.Tensor,
        spatial_shapes: list[tuple[int, int]],
    ) -> torch.Tensor:
        """Reads the maps.

        Args:
            queries: (batch, queries, query_dim).
            reference_points: (1, queries, levels, 2), (x, y) as shares of each level's extent.
            value: (batch, places, attention_dim), what `value_projection` made of the maps; zero where nothing is.
            spatial_shapes: (height, width) of each level.

        Returns:
            (batch, queries, query_dim).
        """
        leading = queries.shape[:2]
        attended = deformable_attention(
            self.attend,
            value.unflatten(-1, (self.points_shape[0], -1)),
            spatial_shapes,
            reference_points,
            self.sampling_offsets(queries).view(*leading, *self.points_shape, 2),
            self.attention_weights(queries).view(*leading, *self.points_shape),
        )
        return self.output_projection(attended)

    def reset_points(self) -> None:
        """Points start on rays around the reference point, one direction per head, with equal weights."""
        heads, levels, points = self.points_shape
        angles = torch.arange(heads, dtype=torch.float32) * (2 * math.pi / heads)
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
        directions = directions / directions.abs().amax(dim=-1, keepdim=True)  # to the edge of the unit square
        distances = torch.arange(1, points + 1, dtype=torch.float32)
        offsets = directions[:, None, None] * distances[:, None]  # (heads, 1, points, 2)
        init.zeros_(self.sampling_offsets.weight)
        init.copy_(self.sampling_offsets.bias, offsets.expand(heads, levels, points, 2).reshape(-1))
        init.zeros_(self.attention_weights.weight)
        init.zeros_(self.attention_weights.bias)


def cell_centers(shape: tuple[int, int], cell_size: int, device: torch.device) -> torch.Tensor:
    """(height * width, 2) float32, (x, y) in pixels of the centres of a map's cells, in raster order."""
    rows, columns = ((torch.arange(count, dtype=torch.float32, device=device) + 0.5) * cell_size for count in shape)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=-1).flatten(0, 1)


def reference_points(
    query_shapes: list[tuple[int, int]],
    query_strides: list[int],
    value_shapes: list[tuple[int, int]],
    value_strides: list[int],
    device: torch.device,
) -> torch.Tensor:
    """Where each query's cell lies in each map, by pixels: maps of any strides and rounded-up sizes stay aligned.

    Args:
        query_shapes: (height, width) of the maps the queries are the cells of, one after the other.
        query_strides: their cells' sides in pixels.
        value_shapes: (height, width) of the maps that are read.
        value_strides: their cells' sides in pixels.
        device: where the points live.

    Returns:
        (1, queries, levels, 2) float32, (x, y) as shares of each level's extent.
    """
    centers = torch.cat(
        [cell_centers(shape, stride, device) for shape, stride in zip(query_shapes, query_strides, strict=True)]
    )
    extents = torch.tensor(
        [
            (width * stride, height * stride)
            for (height, width), stride in zip(value_shapes, value_strides, strict=True)
        ],
        dtype=torch.float32,
        device=device,
    )
    return (centers[:, None] / extents)[None]
