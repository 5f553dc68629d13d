# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint as tile toolkits want it: pixels in, one plain tensor out."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
from ..model.modeling_outputs_sparsepath_vit import patch_tokens_to_map
from ..model.patch_presence import background_patches, covered_patches
from ..runtime.load_model import load_model
from ..runtime.model_identity import encoder_name

_OUTPUT_DTYPES = {"float32": torch.float32, "float16": torch.float16}


class ImageTransform:
    """One image -> (3, height, width) float32, normalised as the checkpoint takes it; its pixels are not resampled.

    Args:
        processor: the checkpoint's image processor.
    """

    def __init__(self, processor: SparsePathViTImageProcessor) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> torch.Tensor:
        """Normalises a PIL image, an array (height, width, 3) or a tensor (3, height, width).

        Raises:
            ValueError: no image the processor takes, or one smaller than a patch.
        """
        batch = self.processor([image], do_resize=False, mask_background=False, return_tensors="pt")
        height, width = _size_of(image)
        return batch["pixel_values"][0, :, :height, :width].clone()  # without the padding to whole patches

    def __repr__(self) -> str:
        mean, std = self.processor.image_mean, self.processor.image_std
        return f"{type(self).__name__}(mean={tuple(mean)}, std={tuple(std)}, resize=None)"


class FeatureExtractor(nn.Module):
    """An encoder whose forward gives pooled features, (batch, pooled_size), of images of any one size.

    Sizes that are no multiple of the patch size are padded with white at the bottom and right, and patches that hold
    too little of the image are masked, as the image processor does.

    Args:
        source: folder or Hub id of a converted checkpoint.
        device: of the weights; toolkits move the module themselves.
        dtype: of the weights.
        output_dtype: of the features, "float32" or "float16".
        **overrides: fields of the configuration, such as `prune_ratio=0.0`.

    Attributes:
        transform: takes an image to normalised pixels, see `ImageTransform`.
        name: of the checkpoint, with a hash of its weights.
        feature_size: length of a pooled vector.
        hidden_size: channels of a feature map.
        patch_size: in pixels.

    Raises:
        ValueError: an unknown dtype.
        OSError: no checkpoint at `source`.

    Example:
    ```python
    >>> extractor = FeatureExtractor("./uni2-h")
    >>> features = extractor(extractor.transform(image)[None])  # (1, 1536)
    ```
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        device: str = "cpu",
        dtype: str = "float32",
        output_dtype: str = "float32",
        **overrides: Any,
    ) -> None:
        super().__init__()
        if output_dtype not in _OUTPUT_DTYPES:
            raise ValueError(
                f"output_dtype={output_dtype!r} is not possible: NumPy, which toolkits store features with, knows "
                f"{' and '.join(_OUTPUT_DTYPES)}."
            )
        self.model, self.processor = load_model(source, device, dtype, **overrides)
        self.transform = ImageTransform(self.processor)
        self.output_dtype = _OUTPUT_DTYPES[output_dtype]
        self.name = encoder_name(self.model)
        self.feature_size, self.hidden_size = self.model.config.pooled_size, self.model.config.hidden_size
        self.patch_size = self.model.config.patch_size
        self.requires_grad_(False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pooled features.

        Args:
            pixel_values: (batch, 3, height, width) float, normalised.

        Returns:
            (batch, feature_size).
        """
        pixels, patch_mask = self._whole_patches(pixel_values)
        return self.model(pixels, patch_mask=patch_mask).pooler_output.to(self.output_dtype)

    def tokens(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The CLS token, (batch, hidden_size), and the map of the patch tokens, (batch, hidden_size, rows, columns).

        Rows and columns are those of the patches that hold enough of the image.

        Raises:
            ValueError: the checkpoint prunes and does not bring removed tokens back.
        """
        config = self.model.config
        if config.prune_ratio and config.unprune is None:
            raise ValueError(
                f"prune_ratio={config.prune_ratio} leaves holes in a dense map: load the extractor with "
                'prune_ratio=0.0, or with unprune="scatter": then removed tokens keep the features they had.'
            )
        pixels, patch_mask = self._whole_patches(pixel_values)
        outputs = self.model(pixels, patch_mask=patch_mask)
        rows, columns = self.grid_size(*pixel_values.shape[-2:])
        maps = patch_tokens_to_map(outputs.last_hidden_state, outputs.patch_positions, outputs.grid_sizes, fill=0.0)
        cls_token = outputs.last_hidden_state[:, 0]
        return cls_token.to(self.output_dtype), maps[:, :, :rows, :columns].to(self.output_dtype)

    def feature_maps(self, pixel_values: torch.Tensor, layers: Sequence[int]) -> list[torch.Tensor]:
        """Maps after some layers, counted from 1, after the final norm; what pruning removed keeps its last features.

        Returns:
            (batch, hidden_size, rows, columns) each.
        """
        pixels, patch_mask = self._whole_patches(pixel_values)
        encoded = self.model.encode(pixels, self.model.token_grid(pixels, patch_mask), output_hidden_states=True)
        rows, columns = self.grid_size(*pixel_values.shape[-2:])
        maps = [self.model.feature_map(encoded, layer) for layer in layers]
        return [feature_map[:, :, :rows, :columns].to(self.output_dtype) for feature_map in maps]

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patch tokens of an image."""
        covered = covered_patches(height, width, self.patch_size, self.processor.min_patch_coverage)
        return int(covered.any(dim=1).sum()), int(covered.any(dim=0).sum())

    def _whole_patches(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pixels padded to whole patches, and which patches are present; None where all are."""
        height, width = pixel_values.shape[-2:]
        side, processor = self.patch_size, self.processor
        covered = covered_patches(height, width, side, processor.min_patch_coverage)
        mean, std = (
            pixel_values.new_tensor(value).view(-1, 1, 1) for value in (processor.image_mean, processor.image_std)
        )
        present = covered.to(pixel_values.device).expand(len(pixel_values), *covered.shape)
        if processor.mask_background:
            images = (pixel_values * std + mean).float().clamp(0, 1)
            background = [background_patches(image, side, processor.background_fraction) for image in images]
            present = present & ~torch.stack(background)
        rows, columns = math.ceil(height / side), math.ceil(width / side)
        if (rows * side, columns * side) != (height, width):
            canvas = ((1 - mean) / std).expand(3, rows * side, columns * side)  # white
            canvas = canvas.repeat(len(pixel_values), 1, 1, 1)
            canvas[:, :, :height, :width] = pixel_values
            pixel_values = canvas
        return pixel_values, None if present.all() else present


def _size_of(image: Any) -> tuple[int, int]:
    """(height, width) of an image as toolkits hand it over."""
    if not isinstance(image, np.ndarray | torch.Tensor):
        return image.height, image.width  # PIL
    is_channels_first = image.ndim == 3 and image.shape[0] in (1, 3, 4)
    return tuple(image.shape[-2:] if is_channels_first else image.shape[:2])
