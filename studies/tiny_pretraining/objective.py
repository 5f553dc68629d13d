# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Self-supervised training of a small SparsePathViT: an objective that moves within an hour on one processor core.

Four terms, all computed from the pixels of the views; no label and no tissue mask is used:

* **patches**: most patch tokens are dropped before the encoder (as in MAE, arXiv 2111.06377); one decoder layer
  predicts the stain and texture descriptors of the missing ones (hand-made targets as in MaskFeat, arXiv 2112.09133);
* **region**: a linear map of the CLS token predicts the mean and spread of those descriptors over the whole view;
* **views**: the CLS tokens of two views of one place agree, and differ from those of other places (InfoNCE, arXiv
  1807.03748);
* **attention**: at the pruning layer the attention of the global tokens over the patch tokens, which is the prune
  score, follows the stain energy of the patches. This is a hand-made prior of what matters in a region: bare glass is
  to receive little.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from sparsepath_vit.model.configuration_sparsepath_vit import SparsePathViTConfig
from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel

CELLS = 2  # descriptors are taken in CELLS x CELLS cells of a patch
# mean density of 3 stain channels and 4 oriented gradient energies per cell, density spread of 3 channels per patch
DESCRIPTOR_SIZE = (3 + 4) * CELLS**2 + 3
PROJECTION_SIZE = 128
TEMPERATURE = 0.2
_SMALLEST_ENERGY = 1e-3


def optical_density(pixels: torch.Tensor) -> torch.Tensor:
    """How much light the stain takes away: 0 for white, about 1 for dark nuclei. Pixels in 0..1."""
    return -pixels.clamp(min=1 / 255).log()


