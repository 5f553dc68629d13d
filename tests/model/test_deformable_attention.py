# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Deformable attention against its definition: bilinear samples written out, one point at a time, in float64."""

import itertools
import math

import pytest
import torch
from small_models import large_weights_
from transformers.models.mask2former.modeling_mask2former import multi_scale_deformable_attention as stock_attention

from sparsepath_vit.model.deformable_attention import (
    DeformableAttention,
    MultiScaleDeformableAttention,
    cell_centers,
    multi_scale_deformable_attention,
    reference_points,
)

SHAPES = [(5, 3), (1, 4), (2, 2)]


def random_inputs(queries=7, batch=2, heads=3, head_dim=2, points=3, seed=0, shapes=SHAPES):
    """Value, locations (a third of them outside the maps) and weights, float64."""
    generator = torch.Generator().manual_seed(seed)
    places = sum(height * width for height, width in shapes)
    value = torch.randn(batch, places, heads, head_dim, generator=generator, dtype=torch.float64)
    shape = (batch, queries, heads, len(shapes), points)
    locations = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 1.5 - 0.25
    weights = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return value, locations, weights


def bilinear(cells, x, y):
    """The value at (x, y) of (height, width, channels), cell centres at whole numbers; zero outside."""
    row, column = math.floor(y), math.floor(x)
    total = torch.zeros(cells.shape[2], dtype=torch.float64)
    for one_row in (row, row + 1):
        for one_column in (column, column + 1):
            if 0 <= one_row < cells.shape[0] and 0 <= one_column < cells.shape[1]:
                total += (1 - abs(y - one_row)) * (1 - abs(x - one_column)) * cells[one_row, one_column]
    return total


@torch.no_grad()
def by_definition(value, shapes, locations, weights):
    """Equation 3 of Deformable DETR, point by point."""
    batch, queries, heads, levels, points, _ = locations.shape
    output = torch.zeros(batch, queries, heads, value.shape[-1], dtype=torch.float64)
    maps = value.split([height * width for height, width in shapes], dim=1)
    for image, query, head, level, point in itertools.product(*map(range, (batch, queries, heads, levels, points))):
        height, width = shapes[level]
        cells = maps[level][image, :, head].view(height, width, -1)
        x, y = locations[image, query, head, level, point].tolist()
        sample = bilinear(cells, x * width - 0.5, y * height - 0.5)
        output[image, query, head] += float(weights[image, query, head, level, point]) * sample
    return output.flatten(2)


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_equals_the_definition_for_every_chunk_size(chunk):
    value, locations, weights = random_inputs()
    expected = by_definition(value, SHAPES, locations, weights)
    output = multi_scale_deformable_attention(value, SHAPES, locations, weights, chunk)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    single = multi_scale_deformable_attention(value.float(), SHAPES, locations.float(), weights.float(), chunk)
    assert (single - expected).abs().max() < 5e-6


