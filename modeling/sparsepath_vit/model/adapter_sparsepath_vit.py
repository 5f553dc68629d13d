# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A ViT-Adapter (arXiv 2205.08534) on SparsePathViT: feature maps of strides 4, 8, 16 and 32 for images of any size.

Convolutions over the pixels give a pyramid. After some layers of the ViT its cells read the patch tokens by deformable
attention. In the default, extractor-only form the ViT is frozen and never sees the pyramid.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from .configuration_segmentation_sparsepath_vit import NORM_GROUPS, STRIDES, SparsePathViTAdapterConfig
from .deformable_attention import DeformableAttention, reference_points
from .embeddings import SparsePathViTEmbeddings
from .encoder_sparsepath_vit import SparsePathViTEncoder
from .pretrained_model import SparsePathViTPreTrainedModel
from .segmentation_inputs import allows_pruning, check_group_norm, pad_to_patches
from .token_grid import TokenGrid
from .token_pruning import EncodedTokens, scatter_to_map

# The cells that take part in the interactions are those of strides 8, 16 and 32; stride 4 would be four times as many.
INTERACTION_STRIDES = STRIDES[1:]


def token_map_at_stride(token_map: torch.Tensor, patch_size: int, stride: int, size: tuple[int, int]) -> torch.Tensor:
    """Resamples a map of patches to cells of another size, pixel for pixel where it was.

    Args:
        token_map: (batch, channels, rows, columns), one cell per patch.
        patch_size: pixels per patch side.
        stride: pixels per side of the cells wanted.
        size: (height, width) of the map wanted; cells beyond the patches repeat the last ones.

    Returns:
        (batch, channels, *size).
    """
    scale = patch_size / stride
    rows, columns = (
        max(math.ceil(cells / scale) - have, 0) for cells, have in zip(size, token_map.shape[2:], strict=True)
    )
    token_map = nn.functional.pad(token_map, (0, columns, 0, rows), mode="replicate")
    resampled = nn.functional.interpolate(token_map, scale_factor=scale, mode="bilinear", align_corners=False)
    return resampled[:, :, : size[0], : size[1]]


def reset_like_torch(module: nn.Module) -> None:
    """Draws the weights of all linear and convolutional layers inside as torch does when it makes them."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            init.kaiming_uniform_(layer.weight, a=math.sqrt(5))
            if layer.bias is not None:
                bound = nn.init._calculate_fan_in_and_fan_out(layer.weight)[0] ** -0.5
                init.uniform_(layer.bias, -bound, bound)
        elif isinstance(layer, DeformableAttention):
            layer.reset_points()


def _norm(config: SparsePathViTAdapterConfig, channels: int) -> nn.Module:
    if config.adapter_norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(NORM_GROUPS, channels), channels)


class SparsePathViTSpatialPrior(nn.Module):
    """Convolutions over the pixels: maps of strides 4, 8, 16 and 32 whose sizes are rounded up."""

    def __init__(self, config: SparsePathViTAdapterConfig) -> None:
        super().__init__()

        def convolution(channels: int, out_channels: int, stride: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
                _norm(config, out_channels),
                nn.ReLU(inplace=True),
            )

        width = config.adapter_stem_dim
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.stem = nn.Sequential(
            convolution(config.num_channels, width, stride=2),
            convolution(width, width, stride=1),
            convolution(width, width, stride=1),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        self.downsampling = nn.ModuleList(
            [convolution(widths[level], widths[level + 1], stride=2) for level in range(len(widths) - 1)]
        )
        self.projections = nn.ModuleList([nn.Conv2d(channels, config.adapter_dim, 1) for channels in widths])

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """(batch, channels, height, width) -> four maps (batch, adapter_dim, ceil(height / stride), ...)."""
        features = self.stem(pixel_values.to(self.projections[0].weight.dtype))
        maps = [self.projections[0](features)]
        for downsample, project in zip(self.downsampling, self.projections[1:], strict=True):
            features = downsample(features)
            maps.append(project(features))
        return maps


class SparsePathViTConvFeedForward(nn.Module):
    """A feed-forward layer that also looks at each cell's eight neighbours in its map."""

    def __init__(self, config: SparsePathViTAdapterConfig) -> None:
        super().__init__()
        width = max(1, int(config.adapter_dim * config.adapter_feedforward_ratio))
        self.fc1 = nn.Linear(config.adapter_dim, width)
        self.convolution = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.fc2 = nn.Linear(width, config.adapter_dim)

    def forward(self, cells: torch.Tensor, shapes: list[tuple[int, int]]) -> torch.Tensor:
        """(batch, cells of all maps, adapter_dim) -> the same."""
        maps = split_maps(self.fc1(cells), shapes)
        return self.fc2(nn.functional.gelu(flatten_maps([self.convolution(one) for one in maps])))


def flatten_maps(maps: list[torch.Tensor]) -> torch.Tensor:
    """Maps (batch, channels, height, width) -> (batch, cells of all maps, channels)."""
    return torch.cat([one.flatten(2).transpose(1, 2) for one in maps], dim=1)


