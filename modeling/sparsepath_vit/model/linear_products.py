# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Linear layers whose products go at once where they are wanted: into memory that is there, or onto what is there.

A linear layer makes a new tensor, which is then copied, or scaled and added to the residual stream: each a pass over
all tokens that does no arithmetic worth the name. A matrix product can write anywhere, and add to what it finds.
"""

import torch
from torch import nn

from .attention_precision import autocasts
from .fused_elementwise import fuses_layer


def is_plain(linear: nn.Module) -> bool:
    """Whether a layer is a weight and a bias and nothing else: no adapter, no quantised weight, no subclass."""
    return type(linear) is nn.Linear and type(linear.weight) in (torch.Tensor, nn.Parameter)


class WrittenProducts:
    """The output of a linear layer, of which rows and features are written where they are wanted; for inference.

    A layer that is not plain, or runs under autocast, is called once, and what it made is copied.

    Args:
        linear: the layer.
        inputs: (tokens, in_features).
    """

    def __init__(self, linear: nn.Module, inputs: torch.Tensor) -> None:
        self._linear, self._inputs = linear, inputs
        is_called = not is_plain(linear) or autocasts(inputs.device.type)
        self._made = linear(inputs) if is_called else None

    def new_empty(self, *shape: int) -> torch.Tensor:
        """Memory for the output."""
        return (self._inputs if self._made is None else self._made).new_empty(shape)

    def write(self, rows: slice, features: slice, output: torch.Tensor) -> None:
        """Writes some rows and features, (rows, features)."""
        if self._made is not None:
            output.copy_(self._made[rows, features])
            return
        inputs, weight, bias = self._inputs[rows], self._linear.weight[features], self._linear.bias
        if bias is None:
            torch.mm(inputs, weight.T, out=output)
        else:
            torch.addmm(bias[features], inputs, weight.T, out=output)


def adds_product(total: torch.Tensor, linear: nn.Module, *modules: nn.Module) -> bool:
    """Whether `add_product_` may stand for a linear layer, LayerScale and the residual sum, as `fuses_layer` says.

    Not for few tokens: scaling the weights would then take longer than scaling and adding their products.

    Args:
        total: (..., out_features), the residual stream.
        linear: the layer.
        modules: further ones that are not called.
    """
    if not is_plain(linear) or autocasts(total.device.type) or linear.weight.dtype != total.dtype:
        return False
    tokens = total.numel() // total.shape[-1]
    return tokens >= linear.in_features and fuses_layer(total, total, linear, *modules)


def scaled_weights(linear: nn.Linear, scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight, (out_features, in_features), and bias, (out_features,) or `None`, of a layer and a LayerScale in one."""
    if scale is None:
        return linear.weight, linear.bias
    return linear.weight * scale[:, None], None if linear.bias is None else linear.bias * scale


def add_product_(total: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Adds the products of tokens and weights to `total`, (..., out_features), which is returned; rounded once.

    Args:
        total: contiguous.
        inputs: (..., in_features).
        weight: (out_features, in_features).
    """
    total.view(-1, total.shape[-1]).addmm_(inputs.reshape(-1, inputs.shape[-1]), weight.T)
    return total
