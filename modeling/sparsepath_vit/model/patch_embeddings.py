# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""From pixels, checked and normalised, to patches."""

import torch
from torch import nn

from .configuration_sparsepath_vit import SparsePathViTConfig
from .pixel_normalisation import normalised

_CHECKED_PIXEL_ROWS = 512


class SparsePathViTPatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel; in 16 bits as the matrix product it is.

    There torch's convolution took up to seven times as long on a CPU (1536 channels, bfloat16). In float32 it gains
    little, and 24 layers amplify a rounding that is not that of the peers a conversion is compared with.
    """

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(pixel_values)
        size = self.kernel_size[0]
        # (batch, channels, rows, size, columns, size) -> (batch, rows, columns, channels * size * size)
        patches = pixel_values.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class SparsePathViTPatchEmbeddings(nn.Module):
    """Patches of (batch, channels, height, width) pixels as (batch, rows, columns, hidden_size)."""

    def __init__(self, config: SparsePathViTConfig) -> None:
        super().__init__()
        self.config = config
        self.num_channels = config.num_channels
        self.patch_size = config.patch_size
        self.projection = SparsePathViTPatchProjection(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.projection(self.normalised(pixel_values).to(self.projection.weight.dtype))
        return patches.permute(0, 2, 3, 1)  # (batch, hidden_size, rows, columns) -> (batch, rows, columns, hidden_size)

    def normalised(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Raw pixels, of uint8, as the image processor normalises them; others as they are.

        Raises:
            ValueError: raw pixels, and a config that does not say how to normalise them.
        """
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        self._check_normalisation()
        return normalised(pixel_values, self.config.image_mean, self.config.image_std)

    def _check_normalisation(self) -> None:
        if self.config.image_mean is None or self.config.image_std is None:
            raise ValueError(
                "pixel_values is torch.uint8 and this model's config does not say how to normalise raw pixels: set "
                "image_mean and image_std to those of the image processor, or let the processor normalise them."
            )

    def check(self, pixel_values: torch.Tensor) -> None:
        """Refuses pixels the model would misread.

        Raises:
            ValueError: names the shape and the remedy.
        """
        if not isinstance(pixel_values, torch.Tensor):
            raise ValueError(
                f"pixel_values is a {type(pixel_values).__name__}: it takes a torch.Tensor. "
                'SparsePathViTImageProcessor makes one with return_tensors="pt".'
            )
        if pixel_values.ndim != 4 or pixel_values.shape[0] == 0 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}: it takes (batch, {self.num_channels}, height, "
                "width) of at least one image. SparsePathViTImageProcessor converts images of any mode."
            )
        is_raw = pixel_values.dtype == torch.uint8
        if not pixel_values.is_floating_point() and not is_raw:
            raise ValueError(
                f"pixel_values is {pixel_values.dtype}: it takes normalised floating point numbers, or raw pixels as "
                "torch.uint8. SparsePathViTImageProcessor makes either."
            )
        if is_raw:
            self._check_normalisation()
        height, width = pixel_values.shape[-2:]
        if height < self.patch_size or width < self.patch_size:
            raise ValueError(
                f"pixel_values is {height} x {width} px, smaller than one patch of {self.patch_size} px: "
                "use a larger region."
            )
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"pixel_values is {height} x {width} px, no multiple of patch_size={self.patch_size}: "
                "SparsePathViTImageProcessor pads to the next multiple and masks the padding."
            )
        # On an accelerator reading the answer would stall the queue, and capturing a graph would fail.
        is_checked = pixel_values.device.type == "cpu" and not torch.compiler.is_compiling()
        # In parts: the check makes copies of what it checks. Where the sum is finite, all are; that is much quicker.
        parts = pixel_values.split(_CHECKED_PIXEL_ROWS, dim=2) if is_checked and not is_raw else ()
        if not all(part.sum().isfinite() or part.isfinite().all() for part in parts):
            raise ValueError(
                "pixel_values holds NaN or infinite numbers, which would spread to every token: check the image and "
                "its normalisation."
            )
