# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A list of images of several sizes gives what each image gives alone."""

import pytest
import torch
from small_models import random_mask, random_pixels, small_model

from sparsepath_vit import SparsePathViTBackbone, SparsePathViTForImageClassification, SparsePathViTModel
from sparsepath_vit.model.image_lists import joined_images

SIZES = [(5, 9), (8, 3), (6, 6)]  # rows and columns of patches of 4 px


@pytest.fixture
def images():
    return [random_pixels(1, *size, seed)[0].double() for seed, size in enumerate(SIZES)]


@pytest.fixture
def masks():
    return [random_mask(1, *size, 0.7, seed)[0] for seed, size in enumerate(SIZES)]


@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("is_nested", [False, True])
@torch.inference_mode()
def test_each_image_of_a_list_gives_what_it_gives_alone(images, masks, is_masked, is_nested):
    model = small_model(SparsePathViTModel, prune_ratio=0.4, pooling="cls_mean").double()
    nest = (lambda entries: [[entry] for entry in entries]) if is_nested else list
    outputs = model(nest(images), patch_mask=nest(masks) if is_masked else None)
    for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
        alone = model(image[None], patch_mask=mask[None] if is_masked else None)
        torch.testing.assert_close(outputs.pooler_output[index], alone.pooler_output[0], rtol=1e-6, atol=1e-6)
        tokens = alone.last_hidden_state.shape[1]
        torch.testing.assert_close(outputs.last_hidden_state[index, :tokens], alone.last_hidden_state[0])
        assert outputs.grid_sizes[index].tolist() == list(SIZES[index])


@torch.inference_mode()
def test_sizes_of_images_that_do_not_fill_their_pixels(images):
    model = small_model(SparsePathViTModel).double()
    sizes = [(12, 20), (32, 12), (24, 24)]
    outputs = model(images, image_sizes=[torch.tensor([size]) for size in sizes[:1]] + sizes[1:])
    alone = model(images[0][None, :, :12, :20])
    torch.testing.assert_close(outputs.pooler_output[0], alone.pooler_output[0])


@torch.inference_mode()
def test_classifier_and_backbone_take_lists(images):
    classifier = small_model(SparsePathViTForImageClassification, num_labels=3).double()
    alone = torch.cat([classifier(image[None]).logits for image in images])
    torch.testing.assert_close(classifier(images).logits, alone, rtol=1e-6, atol=1e-6)
    backbone = small_model(SparsePathViTBackbone).double()
    maps = backbone(images).feature_maps[0]
    for feature_map, image, (rows, columns) in zip(maps, images, SIZES, strict=True):
        torch.testing.assert_close(feature_map[:, :rows, :columns], backbone(image[None]).feature_maps[0][0])


def test_a_batch_is_returned_as_it_is():
    pixels, mask = random_pixels(2, 3, 3), random_mask(2, 3, 3, 0.5)
    assert joined_images(pixels, mask, None, 4) == (pixels, mask, None)


@pytest.mark.parametrize(
    ("pixels", "more", "match"),
    [
        ([], {}, "empty list"),
        ([torch.zeros(1, 3, 8, 8)], {}, r"pixel_values\[0\] is \(1, 3, 8, 8\)"),
        ([torch.zeros(3, 8, 8), "image"], {}, r"pixel_values\[1\] is str"),
        ([torch.zeros(3, 8, 8), torch.zeros(1, 8, 8)], {}, "equally many channels"),
        (
            [torch.zeros(3, 8, 8), torch.zeros(3, 8, 6)],
            {},
            r"pixel_values\[1\] is 8 x 6 px, no multiple of patch_size=4",
        ),
        ([torch.zeros(3, 8, 8)], {"patch_mask": []}, "patch_mask has 0 entries for 1 images"),
        ([torch.zeros(3, 8, 8)], {"patch_mask": [torch.ones(3, 2, dtype=bool)]}, r"patch_mask\[0\] has shape \(3, 2\)"),
        ([torch.zeros(3, 8, 8)], {"image_sizes": [(8, 8), (4, 4)]}, "image_sizes has 2 entries"),
        ([torch.zeros(3, 8, 8)], {"image_sizes": [(8, 12)]}, "image_sizes"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 16, 8)], {"image_sizes": [(16, 8), (16, 8)]}, r"image_sizes\[0\]"),
    ],
)
def test_what_is_no_list_of_images_is_refused_by_name(pixels, more, match):
    with pytest.raises(ValueError, match=match):
        small_model(SparsePathViTModel)(pixels, **more)
