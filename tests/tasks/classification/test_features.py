# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsepath_vit.tasks.classification import features
from sparsepath_vit.tasks.classification.features import FeatureSettings, compute_features, embed_rois, model_key
from sparsepath_vit.tasks.classification.image_folder import read_image_folder


@pytest.fixture
def dataset(image_folder):
    return read_image_folder(image_folder, 4)[0]


@pytest.fixture
def forwards(model):
    """Images per forward pass of `model` so far."""
    sizes = []
    model.register_forward_pre_hook(lambda module, arguments, kwargs: sizes.append(kwargs["pixel_values"].shape[0]),
                                    with_kwargs=True)  # fmt: skip
    return sizes


class TestFeatures:
    def test_they_are_what_the_model_makes_of_each_image(self, dataset, model, processor, tmp_path):
        found = embed_rois(dataset, model, processor, FeatureSettings(batch_size=3), tmp_path / "cache")
        for index in range(len(dataset)):
            inputs = processor(dataset.read(index), input_data_format="channels_last", return_tensors="pt")
            with torch.no_grad():
                expected = model(**inputs).pooler_output[0]
            torch.testing.assert_close(torch.from_numpy(found[index]), expected, atol=2e-5, rtol=1e-4)
        assert found.dtype == np.float32

    def test_tiles_are_averaged(self, dataset, model, processor):
        image = dataset.read(2)  # 48 x 64 pixels
        found = compute_features(dataset, [2], model, processor, FeatureSettings(tile_size=32, batch_size=3))
        corners = [(0, 0), (0, 32), (32, 0), (32, 32)]
        tiles = [image[top : top + 32, left : left + 32] for top, left in corners]
        vectors = [features.pooled(model, processor, [tile]) for tile in tiles]
        expected = np.average(vectors, axis=0, weights=[2, 2, 1, 1])  # the lower ones are half as high
        assert np.allclose(found, expected, atol=2e-5) and found.dtype == np.float32

    def test_white_patches_can_be_left_out(self, dataset, model, processor):
        image = dataset.read(0).copy()
        image[:, 32:] = 250
        inputs = processor(image, input_data_format="channels_last", return_tensors="pt")
        inputs["patch_mask"][:, :, 2:] = False
        with torch.no_grad():
            expected = model(**inputs).pooler_output.numpy()
        assert np.allclose(features.pooled(model, processor, [image], mask_background=True), expected, atol=1e-5)
        assert np.abs(features.pooled(model, processor, [image]) - expected).max() > 1e-2


class TestCache:
    def test_a_second_run_computes_nothing(self, dataset, model, processor, tmp_path, forwards):
        first = embed_rois(dataset, model, processor, FeatureSettings(batch_size=4), tmp_path)
        assert sum(forwards) == 16
        second = embed_rois(dataset, model, processor, FeatureSettings(batch_size=1, workers=3), tmp_path)
        assert sum(forwards) == 16
        assert np.array_equal(first, second)

    def test_only_what_is_new_is_computed(self, dataset, model, processor, tmp_path, forwards):
        part = replace(dataset, rois=dataset.rois[3:7])
        embed_rois(part, model, processor, FeatureSettings(), tmp_path)
        found = embed_rois(dataset, model, processor, FeatureSettings(), tmp_path)
        assert sum(forwards) == 16
        fresh = compute_features(dataset, range(16), model, processor, FeatureSettings())
        assert np.allclose(found, fresh, atol=1e-6)

    def test_it_survives_being_killed(self, dataset, model, processor, tmp_path, monkeypatch, forwards):
        monkeypatch.setattr(features, "_SHARD_ROIS", 4)
        calls = []

        def killed(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return compute_features(*arguments)

        monkeypatch.setattr(features, "compute_features", killed)
        with pytest.raises(KeyboardInterrupt):
            embed_rois(dataset, model, processor, FeatureSettings(), tmp_path)
        monkeypatch.setattr(features, "compute_features", compute_features)
        embed_rois(dataset, model, processor, FeatureSettings(), tmp_path)
        assert sum(forwards) == 16
        assert not list(tmp_path.rglob("*.tmp"))

    def test_a_damaged_shard_is_named_and_made_again(self, dataset, model, processor, tmp_path, forwards, caplog):
        first = embed_rois(dataset, model, processor, FeatureSettings(), tmp_path)
        (shard,) = tmp_path.rglob("*.safetensors")
        shard.write_bytes(shard.read_bytes()[:100])
        assert np.array_equal(embed_rois(dataset, model, processor, FeatureSettings(), tmp_path), first)
        assert sum(forwards) == 32
        assert f"{shard} is damaged" in caplog.text

    def test_the_key_covers_all_that_the_numbers_depend_on(self, model, processor):
        settings = FeatureSettings()
        keys = [model_key(model, processor, settings)]
        for change in (
            {"size": 32},
            {"view": "pixels"},
            {"tile_size": 16},
            {"mask_background": True},
            {"variant": "x"},
        ):
            keys.append(model_key(model, processor, replace(settings, **change)))
        for name, value in (("prune_ratio", 0.25), ("window_size", 2), ("prune_score", "cls_attention")):
            setattr(model.config, name, value)
            keys.append(model_key(model, processor, settings))
        processor.image_mean = [0.0, 0.0, 0.0]
        keys.append(model_key(model, processor, settings))
        with torch.no_grad():
            model.norm.bias[7] += 1e-3
        keys.append(model_key(model, processor, settings))
        keys.append(model_key(model.to(torch.bfloat16), processor, settings))
        assert len(set(keys)) == len(keys)

    def test_the_key_ignores_what_changes_no_number(self, model, processor):
        key = model_key(model, processor, FeatureSettings())
        model.config.id2label = {0: "a", 1: "b"}
        model.config._name_or_path = "elsewhere"
        assert model_key(model, processor, FeatureSettings(batch_size=8, workers=5)) == key


def test_an_roi_that_cannot_be_read_is_named(dataset, model, processor, tmp_path):
    (dataset.root / dataset.rois[5].file).write_bytes(b"\x89PNG broken")
    with pytest.raises(ValueError, match=dataset.rois[5].file):
        embed_rois(dataset, model, processor, FeatureSettings(), tmp_path)


def test_two_processes_share_the_work(dataset, model, processor, tmp_path, monkeypatch, forwards):
    """One after the other here: when the first collects, the second has not added its half yet."""
    load = features.FeatureCache.load

    def run(process):
        state = SimpleNamespace(
            process_index=process, num_processes=2, is_main_process=True, is_local_main_process=True
        )
        state.wait_for_everyone = lambda: None
        looks = iter([lambda cache: {}, load])  # both look before either adds
        monkeypatch.setattr(features, "PartialState", lambda: state)
        monkeypatch.setattr(features.FeatureCache, "load", lambda cache: next(looks)(cache))
        return embed_rois(dataset, model, processor, FeatureSettings(), tmp_path)

    with pytest.raises(KeyError):
        run(0)
    assert sum(forwards) == 8
    found = run(1)
    assert sum(forwards) == 16
    assert np.allclose(found, compute_features(dataset, range(16), model, processor, FeatureSettings()), atol=1e-6)