def split_maps(cells: torch.Tensor, shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """The inverse of `flatten_maps`."""
    levels = cells.split([height * width for height, width in shapes], dim=1)
    return [level.transpose(1, 2).unflatten(2, shape) for level, shape in zip(levels, shapes, strict=True)]


class SparsePathViTExtractor(GradientCheckpointingLayer):
    """The pyramid reads the patch tokens after one layer of the ViT."""

    def __init__(self, config: SparsePathViTAdapterConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        dim, eps = config.adapter_dim, config.layer_norm_eps
        self.token_norm = nn.LayerNorm(config.hidden_size, eps=eps)
        self.token_projection = nn.Linear(config.hidden_size, dim)
        self.query_norm = nn.LayerNorm(dim, eps=eps)
        self.attention = DeformableAttention(
            dim, config.hidden_size, dim, config.adapter_num_heads, 1, config.adapter_num_points
        )
        self.feed_forward_norm = nn.LayerNorm(dim, eps=eps)
        self.feed_forward = SparsePathViTConvFeedForward(config)

    def forward(
        self,
        cells: torch.Tensor,
        shapes: list[tuple[int, int]],
        tokens: EncodedTokens,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads.

        Args:
            cells: (batch, cells of the maps of strides 8, 16 and 32, adapter_dim).
            shapes: (height, width) of these maps.
            tokens: of the ViT, with those that pruning removed.

        Returns:
            The cells, and the tokens as a map (batch, adapter_dim, rows, columns).
        """
        normed = tokens.apply(self.token_norm)
        value, token_map = (
            normed.apply(project).to_map() for project in (self.attention.value_projection, self.token_projection)
        )
        rows_and_columns = [tuple(value.shape[2:])]
        points = reference_points(shapes, list(INTERACTION_STRIDES), rows_and_columns, [self.patch_size], cells.device)
        attended = self.attention(self.query_norm(cells), points, flatten_maps([value]), rows_and_columns)
        cells = cells + attended
        return cells + self.feed_forward(self.feed_forward_norm(cells), shapes), token_map


class SparsePathViTInjector(GradientCheckpointingLayer):
    """The patch tokens read the pyramid before the next layers; starts as if it were not there."""

    def __init__(self, config: SparsePathViTAdapterConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cell_norm = nn.LayerNorm(config.adapter_dim, eps=config.layer_norm_eps)
        self.attention = DeformableAttention(
            config.hidden_size,
            config.adapter_dim,
            config.adapter_dim,
            config.adapter_num_heads,
            len(INTERACTION_STRIDES),
            config.adapter_num_points,
        )
        self.scale = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(
        self, tokens: torch.Tensor, grid: TokenGrid, cells: torch.Tensor, shapes: list[tuple[int, int]]
    ) -> torch.Tensor:
        """(*grid.batch_shape, hidden_size) -> the same, with the pyramid's features added to the patch tokens."""
        canvas = [grid.canvas_size]
        points = reference_points(canvas, [self.patch_size], shapes, list(INTERACTION_STRIDES), cells.device)
        queries = flatten_maps([scatter_to_map(self.query_norm(tokens), grid)])
        value = self.attention.value_projection(self.cell_norm(cells))
        injected = self.attention(queries, points, value, shapes) * self.scale  # (batch, rows * columns, hidden_size)
        packed = tokens.reshape(grid.num_tokens, -1)
        packed = packed.index_add(
            0, grid.patch_indices(), injected.flatten(0, 1)[grid.canvas_indices()].to(packed.dtype)
        )
        return packed.view(tokens.shape)


class SparsePathViTAdapterBackbone(BackboneMixin, SparsePathViTPreTrainedModel):
    """SparsePathViT as a hierarchical backbone for Mask2Former, UPerNet and other heads that take a pyramid.

    `SparsePathViTAdapterBackbone.from_pretrained(directory, config=SparsePathViTAdapterConfig.from_vit_config(...))`
    takes the ViT's weights from any SparsePathViT checkpoint; the adapter's are new.

    Example:
    ```python
    >>> vit_config = SparsePathViTConfig.from_pretrained(directory, window_size=64)
    >>> config = SparsePathViTAdapterConfig.from_vit_config(vit_config)
    >>> backbone = SparsePathViTAdapterBackbone.from_pretrained(directory, config=config)
    >>> [tuple(one.shape) for one in backbone(torch.randn(1, 3, 984, 984)).feature_maps]
    [(1, 256, 246, 246), (1, 256, 123, 123), (1, 256, 62, 62), (1, 256, 31, 31)]
    ```
    """

    config: SparsePathViTAdapterConfig
    config_class = SparsePathViTAdapterConfig

    def __init__(self, config: SparsePathViTAdapterConfig) -> None:
        super().__init__(config)
        dim = config.adapter_dim
        self.num_features = [dim] * len(self.stage_names)
        self.embeddings = SparsePathViTEmbeddings(config)
        self.encoder = SparsePathViTEncoder(config)
        self.spatial_prior = SparsePathViTSpatialPrior(config)
        self.level_embeddings = nn.Parameter(torch.zeros(len(INTERACTION_STRIDES), dim))
        self.extractors = nn.ModuleList([SparsePathViTExtractor(config) for _ in config.adapter_layers])
        if config.adapter_injector:
            self.injectors = nn.ModuleList([SparsePathViTInjector(config) for _ in config.adapter_layers])
        self.upsampling = nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
        self.output_norms = nn.ModuleList([_norm(config, dim) for _ in STRIDES])
        self.post_init()
        self.train(self.training)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        is_new = isinstance(module, SparsePathViTSpatialPrior | SparsePathViTExtractor | SparsePathViTInjector)
        if is_new or module is self.upsampling:
            reset_like_torch(module)
        if isinstance(module, SparsePathViTInjector):
            init.zeros_(module.scale)
        if module is self:
            init.normal_(self.level_embeddings)

    def train(self, mode: bool = True) -> "SparsePathViTAdapterBackbone":
        """As of any module, but a frozen ViT needs no gradients and drops nothing out."""
        super().train(mode)
        for module in (self.embeddings, self.encoder):
            if self.config.freeze_vit:
                module.requires_grad_(False)
                module.eval()
        return self

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_mask: torch.Tensor | None = None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        """Computes the feature maps named by `config.out_features`.

        Args:
            pixel_values: (batch, channels, height, width) of any height and width of at least one patch.
            patch_mask: (batch, ceil(height / patch_size), ceil(width / patch_size)) bool, True where a patch token is
                present; nothing is read from absent ones.
            image_sizes: (height, width) in pixels of each image on a larger canvas.
            **kwargs: `return_dict`.

        Returns:
            `feature_maps`, each (batch, adapter_dim, ceil(height / stride), ceil(width / stride)).

        Raises:
            ValueError: pixels, mask or sizes that do not fit, or pruning without `unprune` in training.
        """
        pixel_values = self.embeddings.patch_embeddings.normalised(pixel_values)
        padded = pad_to_patches(pixel_values, self.embeddings.patch_embeddings)
        if self.config.adapter_norm == "group":
            check_group_norm(pixel_values)
        may_prune = allows_pruning(self.config, self.training)
        finest, *pyramid = self.spatial_prior(pixel_values)
        shapes = [tuple(one.shape[2:]) for one in pyramid]
        interaction = _Interaction(self, flatten_maps(pyramid) + self._level_embeddings(shapes), shapes)
        self.encode(
            padded, self.token_grid(padded, patch_mask, image_sizes), after_layer=interaction, may_prune=may_prune
        )
        maps = split_maps(interaction.cells, shapes)
        maps.insert(0, finest + self.upsampling(maps[0])[:, :, : finest.shape[2], : finest.shape[3]])
        feature_maps = []
        for level, (one, norm) in enumerate(zip(maps, self.output_norms, strict=True)):
            if self.stage_names[level + 1] in self.out_features:
                token_map = interaction.token_maps[_reading(level, len(self.extractors))]
                size = (one.shape[2], one.shape[3])
                one = one + token_map_at_stride(token_map, self.config.patch_size, STRIDES[level], size)
                feature_maps.append(norm(one))
        return BackboneOutput(feature_maps=tuple(feature_maps))

    def _level_embeddings(self, shapes: list[tuple[int, int]]) -> torch.Tensor:
        """(cells of all maps, adapter_dim)."""
        counts = torch.tensor([height * width for height, width in shapes], device=self.level_embeddings.device)
        return self.level_embeddings.repeat_interleave(counts, dim=0)


def _reading(level: int, num_readings: int) -> int:
    """Which reading of the ViT is added to a level: with four readings each its own, the deepest to the coarsest."""
    return max((level + 1) * num_readings // len(STRIDES) - 1, 0)


class _Interaction:
    """What the encoder calls after each layer: the pyramid reads the tokens, and where there are injectors is read."""

    def __init__(
        self, backbone: SparsePathViTAdapterBackbone, cells: torch.Tensor, shapes: list[tuple[int, int]]
    ) -> None:
        self.backbone = backbone
        self.cells = cells
        self.shapes = shapes
        self.token_maps: list[torch.Tensor] = []

    def __call__(self, number: int, tokens: EncodedTokens) -> EncodedTokens:
        backbone, config = self.backbone, self.backbone.config
        if number in config.adapter_layers:
            extract = backbone.extractors[config.adapter_layers.index(number)]
            self.cells, token_map = extract(self.cells, self.shapes, tokens)
            self.token_maps.append(token_map)
        if config.adapter_injector and number in [0, *config.adapter_layers[:-1]]:
            inject = backbone.injectors[[0, *config.adapter_layers[:-1]].index(number)]
            injected = inject(tokens.hidden_states, tokens.grid, self.cells, self.shapes)
            tokens = tokens._replace(hidden_states=injected)
        return tokens


__all__ = ["SparsePathViTAdapterBackbone"]
