# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Small models with weights large enough that a wrong attention pattern, scale or order changes the numbers."""

import torch
from torch import nn

from sparsepath_vit import SparsePathViTConfig

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "num_register_tokens": 2,
    "patch_size": 4,
    "image_size": 24,
    "window_size": 4,
    "prune_after_layer": 2,
    "layerscale_value": 1.0,
}


def small_config(**overrides):
    return SparsePathViTConfig(**{**SMALL, **overrides})


def small_model(model_class, seed=0, **overrides):
    """A small model with large weights, in evaluation mode."""
    return large_weights_(model_class(small_config(**overrides)), seed).eval()


@torch.no_grad()
def large_weights_(model, seed=0):
    """Draws large random weights: attention far from uniform, LayerScale near 1, no parameter at its initial value."""
    generator = torch.Generator().manual_seed(seed)

    def draw(parameter, mean, std):
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std + mean)

    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm) and name == "weight":
                draw(parameter, 1.0, 0.2)
            elif "lambda1" in name:
                draw(parameter, 1.0, 0.3)
            elif isinstance(module, nn.Linear | nn.Conv2d) and name == "weight":
                draw(parameter, 0.0, 1.5 * parameter[0].numel() ** -0.5)
            elif name == "bias":
                draw(parameter, 0.0, 0.3)
            else:  # tokens and position embeddings
                draw(parameter, 0.0, 1.0)
    return model


def random_pixels(batch, rows, columns, seed=0, patch_size=4, channels=3):
    """(batch, channels, rows * patch_size, columns * patch_size)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, rows * patch_size, columns * patch_size, generator=generator)


def random_mask(batch, rows, columns, share, seed=0):
    """(batch, rows, columns) bool with about `share` present patches, at least one in each image."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, rows, columns, generator=generator) < share
    for image in mask:
        image.view(-1)[int(torch.randint(rows * columns, (), generator=generator))] = True
    return mask
