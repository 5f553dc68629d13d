# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A linear classifier of patch tokens on an embedded slide: which class every token looks like."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from .embedded_slide import EmbeddedSlide
from .errors import SlideError
from .token_values import TokenValues, of_kept


@dataclass(frozen=True)
class TokenProbe:
    """A linear classifier of features.

    Attributes:
        weight: (classes, channels).
        bias: (classes,).
        names: of the classes.
    """

    weight: np.ndarray
    bias: np.ndarray
    names: tuple[str, ...]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "TokenProbe":
        """From a safetensors file with `weight`, `bias` and, if wanted, the metadata `names`, a JSON list.

        Raises:
            SlideError: the file is none, or its shapes do not fit.
        """
        try:
            with safe_open(Path(path), framework="numpy") as file:
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
                names = json.loads((file.metadata() or {}).get("names", "null"))
        except (OSError, SafetensorError, ValueError) as error:
            raise SlideError(
                f"{path} cannot be read as a linear classifier ({error}): it is a safetensors file with weight "
                "(classes, channels) and bias (classes,)."
            ) from error
        names = tuple(names or (f"class {number}" for number in range(len(weight))))
        if weight.ndim != 2 or bias.shape != (len(weight),) or len(names) != len(weight):
            raise SlideError(
                f"{path} holds a weight of shape {weight.shape}, a bias of shape {bias.shape} and {len(names)} names: "
                "weight is (classes, channels), and there is one bias and one name for each class."
            )
        return cls(weight, bias, names)

    def probabilities(self, slide: EmbeddedSlide) -> np.ndarray:
        """(K, classes) float32 softmax probabilities of the kept tokens.

        Raises:
            SlideError: the features have another width.
        """
        if slide.features.shape[1] != self.weight.shape[1]:
            raise SlideError(
                f"the classifier takes features of {self.weight.shape[1]} channels; {slide.path} holds "
                f"{slide.features.shape[1]}: use one that was fitted to tokens of the same model."
            )
        weight = torch.from_numpy(self.weight.astype(np.float32))
        bias = torch.from_numpy(self.bias.astype(np.float32))
        probabilities = np.empty((len(slide.features), len(bias)), dtype=np.float32)
        for first, block in slide.features.blocks():
            probabilities[first : first + len(block)] = (block @ weight.T + bias).softmax(dim=1).numpy()
        return probabilities

    def values(self, slide: EmbeddedSlide, number: int) -> TokenValues:
        """The probabilities of one class, from 0 to 1."""
        name = f"probability_{self.names[number]}"
        return of_kept(slide, name, self.probabilities(slide)[:, number], (0.0, 1.0), "probability")
