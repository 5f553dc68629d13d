# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Training a segmentation model with Transformers' `Trainer`, evaluated at the resolution of the image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import EvalPrediction, Trainer

from .data import ITEMS, SegmentationImages
from .metrics import evaluate_segmentation, overlap_counts
from .probabilities import THRESHOLD, label_probabilities


class SegmentationTrainer(Trainer):
    """A `Trainer` whose evaluation keeps three numbers per image instead of its masks.

    Each image is compared with its mask at its own resolution right after the forward pass, so that memory does not
    grow with the data set and nothing of different sizes is ever concatenated.

    Args:
        label_names: of the model's labels.
        bootstrap_samples: for the intervals of the metrics; 0 leaves them out.
        **kwargs: as of `Trainer`.
    """

    def __init__(self, *, label_names: Sequence[str], bootstrap_samples: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.segmentation_labels, self.bootstrap_samples = tuple(label_names), bootstrap_samples
        # The loss is a mean per batch: the Trainer is to divide it by the steps of gradient accumulation.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """As `Trainer.compute_loss`."""
        return super().compute_loss(model, _model_inputs(inputs), return_outputs, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Loss, pixel counts (batch, 3), and the number and label of each image (batch, 2)."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**_model_inputs(inputs))
        loss = outputs.loss.detach()
        if prediction_loss_only:
            return loss, None, None
        items = inputs[ITEMS]
        sizes = [tuple(size) for size in items[:, 2:].tolist()]
        probabilities = label_probabilities(outputs, items[:, 1].tolist(), sizes)
        counts = []
        for maps, masks, (height, width) in zip(probabilities, inputs["mask_labels"], sizes, strict=True):
            truth = masks.any(dim=0)[:height, :width]  # all False where there is no segment
            counts.append(overlap_counts((maps >= THRESHOLD).cpu().numpy(), truth.cpu().numpy()))
        return loss, torch.from_numpy(np.stack(counts)).to(items.device), items[:, :2].contiguous()

    def evaluate(
        self,
        eval_dataset: SegmentationImages | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """As `Trainer.evaluate`, with the metrics of `evaluate_segmentation`."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset

        def metrics(prediction: EvalPrediction) -> dict[str, Any]:
            numbers, labels = prediction.label_ids.T
            groups = [dataset.pair_of(number).group for number in numbers]
            return evaluate_segmentation(
                prediction.predictions, labels, groups, self.segmentation_labels, self.bootstrap_samples, self.args.seed
            )

        self.compute_metrics = metrics
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)


def _model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name != ITEMS}
