# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning on ROIs with Transformers' `Trainer`: data set, collator, metrics by slide, LoRA."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import PredictionOutput

from ...runtime.pixels import prepare
from .linear_probe import Items, pool_items
from .metrics import evaluate_predictions
from .rois import RoiDataset

if TYPE_CHECKING:
    from ...model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
    from ...model.modeling_sparsepath_vit import SparsePathViTForImageClassification

_LORA_TARGETS = r".*\.(attention\.(qkv|projection)|mlp\.(fc1|fc2))"


class RoiImages(torch.utils.data.Dataset):
    """Some ROIs of a data set as images with labels.

    Args:
        dataset: the ROIs.
        indices: which of them.
        size: pixels of the longer side; None for the ROIs as they are.
        view: see `RoiDataset.read`.
        augment: whether to flip and turn each image at random, by quarters: tissue has no upright.
        bootstrap_samples: for the intervals of `metrics`; 0 leaves them out.
        seed: of the bootstrap.
    """

    def __init__(
        self,
        dataset: RoiDataset,
        indices: Sequence[int] | np.ndarray,
        size: int | None = None,
        view: str = "field_of_view",
        augment: bool = False,
        bootstrap_samples: int = 0,
        seed: int = 0,
    ) -> None:
        self.dataset, self.indices = dataset, [int(index) for index in indices]
        self.size, self.view, self.augment = size, view, augment
        self.bootstrap_samples, self.seed = bootstrap_samples, seed

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> dict[str, Any]:
        index = self.indices[number]
        image = self.dataset.read(index, self.size, self.view)
        if self.augment:
            turns, flipped = torch.randint(4, ()).item(), torch.randint(2, ()).item()
            image = np.rot90(image[:, ::-1] if flipped else image, turns)
        return {"image": np.ascontiguousarray(image), "label": self.dataset.rois[index].label}

    def items(self, logits: np.ndarray) -> Items:
        """What is classified: the ROIs, or their slides where labels are the slides'; features are (mean) logits.

        Args:
            logits: (len(self), num_labels), in this order.
        """
        of_all = np.zeros((len(self.dataset), logits.shape[1]))
        of_all[self.indices] = logits
        return pool_items(self.dataset, of_all, np.array(self.indices))

    def metrics(self, prediction: EvalPrediction) -> dict[str, Any]:
        """`metrics.evaluate_predictions` of logits in this order."""
        items = self.items(prediction.predictions)
        return evaluate_predictions(
            items.labels,
            items.features.argmax(axis=1),
            self.dataset.label_names,
            items.slide_ids,
            self.bootstrap_samples,
            self.seed,
        )


class RoiCollator:
    """Images of any sizes -> one batch of model inputs.

    Args:
        processor: the model's image processor. The pixels are taken as they are, not resampled.
        mask_background: whether white patches are left out.
    """

    def __init__(self, processor: "SparsePathViTImageProcessor", mask_background: bool = False) -> None:
        self.processor, self.mask_background = processor, mask_background

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [example["image"] for example in examples]
        inputs = prepare(self.processor, images, mask_background=self.mask_background)
        return {**inputs, "labels": torch.tensor([example["label"] for example in examples])}


class RoiTrainer(Trainer):
    """A `Trainer` whose evaluation computes the metrics of the data set it evaluates."""

    def evaluate(
        self,
        eval_dataset: RoiImages | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As `Trainer.evaluate`."""
        self.compute_metrics = (self.eval_dataset if eval_dataset is None else eval_dataset).metrics
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: RoiImages, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """As `Trainer.predict`."""
        self.compute_metrics = test_dataset.metrics
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)


def with_lora(
    model: "SparsePathViTForImageClassification", rank: int, alpha: float | None = None, dropout: float = 0.0
) -> PeftModel:
    """Freezes `model` and adds low-rank adapters to attention and MLP; the classifier is trained in full.

    Args:
        model: the classifier.
        rank: of the adapters.
        alpha: their scale; twice the rank by default.
        dropout: on their inputs.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=_LORA_TARGETS,
        modules_to_save=["classifier"],
    )
    # Reentrant checkpointing of frozen layers gives adapters a gradient only where their inputs ask for one.
    model.enable_input_require_grads()
    return get_peft_model(model, config)