def patch_descriptors(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Stain and texture of each patch, from pixels alone.

    Args:
        pixels: (batch, 3, height, width) in 0..1, sides multiples of `patch_size`.
        patch_size: pixels per patch side, a multiple of `CELLS`.

    Returns:
        (batch, rows * columns, DESCRIPTOR_SIZE): densities, and logarithms of their gradients and spread.
    """
    pool, cell = nn.functional.avg_pool2d, patch_size // CELLS
    density = optical_density(pixels)
    grey = nn.functional.pad(density.mean(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = (grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]) / 2
    down = (grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]) / 2
    diagonals = ((across + down) / math.sqrt(2), (across - down) / math.sqrt(2))
    gradients = torch.cat([across, down, *diagonals], dim=1).abs()  # (batch, 4, height, width)
    in_cells = torch.cat([pool(density, cell), (pool(gradients, cell) + _SMALLEST_ENERGY).log()], dim=1)
    in_cells = nn.functional.pixel_unshuffle(in_cells, CELLS)  # (batch, 7 * CELLS**2, rows, columns)
    variance = pool(density.square(), patch_size) - pool(density, patch_size).square()
    spread = (variance.clamp(min=0).sqrt() + _SMALLEST_ENERGY).log()
    return torch.cat([in_cells, spread], dim=1).flatten(2).transpose(1, 2)


def stain_energy(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """How much stain and structure lies in and around each patch: (batch, rows * columns), not negative.

    The mean optical density and its standard deviation within the patch, averaged over 3 x 3 patches.
    """
    grey = optical_density(pixels).mean(dim=1, keepdim=True)
    mean = nn.functional.avg_pool2d(grey, patch_size)
    variance = nn.functional.avg_pool2d(grey.square(), patch_size) - mean.square()
    energy = mean + variance.clamp(min=0).sqrt()
    return nn.functional.avg_pool2d(energy, 3, stride=1, padding=1, count_include_pad=False).flatten(1)


class PretrainingLosses(NamedTuple):
    """The four terms, each a scalar of about 1 at the start."""

    patches: torch.Tensor
    region: torch.Tensor
    views: torch.Tensor
    attention: torch.Tensor

    def total(self) -> torch.Tensor:
        """Their sum."""
        return sum(self)


class SparsePathViTPretraining(nn.Module):
    """An encoder with the heads of self-supervised training.

    Args:
        config: of the encoder. Training runs with dense attention, which is what `window_size=8` computes on grids of
            up to 16 x 16 tokens.
        image_mean: channel means of the normalisation, images in 0..1.
        image_std: channel standard deviations of the normalisation.
    """

    def __init__(
        self, config: SparsePathViTConfig, image_mean: tuple[float, ...], image_std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.encoder = SparsePathViTModel(config)
        width = config.hidden_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.to_decoder = nn.Linear(width, width)
        self.decoder = nn.TransformerEncoderLayer(
            width, config.num_attention_heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.predict_patches = nn.Linear(width, DESCRIPTOR_SIZE)
        self.predict_region = nn.Linear(width, 2 * DESCRIPTOR_SIZE)
        self.project = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, PROJECTION_SIZE))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.register_buffer("image_mean", torch.tensor(image_mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(1, 3, 1, 1), persistent=False)

    def forward(self, views: torch.Tensor, is_visible: torch.Tensor) -> PretrainingLosses:
        """The losses of one batch.

        Args:
            views: (2 * pairs, 3, size, size) in 0..1; view i and view i + pairs show the same place.
            is_visible: (2 * pairs, rows, columns) bool, equally many True in each: the tokens the encoder sees.
        """
        config = self.encoder.config
        outputs = self.encoder(
            (views - self.image_mean) / self.image_std, patch_mask=is_visible, output_hidden_states=True
        )
        descriptors = _standardised(patch_descriptors(views, config.patch_size))
        cls_token = outputs.last_hidden_state[:, 0]
        spread = descriptors.std(dim=1)
        region = torch.cat([descriptors.mean(dim=1), spread], dim=-1)
        received = self._global_attention(outputs.hidden_states[config.prune_after_layer - 1])
        energy = stain_energy(views, config.patch_size)[is_visible.flatten(1)].view(len(views), -1)
        return PretrainingLosses(
            patches=self._patch_loss(outputs.last_hidden_state, outputs.patch_positions, is_visible, descriptors),
            region=nn.functional.mse_loss(self.predict_region(cls_token).float(), _standardised(region)),
            views=_view_loss(self.project(cls_token).float()),
            attention=_divergence(energy, received),
        )

    def _patch_loss(
        self, tokens: torch.Tensor, positions: torch.Tensor, is_visible: torch.Tensor, descriptors: torch.Tensor
    ) -> torch.Tensor:
        """Error of the descriptors predicted where the encoder saw nothing."""
        rows, columns = is_visible.shape[1:]
        num_global_tokens = self.encoder.config.num_global_tokens
        tokens = self.to_decoder(tokens)
        places = (positions[..., 0] * columns + positions[..., 1])[..., None].expand(-1, -1, tokens.shape[-1])
        canvas = self.mask_token.to(tokens.dtype).expand(len(tokens), rows * columns, -1)
        canvas = canvas.scatter(1, places, tokens[:, num_global_tokens:])
        canvas = canvas + sine_positions(rows, columns, tokens.shape[-1]).to(canvas)
        decoded = self.decoder(torch.cat([tokens[:, :num_global_tokens], canvas], dim=1))
        predicted = self.predict_patches(decoded[:, num_global_tokens:]).float()
        is_missing = ~is_visible.flatten(1)
        return nn.functional.smooth_l1_loss(predicted[is_missing], descriptors[is_missing])

    def _global_attention(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Share of each patch token in what the global tokens attend to at the pruning layer, with gradient.

        Args:
            hidden_states: (batch, G + N, hidden_size) before that layer.

        Returns:
            (batch, N) that sum to one: the prune score "attention", over the patch tokens alone.
        """
        config = self.encoder.config
        layer = self.encoder.encoder.layers[config.prune_after_layer - 1]
        # each (batch, heads, tokens, head_dim)
        query, key, _ = (states.float() for states in layer.attention.query_key_value(layer.norm1(hidden_states)))
        logits = query[:, :, : config.num_global_tokens] @ key.transpose(2, 3) * layer.attention.scaling
        received = logits.softmax(dim=-1)[..., config.num_global_tokens :].mean(dim=(1, 2))
        return received / received.sum(dim=-1, keepdim=True)


def sine_positions(rows: int, columns: int, width: int) -> torch.Tensor:
    """Fixed 2-D positions of the decoder: (rows * columns, width); width a multiple of 4."""
    frequencies = 100.0 ** (-torch.arange(width // 4) / (width // 4))
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()  # (rows * columns, 2)
    angles = (places[:, :, None] * frequencies).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def visible_tokens(views: int, side: int, num_visible: int, generator: torch.Generator) -> torch.Tensor:
    """Draws the tokens the encoder sees: (views, side, side) bool with `num_visible` True in each."""
    order = torch.rand(views, side * side, generator=generator).argsort(dim=1)
    return (order < num_visible).view(views, side, side)


def _standardised(features: torch.Tensor) -> torch.Tensor:
    """Mean 0 and standard deviation 1 of each feature over the batch."""
    dims = tuple(range(features.ndim - 1))
    return (features - features.mean(dim=dims)) / (features.std(dim=dims) + 1e-4)


def _view_loss(projections: torch.Tensor) -> torch.Tensor:
    """InfoNCE over all views, as a share of what guessing costs: (2 * pairs, features) -> scalar."""
    views = nn.functional.normalize(projections, dim=-1)
    logits = views @ views.T / TEMPERATURE
    logits = logits.masked_fill(torch.eye(len(views), dtype=torch.bool, device=views.device), -torch.inf)
    partners = torch.arange(len(views), device=views.device).roll(len(views) // 2)
    return nn.functional.cross_entropy(logits, partners) / math.log(max(2, len(views) - 1))


def _divergence(energy: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of the attention from the normalised energy, mean over the batch."""
    wanted = (energy + 1e-4) / (energy + 1e-4).sum(dim=-1, keepdim=True)
    return (wanted * (wanted.log() - (received + 1e-8).log())).sum(dim=-1).mean()
