# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The image processor, both backends: numbers against a plain formula, saving and loading, bad input, real regions."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from places import SHARED_DATA
from transformers import AutoImageProcessor, pipeline
from transformers.utils import logging
from transformers.utils.import_utils import is_torchvision_greater_or_equal

import sparsepath_vit
from sparsepath_vit import SparsePathViTConfig, SparsePathViTForImageClassification, SparsePathViTModel
from sparsepath_vit.model.image_processing_sparsepath_vit import (
    SparsePathViTImageProcessor,
    SparsePathViTImageProcessorPil,
)

BACKENDS = {"torchvision": SparsePathViTImageProcessor, "pil": SparsePathViTImageProcessorPil}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACKAGE = Path(sparsepath_vit.__file__).parent / "model"
needs_lanczos = pytest.mark.skipif(
    not is_torchvision_greater_or_equal("0.27"),
    reason="older torchvision resamples bicubically instead, with a warning",
)
SHIPPED = ("image_processing_sparsepath_vit.py", "image_inputs.py", "patch_presence.py", "pillow_images.py")
DATA = SHARED_DATA
ROIS = sorted((DATA / "rois").glob("*.*")) + sorted((DATA / "classification/osteosarcoma_roi").glob("*/*.jpg"))[::11]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def processor_class(backend):
    return BACKENDS[backend]


