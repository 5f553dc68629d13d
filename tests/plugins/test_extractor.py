# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from slide_files import stained_image

from sparsepath_vit import tiny_checkpoint
from sparsepath_vit.plugins import FeatureExtractor


@pytest.fixture(scope="module")
def extractor(model_folder):
    return FeatureExtractor(model_folder, prune_ratio=0.0)


def image_of(width, height):
    return stained_image(width, height, [(16, 16, width // 2, height - 40)], seed=width)


@pytest.mark.parametrize(("width", "height"), [(96, 96), (100, 77), (163, 90)])
def test_any_size_gives_what_the_image_processor_gives(extractor, width, height):
    """At 1000 px a toolkit's own padding made 72 x 72 tokens of 71 x 71."""
    image = image_of(width, height)
    pixels = extractor.transform(image)
    assert pixels.shape == (3, height, width) and pixels.dtype == torch.float32
    expected = extractor.model(**extractor.processor([image], return_tensors="pt"))
    assert torch.allclose(extractor(pixels[None]), expected.pooler_output, atol=1e-5)
    cls_token, maps = extractor.tokens(pixels[None])
    rows, columns = extractor.grid_size(height, width)
    assert (rows, columns) == (round(height / 16), round(width / 16)) and maps.shape == (1, 32, rows, columns)
    assert torch.allclose(maps, expected.to_dense_map()[:, :, :rows, :columns], atol=1e-5)
    assert torch.allclose(cls_token, expected.last_hidden_state[:, 0], atol=1e-5)
    assert torch.allclose(extractor.feature_maps(pixels[None], [2, 4])[1], maps, atol=1e-5)


def test_images_of_all_kinds_are_the_same_pixels(extractor):
    array = image_of(100, 80)
    expected = extractor.transform(array)
    for image in (Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1), np.moveaxis(array, 2, 0)):
        assert torch.equal(extractor.transform(image), expected)
    assert torch.equal(pickle.loads(pickle.dumps(extractor.transform))(array), expected)  # worker processes
    assert "resize=None" in repr(extractor.transform)


def test_white_is_masked_where_the_checkpoint_asks_for_it(extractor, model_folder):
    image = image_of(160, 128)
    masking = FeatureExtractor(model_folder, prune_ratio=0.0)
    masking.processor.mask_background = True
    expected = masking.model(**masking.processor([image], return_tensors="pt")).pooler_output
    pixels = masking.transform(image)[None]
    assert torch.allclose(masking(pixels), expected, atol=1e-5)
    assert not torch.allclose(extractor(pixels), expected, atol=1e-2)


def test_a_batch_is_its_images(extractor):
    pixels = torch.stack([extractor.transform(image_of(100, 90)), extractor.transform(image_of(100, 90) // 2)])
    for index in range(2):
        assert torch.allclose(extractor(pixels)[index], extractor(pixels[index : index + 1])[0], atol=1e-5)


def test_dense_maps_of_a_checkpoint_that_prunes_are_refused_or_filled(model_folder):
    pixels = torch.randn(1, 3, 96, 96)
    with pytest.raises(ValueError, match=r"prune_ratio=0\.5 leaves holes .* unprune=\"scatter\""):
        FeatureExtractor(model_folder).tokens(pixels)
    filled = FeatureExtractor(model_folder, unprune="scatter").tokens(pixels)[1]
    assert filled.shape == (1, 32, 6, 6) and filled.abs().amin(dim=1).gt(0).all()


def test_features_are_of_a_type_that_numpy_knows(model_folder):
    pixels = torch.randn(1, 3, 96, 96)
    half = FeatureExtractor(model_folder, dtype="bfloat16", output_dtype="float16")
    assert half(pixels).numpy().dtype == np.float16
    assert FeatureExtractor(model_folder, dtype="bfloat16")(pixels).numpy().dtype == np.float32
    with pytest.raises(ValueError, match="output_dtype='bfloat16' is not possible: NumPy"):
        FeatureExtractor(model_folder, output_dtype="bfloat16")


def test_the_name_tells_checkpoints_apart(extractor, model_folder):
    assert extractor.name.startswith(f"{model_folder.name}-")
    assert FeatureExtractor(tiny_checkpoint()).name.startswith("tiny-")
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
