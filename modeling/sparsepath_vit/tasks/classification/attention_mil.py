# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Attention-based multiple-instance learning: gated attention pooling (Ilse et al. 2018) and a linear classifier."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from tqdm import trange

_ATTENTION_SIZE = 128
_MOST_ROWS = 4096  # of a bag that a training step takes; drawn anew each time


class AttentionMIL(nn.Module):
    """A bag of vectors -> logits of classes.

    Args:
        width: of a vector.
        num_labels: how many classes there are.
        mean: (width,) of the training vectors.
        std: (width,) likewise.
    """

    def __init__(self, width: int, num_labels: int, mean: torch.Tensor, std: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.content, self.gate = nn.Linear(width, _ATTENTION_SIZE), nn.Linear(width, _ATTENTION_SIZE)
        self.attention = nn.Linear(_ATTENTION_SIZE, 1)
        self.classifier = nn.Linear(width, num_labels)

    def forward(self, bag: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rows, width) -> logits (num_labels,) and the share of attention of each row, (rows,)."""
        rows = (bag - self.mean) / self.std
        scores = self.attention(torch.tanh(self.content(rows)) * torch.sigmoid(self.gate(rows)))[:, 0]
        weights = scores.softmax(dim=0)
        return self.classifier(weights @ rows), weights


def fit_attention_mil(
    bags: Sequence[np.ndarray], labels: np.ndarray, num_labels: int, *, epochs: int = 40, seed: int = 0
) -> AttentionMIL:
    """Trains on bags, one a step; classes count alike however many bags they have.

    Args:
        bags: (rows, width) float32 each.
        labels: (bags,) class indices.
        num_labels: how many classes there are.
        epochs: passes over the bags.
        seed: of weights, order and rows.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = sum(len(bag) for bag in bags)
    mean = sum(bag.sum(axis=0, dtype=np.float64) for bag in bags) / counts
    variance = sum(((bag - mean) ** 2).sum(axis=0) for bag in bags) / counts
    std = np.where(variance > 1e-12, np.sqrt(variance), 1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AttentionMIL(len(mean), num_labels, torch.tensor(mean).float(), torch.tensor(std).float())
    frequency = np.bincount(labels, minlength=num_labels)
    class_weights = torch.tensor(len(labels) / np.maximum(frequency, 1) / (frequency > 0).sum()).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(bags))
    for _ in trange(epochs, desc="abmil", unit="epoch", leave=False, disable=None):
        for index in torch.randperm(len(bags), generator=generator).tolist():
            bag = torch.from_numpy(bags[index])
            if len(bag) > _MOST_ROWS:
                bag = bag[torch.randperm(len(bag), generator=generator)[:_MOST_ROWS]]
            logits, _ = model(bag)
            loss = nn.functional.cross_entropy(logits, torch.tensor(labels[index])) * class_weights[labels[index]]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()
