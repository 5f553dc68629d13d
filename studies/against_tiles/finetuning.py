# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning through whole regions against fine-tuning through averaged tiles: low-rank adapters in all layers.

The head is the linear probe of the frozen features and stays as it is, so what is compared is what training the network
itself adds. How many passes over the regions are made is chosen by log-loss in grouped folds of the training regions;
none is among the choices, since few regions are soon learnt by heart.
"""

import copy
import logging
from collections.abc import Iterator, Sequence, Set
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
from sparsepath_vit.tasks.classification.linear_probe import LinearHead

from .features import DENSE, PATTERNS, TILES, Encoder, tiles_of
from .probes import UNLIKELY, balanced_head, chosen_penalty, softmax

logger = logging.getLogger("against_tiles")

VARIANTS = (TILES, "w = 8", "w = 8, 60 % pruned", "stratified")


@dataclass(frozen=True)
class Training:
    """How adapters are trained.

    Attributes:
        most_epochs: passes over the training regions, at most.
        learning_rate: of AdamW, the same in all steps.
        rank: of the adapters.
        batch_size: regions a step; one at a time goes through the network.
        num_folds: of the division; blocks of tissue are not divided.
        num_inner_folds: of the training regions, to choose how many passes are made.
        seed: of the divisions, the order of regions and the adapters.
    """

    most_epochs: int = 3
    learning_rate: float = 1e-4
    rank: int = 8
    batch_size: int = 4
    num_folds: int = 3
    num_inner_folds: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Regions:
    """Labelled regions of one size.

    Attributes:
        images: (height, width, 3) uint8 each.
        features: (regions, pooled_size) of the frozen model, from which the head is fitted.
        labels: (regions,) class indices.
        groups: (regions,) number of the block of tissue.
        num_classes: of all regions, of which these may be a part.
    """

    images: Sequence[np.ndarray]
    features: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    num_classes: int

    def part(self, indices: np.ndarray) -> "Regions":
        """Some of them."""
        images = [self.images[index] for index in indices]
        return Regions(images, self.features[indices], self.labels[indices], self.groups[indices], self.num_classes)

    def folds(self, num_folds: int, seed: int) -> list[tuple["Regions", np.ndarray]]:
        """The regions to train on and the indices of those held out, fold by fold."""
        division = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
        return [
            (self.part(train), held_out) for train, held_out in division.split(self.labels, self.labels, self.groups)
        ]

    def penalty(self) -> float:
        """That of the linear probe, chosen in folds of these regions."""
        return chosen_penalty(self.features, self.labels, self.groups, self.num_classes)

    def head(self, penalty: float) -> LinearHead:
        """The linear probe."""
        return balanced_head(self.features, self.labels, self.num_classes, penalty)


def fine_tuned(
    encoder: Encoder, train: Regions, held_out: Regions, variant: str, training: Training
) -> tuple[np.ndarray, int]:
    """What a network trained on some regions says of others, and how many passes were chosen.

    Args:
        encoder: the pretrained model, left as it is.
        train: their features and those of `held_out` are of the frozen model by this variant.
        held_out: of other blocks of tissue.
        variant: of `VARIANTS`.
        training: how.

    Returns:
        (held out, classes) probabilities, those of the frozen probe where no pass was chosen.
    """
    penalty = train.penalty()
    epochs = chosen_epochs(encoder, train, penalty, variant, training)
    probabilities = said_after_each_epoch(encoder, train, held_out, penalty, variant, training, {epochs})
    return probabilities[epochs], epochs


def chosen_epochs(encoder: Encoder, regions: Regions, penalty: float, variant: str, training: Training) -> int:
    """The number of passes with the least log-loss in folds of the training regions; of equals the smallest."""
    counts = range(training.most_epochs + 1)
    losses = np.zeros(len(counts))
    for train, indices in regions.folds(training.num_inner_folds, training.seed):
        held_out = regions.part(indices)
        said = said_after_each_epoch(encoder, train, held_out, penalty, variant, training, set(counts))
        for epochs, probabilities in said.items():
            losses[epochs] -= np.log(probabilities[np.arange(len(indices)), held_out.labels]).sum()
    logger.info("%s: log-loss inside by number of epochs %s", variant, np.round(losses / len(regions.labels), 3))
    return int(losses.argmin())


def said_after_each_epoch(
    encoder: Encoder,
    train: Regions,
    held_out: Regions,
    penalty: float,
    variant: str,
    training: Training,
    wanted: Set[int],
) -> dict[int, np.ndarray]:
    """(held out, classes) probabilities after each of the wanted numbers of passes."""
    head = train.head(penalty)
    said = {0: softmax(head, held_out.features)}
    if max(wanted) == 0:
        return said
    torch.manual_seed(training.seed)
    model = with_lora(_classifier(encoder, head), training.rank).get_base_model()
    model.classifier.requires_grad_(False)
    dtype = faster_dtype("cpu")
    mixed = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)  # autocast has no float32
    with configured(model, **PATTERNS[DENSE if variant == TILES else variant]), mixed:
        for epochs, _ in enumerate(_epochs(model, encoder, train, variant, training, max(wanted)), start=1):
            if epochs in wanted:
                said[epochs] = _said(model, encoder, held_out, variant)
    return said


def _said(model: SparsePathViTForImageClassification, encoder: Encoder, regions: Regions, variant: str) -> np.ndarray:
    """(regions, classes) probabilities, none of them 0."""
    model.eval()
    with torch.inference_mode():
        logits = torch.stack([region_logits(model, encoder, image, variant) for image in regions.images])
    return logits.double().softmax(dim=-1).clamp(min=UNLIKELY).numpy()


def region_logits(
    model: SparsePathViTForImageClassification, encoder: Encoder, image: np.ndarray, variant: str
) -> torch.Tensor:
    """(classes,) logits of a region: of its own features, or of the mean over its tiles, each counted by its area."""
    parts, areas = tiles_of(image, encoder) if variant == TILES else ([image], [1])
    pooled = [model.sparsepath_vit(**prepare(encoder.processor, [part])).pooler_output[0] for part in parts]
    weights = torch.tensor(areas, dtype=torch.float32) / sum(areas)
    return model.classifier((torch.stack(pooled) * weights[:, None]).sum(dim=0))


def _classifier(encoder: Encoder, head: LinearHead) -> SparsePathViTForImageClassification:
    config = copy.deepcopy(encoder.model.config)
    config.num_labels = len(head.bias)
    classifier = SparsePathViTForImageClassification(config)
    classifier.sparsepath_vit.load_state_dict(encoder.model.state_dict())
    with torch.no_grad():
        classifier.classifier.weight.copy_(torch.as_tensor(head.weight))
        classifier.classifier.bias.copy_(torch.as_tensor(head.bias))
    return classifier


def _epochs(
    model: SparsePathViTForImageClassification,
    encoder: Encoder,
    regions: Regions,
    variant: str,
    training: Training,
    epochs: int,
) -> Iterator[None]:
    """Trains what asks for gradients, pass by pass; classes count alike, regions are flipped and turned by quarters."""
    generator = np.random.default_rng(training.seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.learning_rate, weight_decay=0.01)
    counts = np.bincount(regions.labels, minlength=model.num_labels)
    class_weights = torch.as_tensor(len(regions.labels) / np.maximum(counts, 1), dtype=torch.float32)
    loss_of = nn.CrossEntropyLoss(weight=class_weights / class_weights.mean(), reduction="sum")
    for _ in tqdm(range(epochs), desc=f"fine-tuning, {variant}", unit="epoch", disable=None):
        model.train()
        order = generator.permutation(len(regions.images))
        for start in range(0, len(order), training.batch_size):
            batch = order[start : start + training.batch_size]
            for index in batch:
                image = regions.images[index][:, ::-1] if generator.integers(2) else regions.images[index]
                image = np.ascontiguousarray(np.rot90(image, generator.integers(4)))
                logits = region_logits(model, encoder, image, variant)
                (loss_of(logits[None], torch.tensor([regions.labels[index]])) / len(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
        yield
