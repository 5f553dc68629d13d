# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a plain `Trainer` hands to `compute_metrics`: the logits alone, whatever else the models return."""

import numpy as np
import pytest
import torch
from small_models import random_pixels, small_model
from small_segmentation import LABELS, random_images, random_labels, segmentation_model
from transformers import Trainer, TrainingArguments

from sparsepath_vit import SparsePathViTForImageClassification, SparsePathViTModel


def trainer_of(model, data, folder, compute_metrics, data_collator=None, **settings):
    arguments = TrainingArguments(
        folder, report_to="none", use_cpu=True, disable_tqdm=True, per_device_eval_batch_size=2, **settings
    )
    return Trainer(model, arguments, data_collator, eval_dataset=data, compute_metrics=compute_metrics)


@pytest.mark.parametrize("returns_states", [False, True])
def test_the_usual_accuracy_of_a_pruning_classifier_on_images_of_different_sizes(tmp_path, returns_states):
    """Regression (transformers#9057): positions, grid sizes and scores of each image came along with the logits."""
    model = small_model(SparsePathViTForImageClassification, prune_ratio=0.5, num_labels=3)
    model.config.output_hidden_states = returns_states
    pixels = [random_pixels(1, *size, seed=index)[0] for index, size in enumerate([(6, 5)] * 2 + [(9, 7)] * 2)]
    with torch.no_grad():
        expected = torch.cat([model(one[None]).logits for one in pixels]).numpy()
    labels = expected.argmax(axis=-1)
    labels[0] = (labels[0] + 1) % 3
    seen = []

    def accuracy(evaluation):
        logits, of_images = evaluation
        seen.append(logits)
        return {"accuracy": float((np.argmax(logits, axis=-1) == of_images).mean())}

    data = [{"pixel_values": one, "labels": int(label)} for one, label in zip(pixels, labels, strict=True)]
    trainer = trainer_of(model, data, tmp_path, accuracy)
    assert trainer.evaluate()["eval_accuracy"] == 0.75
    np.testing.assert_allclose(seen[0], expected, rtol=1e-4, atol=1e-5)
    trainer.compute_metrics = None
    predicted = trainer.predict([{"pixel_values": one} for one in pixels]).predictions
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["queries", "mask2former"])
def test_a_segmentation_model_hands_over_classes_and_masks(tmp_path, head):
    model = segmentation_model(head, output_auxiliary_logits=True)
    data = []
    for index, size in enumerate([(48, 40), (48, 40), (56, 64)]):
        labels = random_labels(*size, classes=[(0, 2)], seed=index)
        data.append(
            {"pixel_values": random_images(1, *size, seed=index)[0], **{key: one[0] for key, one in labels.items()}}
        )

    def collate(examples):
        pixels = torch.stack([one["pixel_values"] for one in examples])
        return {"pixel_values": pixels} | {
            name: [one[name] for one in examples] for name in ("mask_labels", "class_labels")
        }

    seen = []
    trainer = trainer_of(
        model, data, tmp_path, lambda evaluation: seen.append(evaluation) or {}, collate,
        eval_do_concat_batches=False, remove_unused_columns=False,
    )  # fmt: skip
    trainer.evaluate()
    classes, masks = zip(*seen[0].predictions, strict=True)
    assert [one.shape for one in classes] == [(2, 5, len(LABELS) + 1), (1, 5, len(LABELS) + 1)]
    assert [one.shape for one in masks] == [(2, 5, 12, 10), (1, 5, 14, 16)]


def test_of_the_bare_encoder_the_features_are_left(tmp_path):
    model = small_model(SparsePathViTModel, prune_ratio=0.5)
    trainer = trainer_of(model, None, tmp_path, None)
    pixels = random_pixels(2, 6, 5)
    last_hidden_state, pooled = trainer.predict([{"pixel_values": one} for one in pixels]).predictions
    assert last_hidden_state.shape == (2, 3 + 15, 32)
    with torch.no_grad():
        np.testing.assert_allclose(pooled, model(pixels).pooler_output, rtol=1e-4, atol=1e-5)