def test_chunks_give_the_same_gradients():
    """In training the samples of a chunk are taken again in the backward."""
    gradients = []
    for chunk in (100, 2):
        inputs = [tensor.requires_grad_() for tensor in random_inputs()]
        output = multi_scale_deformable_attention(inputs[0], SHAPES, *inputs[1:], chunk)
        gradients.append(torch.autograd.grad((output**3).sum(), inputs))
    for one, other in zip(*gradients, strict=True):
        assert one.abs().max() > 0.1
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_equals_the_function_it_replaces():
    value, locations, weights = random_inputs(queries=50, seed=1)
    expected = stock_attention(value, SHAPES, locations, weights)
    torch.testing.assert_close(multi_scale_deformable_attention(value, SHAPES, locations, weights, 16), expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_features_are_sampled_at_float32_points(autocast):
    """With bfloat16 coordinates a point on a 200 cell wide map moves by up to half a cell."""
    shapes = [(1, 200)]
    value = torch.arange(200.0).view(1, 200, 1, 1)
    x = torch.linspace(0.005, 0.99, 64)
    locations = torch.stack([x, torch.full_like(x, 0.5)], dim=-1).view(1, 64, 1, 1, 1, 2)
    weights = torch.ones(1, 64, 1, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = multi_scale_deformable_attention(value.bfloat16(), shapes, locations, weights)
    assert output.dtype == torch.bfloat16
    expected = (x * 200 - 0.5).bfloat16()
    assert torch.equal(output.flatten(), expected)


def test_shapes_that_do_not_fit_are_named():
    value, locations, weights = random_inputs()
    with pytest.raises(ValueError, match=r"value has shape \(2, 22, 3, 2\).*the 23 places"):
        multi_scale_deformable_attention(value[:, 1:], SHAPES, locations, weights)
    with pytest.raises(ValueError, match=r"sampling_locations has shape \(2, 7, 3, 2, 3, 2\)"):
        multi_scale_deformable_attention(value, SHAPES, locations[:, :, :, 1:], weights[:, :, :, 1:])
    with pytest.raises(ValueError, match="attention_weights"):
        multi_scale_deformable_attention(value, SHAPES, locations, weights[:, :5])


def test_a_hub_kernel_may_replace_the_layer():
    """The name and the arguments are those of the kernel that Transformers maps."""
    value, locations, weights = random_inputs()
    shapes = torch.tensor(SHAPES)
    output = MultiScaleDeformableAttention()(value, shapes, SHAPES, torch.tensor([0, 15, 19]), locations, weights, 64)
    assert torch.equal(output, multi_scale_deformable_attention(value, SHAPES, locations, weights))


def test_cells_of_maps_of_rounded_up_size_stay_on_their_pixels():
    """70 px: 5 patches of 14 px, and a map of stride 16 with 5 cells that reach to 80 px."""
    points = reference_points([(5, 5)], [16], [(5, 5), (3, 3)], [14, 32], torch.device("cpu"))
    assert points.shape == (1, 25, 2, 2) and points.dtype == torch.float32
    x_of_third_cell = 2.5 * 16
    torch.testing.assert_close(points[0, 2, 0], torch.tensor([x_of_third_cell / 70, 8 / 70]))
    torch.testing.assert_close(points[0, 2, 1], torch.tensor([x_of_third_cell / 96, 8 / 96]))
    assert cell_centers((2, 3), 4, torch.device("cpu")).tolist() == [[2, 2], [6, 2], [10, 2], [2, 6], [6, 6], [10, 6]]


def test_the_layer_equals_its_parts_written_out():
    torch.manual_seed(0)
    shapes = [(4, 3), (2, 2)]
    layer = large_weights_(DeformableAttention(6, 5, 8, num_heads=2, num_levels=2, num_points=3)).double()
    queries, maps = torch.randn(2, 9, 6).double(), torch.randn(2, 16, 5).double()
    points = torch.rand(1, 9, 2, 2).double()
    value = layer.value_projection(maps)
    output = layer(queries, points, value, shapes)

    offsets = layer.sampling_offsets(queries).view(2, 9, 2, 2, 3, 2)
    locations = torch.empty_like(offsets)
    for level, (height, width) in enumerate(shapes):
        locations[..., level, :, 0] = points[:, :, None, level, None, 0] + offsets[..., level, :, 0] / width
        locations[..., level, :, 1] = points[:, :, None, level, None, 1] + offsets[..., level, :, 1] / height
    weights = layer.attention_weights(queries).view(2, 9, 2, 6).softmax(-1).view(2, 9, 2, 2, 3)
    attended = by_definition(value.view(2, 16, 2, 4), shapes, locations, weights)
    torch.testing.assert_close(output, layer.output_projection(attended), rtol=0, atol=1e-10)


def test_points_start_on_rays_of_their_own_direction_and_growing_distance():
    layer = DeformableAttention(4, 4, 8, num_heads=8, num_levels=2, num_points=3)
    layer.reset_points()
    offsets = layer.sampling_offsets.bias.view(8, 2, 3, 2)
    for head in range(8):
        for point in range(3):
            for level in range(2):
                x, y = offsets[head, level, point].tolist()
                assert max(abs(x), abs(y)) == pytest.approx(point + 1)
                assert math.atan2(y, x) % (2 * math.pi) == pytest.approx(head * math.pi / 4, abs=1e-5)
    assert not layer.sampling_offsets.weight.any() and not layer.attention_weights.bias.any()
