# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from small_models import small_model
from transformers import EvalPrediction, TrainingArguments

from sparsepath_vit import SparsePathViTForImageClassification
from sparsepath_vit.tasks.classification.finetune import RoiCollator, RoiImages, RoiTrainer, with_lora
from sparsepath_vit.tasks.classification.image_folder import read_image_folder
from sparsepath_vit.tasks.classification.metrics import METRICS


@pytest.fixture
def dataset(image_folder):
    return read_image_folder(image_folder, 4)[0]


@pytest.fixture
def classifier():
    return small_model(
        SparsePathViTForImageClassification,
        patch_size=16,
        image_size=64,
        num_hidden_layers=2,
        prune_after_layer=1,
        prune_ratio=0.5,
        num_labels=2,
    )


def trainer_of(model, dataset, processor, folder, **settings):
    partition = dataset.partitions()[0]
    arguments = TrainingArguments(
        folder, remove_unused_columns=False, report_to="none", use_cpu=True, disable_tqdm=True, seed=0,
        label_names=["labels"], per_device_train_batch_size=4, learning_rate=1e-3, **settings,
    )  # fmt: skip
    return RoiTrainer(
        model,
        arguments,
        data_collator=RoiCollator(processor),
        train_dataset=RoiImages(dataset, partition.train, augment=True),
        eval_dataset=RoiImages(dataset, partition.evaluation),
    )


def test_images_are_turned_and_flipped_only_in_training(dataset):
    original = dataset.read(3)
    assert np.array_equal(RoiImages(dataset, [3])[0]["image"], original)
    images = RoiImages(dataset, [3], augment=True)
    found = {images[0]["image"].tobytes() for _ in range(100)}
    turned = [np.rot90(side, turns) for side in (original, original[:, ::-1]) for turns in range(4)]
    assert found == {image.tobytes() for image in turned}


def test_a_batch_is_what_the_processor_makes_of_the_images(dataset, processor):
    examples = [RoiImages(dataset, [0, 9])[number] for number in range(2)]
    examples[1]["image"] = examples[1]["image"][:20, :40]
    batch = RoiCollator(processor)(examples)
    assert batch["labels"].tolist() == [dataset.rois[0].label, dataset.rois[9].label]
    assert batch["image_sizes"].tolist() == [[48, 64], [32, 48]]
    assert batch["patch_mask"][1].sum() == 3  # of 20 x 40 pixels the half patch counts, the quarter does not


def test_metrics_follow_the_order_of_the_indices_and_the_slides(dataset):
    from dataclasses import replace

    rois = tuple(replace(roi, slide_id=roi.file[:-6]) for roi in dataset.rois)  # two images each
    slides = replace(dataset, rois=rois, slide_level=True)
    indices = [15, 0, 14, 1]
    logits = np.array([[0.0, 5.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])  # the third alone is wrong, its slide is not
    metrics = RoiImages(slides, indices).metrics(EvalPrediction(logits, np.zeros(4)))
    assert metrics["num_items"] == 2
    assert metrics["confusion_matrix"] == [[1, 0], [0, 1]]
    assert RoiImages(dataset, indices).metrics(EvalPrediction(logits, np.zeros(4)))["accuracy"] == 0.75


class TestTraining:
    def test_it_learns_and_evaluates_with_checkpointing_and_bfloat16(self, dataset, classifier, processor, tmp_path):
        settings = {"bf16": True, "gradient_checkpointing": True, "num_train_epochs": 12, "logging_steps": 4}
        trainer = trainer_of(classifier, dataset, processor, tmp_path, **settings)
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        assert after["eval_loss"] < 0.5 * before["eval_loss"]
        assert after["eval_accuracy"] == 1
        assert {f"eval_{name}" for name in METRICS} <= set(after)

    def test_a_resumed_run_ends_where_the_whole_one_does(self, dataset, processor, tmp_path):
        results = []
        for folder, stopped in (("whole", False), ("resumed", True)):
            model = small_model(
                SparsePathViTForImageClassification, patch_size=16, image_size=64, num_hidden_layers=2, num_labels=2
            )
            settings = {"num_train_epochs": 4, "save_strategy": "epoch"}
            trainer = trainer_of(model, dataset, processor, tmp_path / folder, **settings)
            if stopped:
                trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
                assert trainer.state.global_step == 12
            else:
                trainer.train()
            results.append({name: value.clone() for name, value in model.state_dict().items()})
        for name, value in results[0].items():
            assert torch.equal(results[1][name], value), name


class TestLora:
    def test_only_adapters_and_classifier_are_trained(self, dataset, classifier, processor, tmp_path):
        frozen = {name: value.clone() for name, value in classifier.state_dict().items()}
        model = with_lora(classifier, rank=4)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert len([name for name in trained if "lora_A" in name]) == 2 * 4  # qkv, projection, fc1, fc2 of two layers
        assert all("lora_" in name or "classifier" in name for name in trained)
        settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        trainer = trainer_of(model, dataset, processor, tmp_path, num_train_epochs=4, **settings)
        trainer.train()
        adapters = {name: value for name, value in model.named_parameters() if "lora_B" in name}
        assert all(value.abs().max() > 0 for value in adapters.values())  # they start at zero
        with torch.no_grad():
            inputs = RoiCollator(processor)([RoiImages(dataset, [0])[0]])
            expected = model.eval()(**inputs).logits
            merged = model.merge_and_unload()
            assert torch.allclose(merged(**inputs).logits, expected, atol=1e-4)
        assert set(merged.state_dict()) == set(frozen)
        changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, frozen[name])}
        assert "sparsepath_vit.encoder.layers.0.attention.qkv.weight" in changed
        assert "sparsepath_vit.model.embeddings.patch_embeddings.projection.weight" not in changed
