# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Pixels of uint8, which a model normalises itself, give the very numbers of those that the processor normalised."""

import numpy as np
import pytest
import torch
from small_models import SMALL, large_weights_, small_config, small_model
from small_segmentation import SMALL_ADAPTER, segmentation_model

from sparsepath_vit import (
    SparsePathViTAdapterBackbone,
    SparsePathViTAdapterConfig,
    SparsePathViTBackbone,
    SparsePathViTForImageClassification,
    SparsePathViTImageProcessor,
    SparsePathViTImageProcessorPil,
    SparsePathViTModel,
)
from sparsepath_vit.model import embeddings as embeddings_module
from sparsepath_vit.runtime.pixels import prepare

MEAN, STD = [0.7, 0.5, 0.65], [0.2, 0.25, 0.19]
NORMALISATION = {"image_mean": MEAN, "image_std": STD}
PROCESSORS = [SparsePathViTImageProcessor, SparsePathViTImageProcessorPil]


def images(*shapes):
    generator = np.random.default_rng(sum(height for height, _ in shapes))
    return [generator.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]


def both_inputs(batch, processor_class=SparsePathViTImageProcessor):
    """What a processor makes of images, normalised and raw."""
    processor = processor_class(patch_size=4, **NORMALISATION)
    normalised = processor(batch, return_tensors="pt")
    raw = processor(batch, do_rescale=False, do_normalize=False, return_tensors="pt")
    assert raw["pixel_values"].dtype == torch.uint8
    return normalised, raw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("processor_class", PROCESSORS)
@torch.no_grad()
def test_bitwise_the_features_of_normalised_pixels(processor_class, dtype):
    normalised, raw = both_inputs(images((50, 31), (20, 44)), processor_class)
    model = small_model(SparsePathViTModel, **NORMALISATION).to(dtype)
    expected, found = model(**normalised), model(**raw)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
def test_in_strips_too(monkeypatch):
    normalised, raw = both_inputs(images((50, 31)))
    model = small_model(SparsePathViTModel, **NORMALISATION)
    monkeypatch.setattr(embeddings_module, "ROWS_PER_STRIP", 3)
    found = model(**raw).last_hidden_state
    assert torch.equal(found, model(**normalised).last_hidden_state)


@torch.no_grad()
def test_classifier_backbone_adapter_and_segmentation():
    normalised, raw = both_inputs(images((45, 33)))
    classifier = small_model(SparsePathViTForImageClassification, num_labels=3, **NORMALISATION)
    assert torch.equal(classifier(**raw).logits, classifier(**normalised).logits)
    adapter_config = SparsePathViTAdapterConfig(**SMALL, **SMALL_ADAPTER, **NORMALISATION)
    for backbone in (
        small_model(SparsePathViTBackbone, **NORMALISATION),
        large_weights_(SparsePathViTAdapterBackbone(adapter_config)).eval(),
    ):
        maps = zip(backbone(**raw).feature_maps, backbone(**normalised).feature_maps, strict=True)
        assert all(torch.equal(found, expected) for found, expected in maps)
    for head in ("queries", "mask2former"):
        segmenter = segmentation_model(head, vit=NORMALISATION)
        assert torch.equal(segmenter(**raw).masks_queries_logits, segmenter(**normalised).masks_queries_logits)


def test_gradients_of_the_weights_are_the_same():
    normalised, raw = both_inputs(images((24, 24)))
    model = small_model(SparsePathViTModel, **NORMALISATION)
    gradients = []
    for inputs in (normalised, raw):
        model.zero_grad()
        model(**inputs).pooler_output.sum().backward()
        gradients.append(model.embeddings.patch_embeddings.projection.weight.grad.clone())
    assert torch.equal(*gradients)


def test_a_model_that_does_not_know_how_refuses_them():
    _, raw = both_inputs(images((24, 24)))
    with pytest.raises(ValueError, match=r"pixel_values is torch\.uint8 and this model's config does not say how"):
        small_model(SparsePathViTModel)(**raw)
    with pytest.raises(ValueError, match="image_mean and image_std to those of the image processor"):
        small_model(SparsePathViTModel, image_mean=MEAN)(**raw)


@pytest.mark.parametrize("processor_class", PROCESSORS)
def test_a_batch_with_a_float_image_is_float(processor_class):
    first, second = images((8, 8), (8, 8))
    batch = [first, (second / 255).astype(np.float32)]
    outputs = processor_class(patch_size=4)(batch, do_rescale=False, do_normalize=False, return_tensors="pt")
    assert outputs["pixel_values"].dtype == torch.float32


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"image_mean": [0.5], "image_std": STD}, r"image_mean=\[0.5\] does not fit num_channels=3"),
        ({"image_mean": MEAN, "image_std": [0.5, 0.5]}, r"image_std=\[0.5, 0.5\] does not fit num_channels=3"),
        ({"image_mean": MEAN, "image_std": [0.5, 0.0, 0.5]}, "pixels are divided by it"),
    ],
)
def test_wrong_numbers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        small_config(**fields)


class TestPrepare:
    """Pixels stay raw only where the model gives them the processor's numbers."""

    def dtype_for(self, config, **settings):
        processor = SparsePathViTImageProcessor(patch_size=4, **{**NORMALISATION, **settings})
        return prepare(processor, images((8, 8)), config=config)["pixel_values"].dtype

    def test_raw_where_both_normalise_alike(self):
        assert self.dtype_for(small_config(**NORMALISATION)) == torch.uint8
        assert self.dtype_for(small_config(image_mean=[0.5] * 3, image_std=STD), image_mean=0.5) == torch.uint8

    @pytest.mark.parametrize(
        "settings",
        [{"image_mean": STD}, {"image_std": MEAN}, {"rescale_factor": 1 / 128}, {"do_normalize": False}],
        ids=str,
    )
    def test_normalised_where_the_processor_does_something_else(self, settings):
        assert self.dtype_for(small_config(**NORMALISATION), **settings) == torch.float32

    def test_normalised_where_the_model_does_not_know_how(self):
        assert self.dtype_for(small_config()) == torch.float32