@pytest.fixture
def registered():
    AutoImageProcessor.register(SparsePathViTConfig, image_processor_classes=BACKENDS, exist_ok=True)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def tissue(height, width):
    """Pink tissue with texture in the left half, white glass in the right half, as (height, width, 3) uint8."""
    image = np.full((height, width, 3), 242, dtype=np.uint8)
    image[:, : width // 2] = (noise(height, width // 2) * [0.3, 0.4, 0.3] + [150, 40, 100]).astype(np.uint8)
    return image


def normalized(image, mean=MEAN, std=STD):
    """(height, width, 3) uint8 -> (3, height, width) by the definition, in float64."""
    return torch.from_numpy(((image / 255.0 - mean) / std).transpose(2, 0, 1))


def white():
    return normalized(np.full((1, 1, 3), 255, dtype=np.uint8))


def assert_same(result, expected, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(result).double(), expected.double(), rtol=0, atol=atol)


class TestOutputs:
    @pytest.mark.parametrize("height, width", [(14, 14), (28, 42), (15, 14), (40, 57)])
    def test_one_image(self, processor_class, height, width):
        image = noise(height, width)
        outputs = processor_class()(image, return_tensors="pt")
        rows, columns = -(-height // 14), -(-width // 14)
        expected = white().expand(3, rows * 14, columns * 14).clone()
        expected[:, :height, :width] = normalized(image)
        assert list(outputs) == ["pixel_values", "patch_mask", "image_sizes"]
        assert outputs.pixel_values.dtype == torch.float32
        assert_same(outputs.pixel_values, expected[None])
        assert outputs.patch_mask.dtype == torch.bool
        coverage = torch.nn.functional.avg_pool2d(
            torch.nn.functional.pad(torch.ones(1, height, width), (0, columns * 14 - width, 0, rows * 14 - height)), 14
        )
        assert torch.equal(outputs.patch_mask, coverage >= 0.5)
        assert outputs.image_sizes.dtype == torch.int64
        assert outputs.image_sizes.tolist() == [[rows * 14, columns * 14]]

    def test_a_batch_of_different_sizes_is_the_single_images_padded(self, processor_class):
        images = [noise(30, 70, 0), noise(61, 28, 1), noise(14, 14, 2)]
        outputs = processor_class()(images, return_tensors="pt")
        assert outputs.pixel_values.shape == (3, 3, 70, 70)
        assert outputs.image_sizes.tolist() == [[42, 70], [70, 28], [14, 14]]
        for index, image in enumerate(images):
            single = processor_class()(image, return_tensors="pt")
            rows, columns = single.patch_mask.shape[1:]
            expected = white().expand(3, 70, 70).clone()
            expected[:, : rows * 14, : columns * 14] = single.pixel_values[0]
            assert_same(outputs.pixel_values[index], expected, atol=1e-6)
            assert torch.equal(outputs.patch_mask[index, :rows, :columns], single.patch_mask[0])
            assert outputs.patch_mask[index].sum() == single.patch_mask.sum()

    def test_every_kind_of_image_gives_the_same_numbers(self, processor_class, tmp_path):
        image = noise(30, 45)
        PIL.Image.fromarray(image).save(tmp_path / "region.png")
        kinds = [
            PIL.Image.fromarray(image),
            image,
            image.transpose(2, 0, 1),
            torch.from_numpy(image).permute(2, 0, 1),
            str(tmp_path / "region.png"),
            tmp_path / "region.png",
            (image / 255).astype(np.float32),
            torch.from_numpy(image / 255).permute(2, 0, 1),
        ]
        outputs = processor_class()(kinds, return_tensors="pt")
        assert_same(outputs.pixel_values[:, :, :30, :45], normalized(image).expand(len(kinds), -1, -1, -1))
        batch = processor_class()(np.stack([image, image]), return_tensors="pt")
        assert_same(batch.pixel_values, outputs.pixel_values[:2], atol=0)
        nested = processor_class()([[image], [image]], return_tensors="pt")
        assert_same(nested.pixel_values, outputs.pixel_values[:2], atol=0)

    def test_return_tensors(self, backend, processor_class):
        images = [noise(30, 45, 0), noise(45, 30, 1)]
        tensors = processor_class()(images, return_tensors="pt")
        arrays = processor_class()(images, return_tensors="np")
        lists = processor_class()(images)
        for name in processor_class.model_input_names:
            assert isinstance(arrays[name], np.ndarray) and arrays[name].dtype == tensors[name].numpy().dtype
            np.testing.assert_array_equal(arrays[name], tensors[name].numpy())
            assert isinstance(lists[name], list) and len(lists[name]) == 2
            assert all(isinstance(entry, np.ndarray if backend == "pil" else torch.Tensor) for entry in lists[name])
            np.testing.assert_array_equal(np.stack(lists[name]), tensors[name].numpy())

    def test_casting_leaves_mask_and_sizes(self, processor_class):
        outputs = processor_class()(noise(30, 45), return_tensors="pt").to(torch.bfloat16)
        dtypes = [outputs[name].dtype for name in processor_class.model_input_names]
        assert dtypes == [torch.bfloat16, torch.bool, torch.int64]

    def test_default_dtype_of_torch_does_not_matter(self, processor_class):
        torch.set_default_dtype(torch.float64)
        try:
            assert processor_class()(noise(20, 20), return_tensors="pt").pixel_values.dtype == torch.float32
        finally:
            torch.set_default_dtype(torch.float32)


class TestSettings:
    def test_mean_and_std_of_the_checkpoint(self, processor_class):
        image = noise(28, 30)
        mean, std = [0.7, 0.5, 0.6], [0.2, 0.3, 0.1]
        outputs = processor_class(image_mean=mean, image_std=std)(image, return_tensors="pt")
        assert_same(outputs.pixel_values[0, :, :, :30], normalized(image, mean, std))
        assert_same(outputs.pixel_values[0, :, :, 30:], normalized(np.full((28, 12, 3), 255), mean, std))
        outputs = processor_class()(image, image_mean=0.5, image_std=0.25, return_tensors="pt")
        assert_same(outputs.pixel_values[0, :, :, :30], normalized(image, 0.5, 0.25))

    def test_without_normalising_or_rescaling(self, processor_class):
        image = noise(14, 20)
        pixels = torch.from_numpy(image).permute(2, 0, 1).double()
        rescaled = processor_class(do_normalize=False)(image, return_tensors="pt").pixel_values[0]
        assert_same(rescaled[:, :, :20], pixels / 255, atol=1e-7)
        assert torch.all(rescaled[:, :, 20:] == 1)
        raw = processor_class(do_normalize=False, do_rescale=False)(image, return_tensors="pt").pixel_values[0]
        assert_same(raw[:, :, :20], pixels, atol=0)
        assert torch.all(raw[:, :, 20:] == 255)

    @pytest.mark.parametrize("do_rescale", [True, False])
    def test_float_images_are_never_rescaled_again(self, processor_class, do_rescale):
        image = noise(14, 14)
        outputs = processor_class(do_rescale=do_rescale)((image / 255).astype(np.float32), return_tensors="pt")
        assert_same(outputs.pixel_values[0], normalized(image))

    def test_unscaled_pixels_are_not_normalised_as_if_scaled(self, processor_class):
        with pytest.raises(ValueError, match=r"do_rescale=False leaves uint8 pixels in 0\.\.255"):
            processor_class()(noise(14, 14), do_rescale=False)
        image, mean = noise(14, 14), [123.0, 116.0, 103.0]
        outputs = processor_class(do_rescale=False, image_mean=mean, image_std=[58.0] * 3)(image, return_tensors="pt")
        assert_same(outputs.pixel_values[0], torch.from_numpy((image - np.array(mean)) / 58.0).permute(2, 0, 1))

    def test_patch_size(self, processor_class):
        outputs = processor_class(patch_size=16)(noise(40, 33), return_tensors="pt")
        assert outputs.pixel_values.shape == (1, 3, 48, 48)
        assert outputs.patch_mask[0].tolist() == [[True, True, False], [True, True, False], [True, True, False]]

    def test_min_patch_coverage(self, processor_class):
        image = noise(14 + 3, 14 + 10)
        for min_coverage, present in [(0.0, [[1, 1], [1, 1]]), (0.2, [[1, 1], [1, 0]]), (1.0, [[1, 0], [0, 0]])]:
            outputs = processor_class(min_patch_coverage=min_coverage)(image, return_tensors="np")
            assert outputs.patch_mask[0].astype(int).tolist() == present

    @pytest.mark.parametrize(
        "name, value, message",
        [
            ("patch_size", 0, "at least 1"),
            ("max_pixels", 0, "at least 1"),
            ("min_patch_coverage", 1.5, r"\[0, 1\]"),
            ("background_fraction", -0.1, r"\[0, 1\]"),
            ("target_mpp", 0.0, "above 0"),
            ("mpp", float("nan"), "above 0"),
            ("mpp", [0.5, -0.5], "above 0"),
            ("image_mean", [0.5, 0.5], "has 2 values"),
            ("image_std", [0.5, 0.5, 0.0], "divided by it"),
            ("do_center_crop", True, "never cropped"),
            ("crop_size", {"height": 224, "width": 224}, "never cropped"),
            ("pad_size", {"height": 200, "width": 224}, "multiples of patch_size=14"),
            ("pad_size", {"shortest_edge": 224}, "multiples of patch_size"),
            ("do_pad", False, "not supported"),
            ("do_convert_rgb", False, "become RGB"),
            ("data_format", "channels_last", "channels first"),
        ],
    )
    def test_impossible_values(self, processor_class, name, value, message):
        with pytest.raises(ValueError, match=rf"{name}=.*{message}"):
            processor_class(**{name: value})
        with pytest.raises(ValueError, match=rf"{name}=.*{message}"):
            processor_class()(noise(28, 28), **{name: value})

    def test_wrong_type_in_a_call(self, processor_class):
        with pytest.raises(StrictDataclassFieldValidationError, match="patch_size"):
            processor_class()(noise(28, 28), patch_size="14")

    def test_instances_do_not_share_state(self, processor_class):
        first, second = processor_class(), processor_class()
        first.patch_size, first.image_mean = 16, (0.0, 0.0, 0.0)
        assert second.patch_size == 14 and tuple(second.image_mean) == MEAN
        second(noise(32, 32), patch_size=8)
        assert second.patch_size == 14

    def test_the_callers_image_is_left_alone(self, processor_class):
        image = (noise(30, 30) / 255).astype(np.float32)
        original = image.copy()
        processor_class()(image)
        np.testing.assert_array_equal(image, original)


class TestBackground:
    def test_glass_is_masked_and_tissue_is_not(self, processor_class):
        image = tissue(56, 112)
        outputs = processor_class(mask_background=True)(image, return_tensors="pt")
        assert outputs.patch_mask[0, :, :4].all() and not outputs.patch_mask[0, :, 4:].any()
        assert processor_class()(image, return_tensors="pt").patch_mask.all()
        plain = processor_class()(image, return_tensors="pt").pixel_values
        assert torch.equal(outputs.pixel_values, plain)

    def test_it_is_found_in_the_pixels_not_in_their_normalised_values(self, processor_class):
        settings = {"image_mean": [0.0] * 3, "image_std": [10.0] * 3, "mask_background": True}
        outputs = processor_class(**settings)(tissue(56, 112) / 255, return_tensors="pt")
        assert outputs.patch_mask.sum() == 16

    def test_padding_does_not_count_as_glass(self, processor_class):
        # 10 of 14 columns are image; judged with the white padding, half of the last patch would be white
        image = noise(14, 24)
        outputs = processor_class(mask_background=True, background_fraction=0.2)(image, return_tensors="pt")
        assert outputs.patch_mask.all()

    def test_background_fraction(self, processor_class):
        image = tissue(14, 42)[:, :28]  # patch 0 is tissue, patch 1 half glass
        for fraction, present in [(0.4, [True, False]), (0.6, [True, True])]:
            outputs = processor_class(mask_background=True, background_fraction=fraction)(image, return_tensors="np")
            assert outputs.patch_mask[0, 0].tolist() == present

    def test_no_tissue(self, processor_class):
        glass = np.full((40, 40, 3), 243, dtype=np.uint8)
        with pytest.raises(ValueError, match=r"image 1 holds no tissue.*mask_background=False"):
            processor_class(mask_background=True)([noise(28, 28), glass])
        assert processor_class()(glass, return_tensors="pt").patch_mask[:, :2, :2].all()


class TestResampling:
    def test_mpp_to_target_mpp(self, processor_class):
        image = noise(100, 61)
        by_mpp = processor_class()(image, mpp=0.25, target_mpp=0.5, return_tensors="pt")
        by_size = processor_class(do_resize=True, size={"height": 50, "width": 30})(image, return_tensors="pt")
        assert by_mpp.image_sizes.tolist() == [[56, 42]]
        assert torch.equal(by_mpp.pixel_values, by_size.pixel_values)

    def test_one_mpp_per_image_and_the_checkpoints_target(self, processor_class):
        outputs = processor_class(target_mpp=0.5)([noise(56, 56)] * 3, mpp=[0.25, 0.5, 1], return_tensors="pt")
        assert outputs.image_sizes.tolist() == [[28, 28], [56, 56], [112, 112]]
        assert_same(outputs.pixel_values[1, :, :56, :56], normalized(noise(56, 56)))

    def test_resampling_is_antialiased_bicubic(self, processor_class):
        # A checkerboard at half the size is gray; without antialiasing it would be black or white.
        board = (np.indices((112, 112)).sum(0) % 2 * 255).astype(np.uint8)
        outputs = processor_class(do_normalize=False)(board, mpp=0.25, target_mpp=0.5, return_tensors="pt")
        assert_same(outputs.pixel_values[0], torch.full((3, 56, 56), 0.5), atol=0.02)
        image = noise(112, 112)
        bicubic = PIL.Image.fromarray(image).resize((56, 56), PIL.Image.Resampling.BICUBIC)
        outputs = processor_class()(image, mpp=0.25, target_mpp=0.5, return_tensors="pt")
        assert_same(outputs.pixel_values[0], normalized(np.asarray(bicubic)), atol=1.01 / 255 / min(STD))

    @needs_lanczos
    def test_lanczos_can_be_asked_for(self, processor_class):
        image = noise(112, 112)
        lanczos = PIL.Image.fromarray(image).resize((56, 56), PIL.Image.Resampling.LANCZOS)
        outputs = processor_class(resample=1)(image, mpp=0.25, target_mpp=0.5, return_tensors="pt")
        assert_same(outputs.pixel_values[0], normalized(np.asarray(lanczos)), atol=2.01 / 255 / min(STD))

    @pytest.mark.parametrize(
        "size, shape",
        [
            ({"height": 42, "width": 70}, [42, 70]),
            ({"shortest_edge": 28}, [42, 28]),
            ({"shortest_edge": 56, "longest_edge": 56}, [56, 42]),
            ({"max_height": 28, "max_width": 28}, [28, 28]),
            (42, [42, 42]),
        ],
        ids=str,
    )
    def test_size(self, processor_class, size, shape):
        outputs = processor_class(do_resize=True, size=size)(noise(90, 60), return_tensors="pt")
        assert outputs.image_sizes.tolist() == [shape]

    def test_overshoot_of_float_images_is_clipped(self, processor_class):
        step = np.zeros((56, 56, 3), dtype=np.float32)
        step[:, 28:] = 1
        outputs = processor_class(do_normalize=False)(step, mpp=1.0, target_mpp=0.5, return_tensors="pt")
        assert outputs.pixel_values.min() == 0 and outputs.pixel_values.max() == 1

    def test_nothing_is_resampled_at_the_target_resolution(self, processor_class):
        outputs = processor_class(target_mpp=0.5)(noise(30, 30), mpp=0.5, return_tensors="pt")
        assert_same(outputs.pixel_values[0, :, :30, :30], normalized(noise(30, 30)))

    @pytest.mark.parametrize("at_construction", [True, False])
    def test_mpp_is_never_guessed(self, processor_class, at_construction):
        with pytest.raises(ValueError, match=r"target_mpp=0.5 is set but mpp is missing: pass mpp="):
            if at_construction:
                processor_class(target_mpp=0.5)(noise(28, 28))
            else:
                processor_class()(noise(28, 28), target_mpp=0.5)

    def test_do_resize_false_in_the_call_takes_the_pixels_as_they_are(self, processor_class):
        for mpp in (None, 0.25):
            outputs = processor_class(target_mpp=0.5)(noise(28, 28), mpp=mpp, do_resize=False, return_tensors="pt")
            assert_same(outputs.pixel_values[0], normalized(noise(28, 28)))

    @pytest.mark.parametrize(
        "kwargs, message",
        [
            ({"mpp": 0.5}, r"mpp=0.5 is given but target_mpp is not"),
            ({"do_resize": True}, r"do_resize=True does not say to what"),
            ({"mpp": 0.5, "target_mpp": 1.0, "do_resize": True, "size": 28}, "both say how to resample"),
            ({"mpp": [0.5, 0.5], "target_mpp": 1.0}, "mpp has 2 values for 1 images"),
            ({"do_resize": True, "size": {"longest_edge": 28}}, "size=.*not supported"),
        ],
        ids=str,
    )
    def test_unclear_requests(self, processor_class, kwargs, message):
        with pytest.raises(ValueError, match=message):
            processor_class()(noise(56, 56), **kwargs)

    def test_max_pixels_holds_after_resampling(self, processor_class):
        with pytest.raises(ValueError, match=r"image 0, resampled from 56 x 56, is 560 x 560 .*max_pixels=10,000"):
            processor_class(max_pixels=10_000)(noise(56, 56), mpp=1.0, target_mpp=0.1)


class TestRefused:
    @pytest.mark.parametrize("height, width", [(13, 100), (100, 13), (5, 6)])
    def test_smaller_than_a_patch(self, processor_class, height, width):
        with pytest.raises(ValueError, match=rf"image 1 is {height} x {width} pixels .*patch_size=14: cut a larger"):
            processor_class()([noise(14, 14), noise(height, width)])

    def test_smaller_than_a_patch_after_resampling(self, processor_class):
        with pytest.raises(ValueError, match=r"image 0, resampled from 40 x 40, is 10 x 10"):
            processor_class()(noise(40, 40), mpp=0.25, target_mpp=1.0)

    def test_bad_images_are_named_by_their_place(self, processor_class, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        bad = {
            ValueError: [
                noise(28, 28).astype(np.uint16),
                np.full((28, 28, 3), np.nan, dtype=np.float32),
                PIL.Image.new("I;16", (28, 28)),
                noise(28, 28).astype(np.float32),
            ],
            OSError: [tmp_path / "broken.png", tmp_path / "missing.png"],
            TypeError: [None],
        }
        for error, images in bad.items():
            for image in images:
                with pytest.raises(error, match="image 2 "):
                    processor_class()([noise(28, 28), noise(28, 28), image])

    def test_a_region_over_max_pixels(self, processor_class):
        with pytest.raises(ValueError, match=r"image 0 is 40 x 50 .*max_pixels=1,999\. Pass max_pixels=2000"):
            processor_class(max_pixels=1999)(noise(40, 50))
        assert processor_class(max_pixels=1999)(noise(40, 50), max_pixels=2000).pixel_values

    def test_a_slide_region_of_20000_by_10000_is_within_the_default(self, processor_class):
        assert processor_class.max_pixels >= 20_000 * 10_000


class TestBackendsAgree:
    @pytest.mark.parametrize("kwargs", [{}, {"mask_background": True}, {"do_normalize": False}], ids=str)
    def test_without_resampling(self, kwargs):
        images = [tissue(40, 57), noise(99, 28), PIL.Image.fromarray(tissue(30, 30)), tissue(30, 30) / 255]
        results = [processor_class(**kwargs)(images, return_tensors="pt") for processor_class in BACKENDS.values()]
        for name in results[0]:
            torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=1e-5)

    @pytest.mark.parametrize("mpp", [0.25, 0.4, 1.0])
    @pytest.mark.parametrize(
        "resample", [2, 3, pytest.param(1, marks=needs_lanczos)], ids=["bilinear", "bicubic", "lanczos"]
    )
    def test_with_resampling(self, mpp, resample):
        """uint8: at most 2 of 255 levels apart, 0.1 on average. float: 1e-3."""
        settings = {"target_mpp": 0.5, "resample": resample, "do_normalize": False}
        image = tissue(150, 131)
        for pixels, most, mean in [(image, 2.01 / 255, 0.1 / 255), ((image / 255).astype(np.float32), 1e-3, 1e-4)]:
            first, second = (cls(**settings)(pixels, mpp=mpp, return_tensors="pt") for cls in BACKENDS.values())
            difference = (first.pixel_values - second.pixel_values).abs()
            assert difference.max() <= most and difference.mean() <= mean
            assert torch.equal(first.image_sizes, second.image_sizes)


class TestSaving:
    settings = {
        "patch_size": 16,
        "image_mean": [0.7, 0.6, 0.7],
        "image_std": [0.2, 0.25, 0.2],
        "target_mpp": 0.5,
        "mask_background": True,
        "max_pixels": 10**7,
        "size": {"height": 64, "width": 48},
    }

    def test_json_names_both_backends(self, processor_class, tmp_path):
        processor_class(**self.settings).save_pretrained(tmp_path)
        content = json.loads((tmp_path / "preprocessor_config.json").read_text())
        assert {name: content[name] for name in self.settings} == self.settings
        assert content["image_processor_type"] == "SparsePathViTImageProcessor"
        assert set(content["auto_map"]["AutoImageProcessor"]) == {"torchvision", "pil"}
        assert "mpp" not in content

    def test_round_trips(self, processor_class, tmp_path):
        processor = processor_class(**self.settings)
        processor.save_pretrained(tmp_path)
        processor.to_json_file(tmp_path / "processor.json")
        for again in (
            processor_class.from_pretrained(tmp_path),
            processor_class.from_json_file(tmp_path / "processor.json"),
            processor_class.from_dict(processor.to_dict()),
            processor_class(**processor.to_dict()),
        ):
            assert again.to_dict() == processor.to_dict()
        assert processor_class.from_pretrained(tmp_path, patch_size=8).patch_size == 8

    def test_auto_class_chooses_the_backend(self, processor_class, backend, tmp_path, registered):
        processor_class(**self.settings).save_pretrained(tmp_path)
        for name, expected_class in BACKENDS.items():
            again = AutoImageProcessor.from_pretrained(tmp_path, backend=name)
            assert type(again) is expected_class and again.backend == name
            assert again.to_dict() == processor_class(**self.settings).to_dict()
        assert type(AutoImageProcessor.from_pretrained(tmp_path)) is SparsePathViTImageProcessor

    def test_explicit_none_survives(self, processor_class, tmp_path):
        processor_class(do_normalize=None).save_pretrained(tmp_path)
        assert processor_class.from_pretrained(tmp_path).do_normalize is None


def run_without(hidden, code, folder):
    """Runs `code` in a new process, in `folder`, in which the packages in `hidden` are not installed."""
    preamble = f"""
    import sys

    class Hiding:
        def __init__(self, finders):
            self.finders = finders

        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {set(hidden)!r}:
                return None
            specs = (finder.find_spec(name, path, target) for finder in self.finders)
            return next((spec for spec in specs if spec is not None), None)

        def find_distributions(self, *arguments, **keywords):
            finders = (finder for finder in self.finders if hasattr(finder, "find_distributions"))
            return (found for finder in finders for found in finder.find_distributions(*arguments, **keywords))

        def invalidate_caches(self):
            for finder in self.finders:
                getattr(finder, "invalidate_caches", lambda: None)()

    sys.meta_path[:] = [Hiding(list(sys.meta_path))]
    import importlib.util
    for name in {sorted(hidden)!r}:
        assert importlib.util.find_spec(name) is None, name
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    (folder / "run.py").write_text(textwrap.dedent(preamble) + textwrap.dedent(code))
    result = subprocess.run(
        [sys.executable, "run.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=250
    )
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.fixture
def hub_folder(tmp_path):
    """A checkpoint folder as it is on the Hub: settings and the files they need, beside a region and its result."""
    processor = SparsePathViTImageProcessor(patch_size=16, mask_background=True)
    (tmp_path / "checkpoint").mkdir()
    processor.save_pretrained(tmp_path / "checkpoint")
    for name in SHIPPED:
        shutil.copyfile(PACKAGE / name, tmp_path / "checkpoint" / name)
    PIL.Image.fromarray(tissue(60, 90)).save(tmp_path / "region.png")
    np.savez(tmp_path / "expected.npz", **processor(tmp_path / "region.png", return_tensors="np"))
    return tmp_path


CHECK = """
import numpy as np
from transformers import AutoImageProcessor

def check(processor, name):
    assert type(processor).__name__ == name, type(processor)
    assert type(processor).__module__.startswith("transformers_modules."), type(processor).__module__
    result, expected = processor("region.png", return_tensors="np"), np.load("expected.npz")
    assert set(result) == set(expected)
    for key in expected:
        np.testing.assert_allclose(result[key], expected[key], rtol=0, atol=1e-5)
"""


def test_remote_code_gives_both_backends_and_can_be_saved_again(hub_folder):
    code = """
    names = {"torchvision": "SparsePathViTImageProcessor", "pil": "SparsePathViTImageProcessorPil"}
    for backend, name in names.items():
        processor = AutoImageProcessor.from_pretrained("checkpoint", backend=backend, trust_remote_code=True)
        check(processor, name)
        processor.save_pretrained(f"saved_by_{backend}")
        for other, other_name in names.items():
            again = AutoImageProcessor.from_pretrained(f"saved_by_{backend}", backend=other, trust_remote_code=True)
            check(again, other_name)
    """
    run_without({"sparsepath_vit"}, CHECK + textwrap.dedent(code), hub_folder)


def test_without_torchvision_the_pillow_backend_works(hub_folder):
    code = """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    reference = "image_processing_sparsepath_vit.SparsePathViTImageProcessor"
    torchvision_class = get_class_from_dynamic_module(reference, "checkpoint")
    pillow_class = get_class_from_dynamic_module(reference + "Pil", "checkpoint")
    check(pillow_class.from_pretrained("checkpoint"), "SparsePathViTImageProcessorPil")
    try:
        torchvision_class.from_pretrained("checkpoint")
    except ImportError as error:
        assert "torchvision" in str(error).lower(), error
    else:
        raise SystemExit("the torchvision backend was made without torchvision")
    if not getattr(AutoImageProcessor, "is_dummy", False):  # which it is without torchvision in transformers 5.17
        processor = AutoImageProcessor.from_pretrained("checkpoint", trust_remote_code=True)
        check(processor, "SparsePathViTImageProcessorPil")
    """
    run_without({"sparsepath_vit", "torchvision"}, CHECK + textwrap.dedent(code), hub_folder)


class TestWithTheModel:
    """The processor's outputs are the model's arguments, as pipelines assume."""

    config = SparsePathViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_register_tokens=2,
        image_size=56, window_size=2, initializer_range=0.3, layerscale_value=1.0, num_labels=3,
        problem_type="single_label_classification",
    )  # fmt: skip

    @torch.inference_mode()
    def test_padding_is_not_attended(self, processor_class):
        """An image gives the same embedding alone and padded to a larger one."""
        torch.manual_seed(0)
        model = SparsePathViTModel(self.config).eval()
        images = [noise(30, 46, 0), noise(75, 33, 1), tissue(56, 56)]
        processor = processor_class(mask_background=True)
        together = model(**processor(images, return_tensors="pt")).pooler_output
        for index, image in enumerate(images):
            alone = model(**processor(image, return_tensors="pt")).pooler_output[0]
            torch.testing.assert_close(together[index], alone, rtol=1e-4, atol=1e-4)
        assert (together[0] - together[1]).abs().max() > 0.1

    @torch.inference_mode()
    def test_image_feature_extraction(self, processor_class):
        torch.manual_seed(0)
        model, processor = SparsePathViTModel(self.config).eval(), processor_class()
        pipe = pipeline("image-feature-extraction", model=model, image_processor=processor)
        images = [PIL.Image.fromarray(noise(30, 46, seed)) for seed in range(2)]
        expected = model(**processor(images, return_tensors="pt")).pooler_output
        for batch_size in (1, 2):
            results = pipe(images, pool=True, return_tensors=True, batch_size=batch_size)
            torch.testing.assert_close(torch.cat(results), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="mpp is missing"):
            pipe(images, image_processor_kwargs={"target_mpp": 0.5})

    @torch.inference_mode()
    def test_pipelines_and_images_of_several_sizes(self, processor_class, caplog):
        """transformers#15011: pipelines concatenate; said before they do, with the ways out, which all work."""
        torch.manual_seed(0)
        model, processor = SparsePathViTModel(self.config).eval(), processor_class()
        pipe = pipeline("image-feature-extraction", model=model, image_processor=processor)
        images = [PIL.Image.fromarray(noise(30, 46, 0)), PIL.Image.fromarray(noise(75, 33, 1))]
        expected = model(**processor(images, return_tensors="pt")).pooler_output
        logging.enable_propagation()
        logging.get_logger("sparsepath_vit").warning_once.cache_clear()
        with pytest.raises(RuntimeError, match="size"):
            pipe(images, pool=True, batch_size=2)
        assert "all images of a call must be of one size" in caplog.text
        padded = {"image_processor_kwargs": {"pad_size": {"height": 84, "width": 56}}, "batch_size": 2}
        for arguments in ({"batch_size": 1}, padded):
            results = pipe(images, pool=True, return_tensors=True, **arguments)
            torch.testing.assert_close(torch.cat(results), expected, rtol=1e-4, atol=1e-4)

    @torch.inference_mode()
    @pytest.mark.parametrize("task", ["image-feature-extraction", "image-classification"])
    def test_a_pipeline_that_loads_a_checkpoint_batches_images_of_several_sizes(
        self, processor_class, registered, tmp_path, task
    ):
        torch.manual_seed(0)
        is_classifier = task == "image-classification"
        model = (SparsePathViTForImageClassification if is_classifier else SparsePathViTModel)(self.config).eval()
        model.save_pretrained(tmp_path)
        processor_class(min_patch_coverage=0.3).save_pretrained(tmp_path)
        pipe = pipeline(task, model=str(tmp_path))
        images = [PIL.Image.fromarray(noise(*size, 0)) for size in ((30, 46), (75, 33), (56, 56))]
        loaded = AutoImageProcessor.from_pretrained(tmp_path)  # not for a pipeline: tensors
        expected = model(**loaded(images, return_tensors="pt"))
        for batch_size in (1, 2, 3):
            results = pipe(images, batch_size=batch_size, **({} if is_classifier else {"pool": True}))
            if is_classifier:
                scores = [{entry["label"]: entry["score"] for entry in result} for result in results]
                results = [[score[f"LABEL_{index}"] for index in range(3)] for score in scores]
            expected_numbers = expected.logits.softmax(dim=1) if is_classifier else expected.pooler_output
            torch.testing.assert_close(torch.tensor(results).reshape(3, -1), expected_numbers, rtol=1e-4, atol=1e-4)
        assert pipe.image_processor.to_dict() == loaded.to_dict()

    @torch.inference_mode()
    def test_image_classification(self, processor_class):
        torch.manual_seed(0)
        model, processor = SparsePathViTForImageClassification(self.config).eval(), processor_class()
        pipe = pipeline("image-classification", model=model, image_processor=processor)
        image = noise(30, 46)
        expected = model(**processor(image, return_tensors="pt")).logits[0].softmax(dim=0)
        for kind in (PIL.Image.fromarray(image), image, torch.from_numpy(image).permute(2, 0, 1)):
            scores = {entry["label"]: entry["score"] for entry in pipe(kind)}
            assert_same([scores[f"LABEL_{index}"] for index in range(3)], expected)


@pytest.mark.skipif(not ROIS, reason="the real regions of ../shared/data are not here")
class TestRealRegions:
    @pytest.mark.parametrize("path", ROIS, ids=lambda path: path.stem)
    def test_both_backends(self, path):
        with PIL.Image.open(path) as opened:
            image = np.asarray(opened.convert("RGB"))
        height, width = image.shape[:2]
        results = [cls(mask_background=True)(path, return_tensors="pt") for cls in BACKENDS.values()]
        for name in results[0]:
            torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=1e-5)
        result = results[0]
        assert result.image_sizes.tolist() == [[-(-height // 14) * 14, -(-width // 14) * 14]]
        assert_same(result.pixel_values[0, :, :500, :width], normalized(image[:500]))
        # What is masked is bright and has next to no structure; what is kept is darker.
        rows, columns = height // 14, width // 14
        gray = image[: rows * 14, : columns * 14].mean(-1).reshape(rows, 14, columns, 14).transpose(0, 2, 1, 3)
        present = result.patch_mask[0, :rows, :columns].numpy()
        if not present.all():
            assert gray[~present].mean(-1).mean(-1).min() > 210
            assert gray[~present].mean() > gray[present].mean() + 20

    @pytest.mark.parametrize(
        "name, share", [("cmu1_1568x2912", 0.55), ("OS-1_1101x1101", 0.97), ("cmu1_1120x1120", 0.88)]
    )
    def test_share_of_tissue(self, name, share):
        (path,) = (path for path in ROIS if path.stem == name)
        mask = SparsePathViTImageProcessor(mask_background=True)(path, return_tensors="pt").patch_mask
        assert abs(mask.float().mean().item() - share) < 0.04

    def test_a_region_at_half_its_resolution(self):
        (path,) = (path for path in ROIS if path.stem == "OS-1_1101x1101")
        results = [
            cls(target_mpp=0.5, do_normalize=False)(path, mpp=0.2271, return_tensors="pt") for cls in BACKENDS.values()
        ]
        assert results[0].image_sizes.tolist() == [[504, 504]]  # 1101 * 0.2271 / 0.5 = 500 pixels
        assert (results[0].pixel_values - results[1].pixel_values).abs().max() <= 2.01 / 255


def test_a_large_region_is_converted_to_float_once(processor_class):
    """Next to the result and the 8-bit image nothing of their size is allocated: no float temporaries."""
    image = torch.from_numpy(noise(1400, 1400)).permute(2, 0, 1)
    processor_class()(image[:, :28, :28])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = processor_class()(image, return_tensors="pt")
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profiler.events())
    assert result.pixel_values.nbytes <= allocated < 1.3 * result.pixel_values.nbytes
