# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning through whole regions against fine-tuning through averaged tiles: low-rank adapters and a linear head.

The head starts as the linear probe of the frozen features and is trained on with the adapters (arXiv 2202.10054), so
what is compared is what training the network itself adds.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold
from torch import nn
from tqdm import tqdm

from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTForImageClassification
from sparsepath_vit.runtime.compute import faster_dtype
from sparsepath_vit.runtime.configured import configured
from sparsepath_vit.runtime.pixels import prepare
from sparsepath_vit.tasks.classification.finetune import with_lora

from .features import DENSE, PATTERNS, TILES, Encoder, tiles_of
from .probes import Probe, balanced_head, chosen_penalty

VARIANTS = (TILES, "w = 8", "w = 8, 60 % pruned")


@dataclass(frozen=True)
class Training:
    """How adapters are trained.

    Attributes:
        epochs: passes over the training regions.
        learning_rate: of AdamW, falling to 0 along a cosine.
        rank: of the adapters.
        batch_size: regions a step; one at a time goes through the network.
        num_folds: of the division; blocks of tissue are not divided.
        seed: of the division, the order of regions and the adapters.
    """

    epochs: int = 5
    learning_rate: float = 3e-4
    rank: int = 8
    batch_size: int = 4
    num_folds: int = 3
    seed: int = 0


def fine_tuned(
    encoder: Encoder,
    images: list[np.ndarray],
    features: np.ndarray,
    labels: np.ndarray,
    groups: list[str],
    variant: str,
    training: Training,
) -> Probe:
    """What networks trained on all folds but one say of regions that they have not seen.

    Args:
        encoder: the pretrained model, left as it is.
        images: (height, width, 3) uint8 regions.
        features: (regions, pooled_size) of the frozen model by this variant, from which the head starts.
        labels: (regions,) class indices.
        groups: the block of tissue of each region.
        variant: of `VARIANTS`.
        training: how.
    """
    _, of_region = np.unique(np.asarray(groups), return_inverse=True)
    num_classes = int(labels.max()) + 1
    probabilities = np.full((1, len(labels), num_classes), np.nan)
    folds = StratifiedGroupKFold(training.num_folds, shuffle=True, random_state=training.seed)
    for train, held_out in folds.split(features, labels, of_region):
        penalty = chosen_penalty(features[train], labels[train], of_region[train], num_classes)
        head = balanced_head(features[train], labels[train], num_classes, penalty)
        torch.manual_seed(training.seed)
        classifier = _classifier(encoder, num_classes)
        with torch.no_grad():
            classifier.classifier.weight.copy_(torch.as_tensor(head.weight))
            classifier.classifier.bias.copy_(torch.as_tensor(head.bias))
        model = with_lora(classifier, training.rank)
        inner = model.get_base_model()
        dtype = faster_dtype("cpu")
        mixed = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)  # autocast has no float32
        with configured(inner, **PATTERNS[DENSE if variant == TILES else variant]), mixed:
            _train(inner, encoder, [images[index] for index in train], labels[train], variant, training)
            inner.eval()
            with torch.inference_mode():
                for index in held_out:
                    logits = region_logits(inner, encoder, images[index], variant)
                    probabilities[0, index] = logits.double().softmax(dim=-1).numpy()
    return Probe(probabilities, labels, of_region)


def region_logits(
    model: SparsePathViTForImageClassification, encoder: Encoder, image: np.ndarray, variant: str
) -> torch.Tensor:
    """(classes,) logits of a region: of its own features, or of the mean over its tiles, each counted by its area."""
    parts, areas = tiles_of(image, encoder) if variant == TILES else ([image], [1])
    pooled = [model.sparsepath_vit(**prepare(encoder.processor, [part])).pooler_output[0] for part in parts]
    weights = torch.tensor(areas, dtype=torch.float32) / sum(areas)
    return model.classifier((torch.stack(pooled) * weights[:, None]).sum(dim=0))


def _classifier(encoder: Encoder, num_classes: int) -> SparsePathViTForImageClassification:
    config = copy.deepcopy(encoder.model.config)
    config.num_labels = num_classes
    classifier = SparsePathViTForImageClassification(config)
    classifier.sparsepath_vit.load_state_dict(encoder.model.state_dict())
    return classifier


def _train(
    model: SparsePathViTForImageClassification,
    encoder: Encoder,
    images: list[np.ndarray],
    labels: np.ndarray,
    variant: str,
    training: Training,
) -> None:
    """Trains what asks for gradients; classes count alike, and regions are flipped and turned by quarters."""
    generator = np.random.default_rng(training.seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.01)
    num_steps = training.epochs * -(-len(images) // training.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    counts = np.bincount(labels, minlength=model.num_labels)
    class_weights = torch.as_tensor(len(labels) / np.maximum(counts, 1), dtype=torch.float32)
    loss_of = nn.CrossEntropyLoss(weight=class_weights / class_weights.mean(), reduction="sum")
    model.train()
    for _ in tqdm(range(training.epochs), desc=f"fine-tuning, {variant}", unit="epoch", disable=None):
        order = generator.permutation(len(images))
        for start in range(0, len(order), training.batch_size):
            batch = order[start : start + training.batch_size]
            for index in batch:
                image = images[index][:, ::-1] if generator.integers(2) else images[index]
                image = np.ascontiguousarray(np.rot90(image, generator.integers(4)))
                logits = region_logits(model, encoder, image, variant)
                (loss_of(logits[None], torch.tensor([labels[index]])) / len(batch)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
