# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Embeddings against patch-by-patch arithmetic in float64 and timm's resampling of position embeddings."""

import numpy as np
import pytest
import torch
from plain_vit import cubic_weights
from small_models import large_weights_, random_mask, random_pixels, small_config
from timm.layers import resample_abs_pos_embed
from torch.nn.functional import interpolate

from sparsepath_vit.model import embeddings as embeddings_module
from sparsepath_vit.model.embeddings import SparsePathViTEmbeddings, resampling_weights

PATCH = 4


def small_embeddings(**overrides):
    return large_weights_(SparsePathViTEmbeddings(small_config(**overrides))).eval()


def embed(embeddings, pixels, patch_mask=None, image_sizes=None):
    """(batch, G + N, hidden_size) in raster order, and the grid."""
    grid = embeddings.token_grid(pixels, patch_mask, image_sizes)
    return grid.to_raster(embeddings(pixels, grid)), grid


def expected_image(embeddings, pixels):
    """Tokens of one (channels, height, width) image in raster order, float64: one patch after the other."""
    config = embeddings.config
    weight, bias = (parameter.double() for parameter in embeddings.patch_embeddings.projection.parameters())
    rows, columns = (side // PATCH for side in pixels.shape[1:])
    prefix = config.num_prefix_position_embeddings
    positions = resample_abs_pos_embed(
        embeddings.position_embeddings, (rows, columns), num_prefix_tokens=prefix, verbose=False
    )[0].double()
    global_tokens = [embeddings.cls_token[0, 0], *getattr(embeddings, "register_tokens", torch.zeros(1, 0, 32))[0]]
    tokens = [token.double() for token in global_tokens]
    for index in range(prefix):
        tokens[index] = tokens[index] + positions[index]
    for row in range(rows):
        for column in range(columns):
            top, left = row * PATCH, column * PATCH
            patch = pixels[:, top : top + PATCH, left : left + PATCH].double()
            token = (weight * patch).sum(dim=(1, 2, 3)) + bias
            tokens.append(token + positions[prefix + row * columns + column])
    return torch.stack(tokens)


def assert_close(actual, expected, tolerance=3e-6):
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("registers, prefix", [(0, 0), (0, 1), (2, 0), (2, 1), (2, 3)])
def test_tokens_are_patches_plus_positions_after_the_global_tokens(registers, prefix):
    embeddings = small_embeddings(num_register_tokens=registers, num_prefix_position_embeddings=prefix)
    pixels = random_pixels(2, 7, 5)
    tokens, _ = embed(embeddings, pixels)
    for image in range(2):
        assert_close(tokens[image], expected_image(embeddings, pixels[image]))


@torch.no_grad()
@pytest.mark.parametrize("rows, columns", [(6, 6), (1, 1), (1, 9), (13, 2), (11, 17)])
def test_positions_are_resampled_as_timm_does(rows, columns):
    embeddings = small_embeddings()
    expected = resample_abs_pos_embed(embeddings.position_embeddings, (rows, columns), num_prefix_tokens=0)
    position_map = embeddings._position_map((rows, columns), 0, rows)
    assert_close(position_map.flatten(0, 1), expected[0].double())
    if (rows, columns) == (6, 6):
        assert torch.equal(position_map.flatten(0, 1), embeddings.position_embeddings[0])


@pytest.mark.parametrize("antialias", [True, False])
def test_resampling_weights_are_those_of_interpolate(antialias):
    signals = torch.randn(16, 3, dtype=torch.float64)
    for size in (1, 5, 16, 17, 100):
        expected = interpolate(signals[None, None], size=(size, 3), mode="bicubic", antialias=antialias)
        weights = resampling_weights(size, 16, signals, antialias)
        assert_close(weights @ signals, expected[0, 0], 1e-12)
        if antialias:
            assert_close(weights, cubic_weights(size, 16), 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("rows, columns", [(6, 6), (1, 9), (13, 2), (11, 17), (3, 4)])
def test_positions_without_antialiasing_are_those_of_interpolate(rows, columns):
    """As Transformers' ViT and Dinov2 do, which resample both directions at once."""
    embeddings = small_embeddings(position_antialias=False)
    image = embeddings.position_embeddings.double().view(1, 6, 6, -1).permute(0, 3, 1, 2)
    expected = interpolate(image, size=(rows, columns), mode="bicubic", align_corners=False)
    assert_close(embeddings._position_map((rows, columns), 0, rows), expected[0].permute(1, 2, 0))


@torch.no_grad()
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("rows, columns", [(6, 6), (6, 9), (1, 9), (13, 2), (11, 17), (61, 122)])
def test_positions_with_an_offset_are_those_of_dinov2(rows, columns, antialias):
    """DINOv2's own `interpolate_pos_encoding` for models without registers: `interpolate_offset=0.1`."""
    embeddings = small_embeddings(position_antialias=antialias, position_interpolation_offset=0.1)
    image = embeddings.position_embeddings.double().view(1, 6, 6, -1).permute(0, 3, 1, 2)
    expected = image
    if (rows, columns) != (6, 6):
        scale = ((rows + 0.1) / 6, (columns + 0.1) / 6)
        expected = interpolate(image, scale_factor=scale, mode="bicubic", antialias=antialias)
    assert expected.shape[2:] == (rows, columns)
    position_map = embeddings._position_map((rows, columns), 0, rows)
    assert_close(position_map, expected[0].permute(1, 2, 0))
    assert_close(embeddings._position_map((rows, columns), rows // 2, 1), position_map[rows // 2 :][:1].double())


@torch.no_grad()
def test_the_offset_matters_everywhere_but_on_the_stored_grid():
    plain, shifted = small_embeddings(), small_embeddings(position_interpolation_offset=0.1)
    assert torch.equal(plain._position_map((6, 6), 0, 6), shifted._position_map((6, 6), 0, 6))
    for size in [(6, 7), (12, 12)]:
        difference = plain._position_map(size, 0, 6) - shifted._position_map(size, 0, 6)
        assert difference.abs().max() > 0.01 * plain.position_embeddings.abs().max()


@torch.no_grad()
def test_a_single_column_is_resampled_like_a_single_row():
    """torch mixes up the values of a map that becomes one column wide (and timm with it)."""
    embeddings = small_embeddings()
    column = embeddings._position_map((5, 1), 0, 5)
    grid = embeddings.position_embeddings.data.view(6, 6, -1)
    embeddings.position_embeddings.copy_(grid.transpose(0, 1).flatten(0, 1))
    assert_close(column[:, 0], embeddings._position_map((1, 5), 0, 1)[0].double())


@torch.no_grad()
def test_autocast_does_not_round_the_positions():
    """Regression: the resampling ran in bfloat16 under autocast, and positions were off by a percent."""
    embeddings = small_embeddings()
    expected = embeddings._position_map((9, 7), 0, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embeddings._position_map((9, 7), 0, 9), expected)


@torch.no_grad()
def test_bfloat16_weights_are_resampled_in_float32_and_rounded_once():
    embeddings = small_embeddings().to(torch.bfloat16)
    expected = resample_abs_pos_embed(embeddings.position_embeddings, (9, 7), num_prefix_tokens=0)
    rounding = 2**-8
    position_map = embeddings._position_map((9, 7), 0, 9)
    assert position_map.dtype == torch.bfloat16
    assert_close(position_map.flatten(0, 1), expected[0].double(), rounding)


@torch.no_grad()
def test_images_of_different_sizes_have_the_positions_of_their_own_grids():
    embeddings = small_embeddings(num_prefix_position_embeddings=1)
    pixels = random_pixels(3, 7, 8)
    sizes = [(28, 32), (12, 32), (28, 32)]
    tokens, grid = embed(embeddings, pixels, image_sizes=sizes)
    assert grid.grid_sizes == ((7, 8), (3, 8), (7, 8))
    for image, (height, width) in enumerate(sizes):
        expected = expected_image(embeddings, pixels[image, :, :height, :width])
        assert_close(tokens[image, : len(expected)], expected)
    same, _ = embed(embeddings, pixels, image_sizes=torch.tensor(sizes))
    assert torch.equal(same, tokens)


@torch.no_grad()
def test_absent_patches_leave_no_token_and_the_others_unchanged():
    embeddings = small_embeddings()
    pixels, mask = random_pixels(2, 7, 5), random_mask(2, 7, 5, 0.5)
    tokens, grid = embed(embeddings, pixels, mask)
    assert list(grid.counts) == mask.flatten(1).sum(dim=1).tolist()
    for image in range(2):
        is_token = torch.cat([torch.ones(3, dtype=torch.bool), mask[image].flatten()])
        expected = expected_image(embeddings, pixels[image])[is_token]
        assert_close(tokens[image, : len(expected)], expected)


class TestStrips:
    @pytest.fixture(autouse=True)
    def short_strips(self, monkeypatch):
        monkeypatch.setattr(embeddings_module, "ROWS_PER_STRIP", 3)

    @torch.no_grad()
    @pytest.mark.parametrize("share", [None, 0.4])
    @pytest.mark.parametrize("rows", [7, 9])
    def test_embedding_in_strips_equals_embedding_at_once(self, rows, share, monkeypatch):
        embeddings = small_embeddings(num_prefix_position_embeddings=1)
        pixels, mask = random_pixels(1, rows, 5), None if share is None else random_mask(1, rows, 5, share)
        grid = embeddings.token_grid(pixels, mask, None)
        calls = []
        projection = embeddings.patch_embeddings.projection
        projection.register_forward_pre_hook(lambda module, arguments: calls.append(arguments[0].shape[2] // PATCH))
        in_strips = embeddings(pixels, grid)
        assert calls == [3] * (rows // 3) + ([rows % 3] if rows % 3 else [])
        monkeypatch.setattr(embeddings_module, "_TOKENS_AT_ONCE", 1)  # one row after the other
        assert_close(embeddings(pixels, grid), in_strips.double(), 1e-6)
        monkeypatch.setattr(embeddings_module, "ROWS_PER_STRIP", rows)
        assert_close(in_strips, embeddings(pixels, grid).double(), 1e-6)

    @torch.no_grad()
    def test_an_image_smaller_than_its_canvas(self):
        """Regression: strips of the whole canvas met positions of the image's own grid."""
        embeddings = small_embeddings()
        pixels = random_pixels(1, 10, 8)
        tokens, _ = embed(embeddings, pixels, image_sizes=[(32, 20)])
        assert_close(tokens[0], expected_image(embeddings, pixels[0, :, :32, :20]))

    def test_training_embeds_at_once_with_gradients(self):
        embeddings = small_embeddings()
        tokens, _ = embed(embeddings, random_pixels(1, 7, 5))
        tokens.sum().backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in embeddings.parameters())

    @torch.no_grad()
    @pytest.mark.parametrize("strips", [[(3, 5), (3, 5)], [(4, 5), (4, 5)], [(7, 4)], [(7, 6)]])
    def test_strips_that_do_not_fit_the_grid(self, strips):
        embeddings = small_embeddings()
        grid = embeddings.token_grid(random_pixels(1, 7, 5), None, None)
        with pytest.raises(ValueError, match=r"strips hold .*the grid has .*7"):
            embeddings.embed_strips([random_pixels(1, *strip) for strip in strips], grid)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_the_patch_projection_in_16_bits_is_the_convolution(dtype, tolerance):
    projection = small_embeddings().patch_embeddings.projection.to(dtype)
    pixels = random_pixels(2, 3, 5).to(dtype).requires_grad_()
    weights = torch.randn(2, 32, 3, 5)
    exact = [states.detach().double().requires_grad_() for states in (pixels, projection.weight, projection.bias)]
    expected = torch.nn.functional.conv2d(*exact, stride=PATCH)
    gradients = torch.autograd.grad((expected * weights).sum(), exact)
    found = projection(pixels)
    found_gradients = torch.autograd.grad((found * weights.to(dtype)).sum(), (pixels, *projection.parameters()))
    for actual, wanted in zip((found, *found_gradients), (expected, *gradients), strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - wanted).abs().max() <= tolerance * wanted.abs().max()


class TestBadInput:
    def refuse(self, message, pixels=None, patch_mask=None, image_sizes=None):
        pixels = random_pixels(2, 3, 5) if pixels is None else pixels
        with pytest.raises(ValueError, match=message):
            embed(small_embeddings(), pixels, patch_mask, image_sizes)

    @pytest.mark.parametrize("shape", [(3, 12, 20), (0, 3, 12, 20), (1, 1, 12, 20), (1, 4, 12, 20), (1, 12, 20, 3)])
    def test_channels_or_axes(self, shape):
        self.refuse(r"pixel_values has shape .*\(batch, 3, height, width\).*ImageProcessor", torch.zeros(shape))

    @pytest.mark.parametrize("height, width", [(3, 20), (20, 3)])
    def test_smaller_than_a_patch(self, height, width):
        self.refuse(rf"{height} x {width} px, smaller than one patch of 4 px", torch.zeros(1, 3, height, width))

    @pytest.mark.parametrize("height, width", [(13, 20), (12, 18)])
    def test_no_multiple_of_the_patch_size(self, height, width):
        self.refuse(rf"{height} x {width} px, no multiple of patch_size=4.*pads", torch.zeros(1, 3, height, width))

    @pytest.mark.parametrize("number", [float("nan"), float("inf")])
    def test_pixels_that_are_not_finite(self, number):
        pixels = random_pixels(2, 3, 5)
        pixels[1, 2, 3, 4] = number
        self.refuse("pixel_values holds NaN or infinite numbers.*check the image", pixels)

    def test_pixels_that_are_no_tensor(self):
        self.refuse(r"pixel_values is a ndarray: it takes a torch.Tensor.*return_tensors", np.zeros((1, 3, 8, 8)))

    def test_raw_pixels(self):
        """Regression: pixels in 0..255 were taken as they are."""
        self.refuse("pixel_values is torch.int16: it takes normalised", torch.zeros(1, 3, 12, 20, dtype=torch.int16))
        self.refuse("torch.uint8 and this model's config does not", torch.zeros(1, 3, 12, 20, dtype=torch.uint8))

    @pytest.mark.parametrize("shape", [(2, 4, 5), (2, 3, 6), (1, 3, 5), (2, 15), (2, 1, 3, 5)])
    def test_mask_of_another_shape(self, shape):
        """Regression: a mask larger than the image was cropped without a word."""
        self.refuse(r"patch_mask has shape .*here \(2, 3, 5\)", patch_mask=torch.ones(shape, dtype=torch.bool))

    def test_mask_of_numbers(self):
        self.refuse("patch_mask is torch.int64: it takes torch.bool", patch_mask=torch.ones(2, 3, 5, dtype=torch.int64))

    def test_mask_without_a_present_token(self):
        mask = random_mask(2, 3, 5, 0.5)
        mask[0] = False
        self.refuse("patch_mask leaves image 0 without a present patch token.*mask less", patch_mask=mask)

    @pytest.mark.parametrize(
        "sizes",
        [
            [(12, 20)],
            [(12, 20)] * 3,
            [(12, 24), (12, 20)],
            [(12, 20), (0, 20)],
            [12, 20],
            [(12.0, 20.0)] * 2,
            [(12,)] * 2,
        ],
    )
    def test_image_sizes_that_do_not_fit(self, sizes):
        self.refuse(r"image_sizes is \[.*one \(height, width\).*here 2.*12 x 20 px", image_sizes=sizes)
