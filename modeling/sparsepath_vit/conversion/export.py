# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint as one graph of tensor operations, for `torch.export` and ONNX, with batch and sides left open.

`torch.export` of the model itself leaves the sides open, but lists the images of a batch in Python and calls the
operator of this package. Here the pattern is a dense mask computed inside the graph: the same numbers, in the memory of
dense attention, by operations that every runtime knows.
"""

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..model.modeling_sparsepath_vit import SparsePathViTModel
from ..model.token_pruning import num_kept

_EXAMPLE_GRID = (3, 5)  # rows and columns of the image that is traced; all differ from each other and from 1
_ONNX_OPSET = 20
_MOST = 4096  # images of a batch, rows, columns; of the last two at least 2: torch takes a side of 1 for a constant
_LARGEST_FILE = 1.9e9  # bytes of weights; a protocol buffer holds 2 GiB


class ExportedOutput(NamedTuple):
    """What the graph returns.

    Attributes:
        pooler_output: (batch, pooled_size).
        last_hidden_state: (batch, G + K, hidden_size), global tokens first, then the kept patch tokens in raster order.
        patch_positions: (batch, K, 2) int64, (row, column) of each of these.
    """

    pooler_output: torch.Tensor
    last_hidden_state: torch.Tensor
    patch_positions: torch.Tensor


class ExportableEncoder(nn.Module):
    """A model's weights and numbers in operations that leave batch, height and width open.

    Args:
        model: the encoder, whose weights it shares.

    Raises:
        ValueError: a model that draws context tokens or representatives.
    """

    def __init__(self, model: SparsePathViTModel) -> None:
        super().__init__()
        config = model.config
        if config.num_context_tokens or config.leaves_representatives:
            drawn = f"num_context_tokens={config.num_context_tokens}, num_representatives={config.num_representatives}"
            raise ValueError(
                f"{drawn} draw tokens by the size of each image, which a graph for any size cannot do: set both to 0 "
                "(the paper's pattern), or window_size=None (dense)."
            )
        self.model, self.config = model, config
        self.eval()

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, 3, height, width) normalised, sides multiples of the patch size -> the fields of `ExportedOutput`."""
        patches = self.model.embeddings.patch_embeddings(pixel_values)  # (batch, rows, columns, hidden_size)
        batch, rows, columns, _ = patches.shape
        tokens = self._with_global_tokens((patches + self._positions(rows, columns)).flatten(1, 2))
        row = torch.arange(rows, device=tokens.device)[:, None].expand(rows, columns).flatten()
        column = torch.arange(columns, device=tokens.device)[None].expand(rows, columns).flatten()
        places = torch.stack([row, column], dim=-1)[None].expand(batch, -1, -1)  # (batch, tokens, 2)
        for number, layer in enumerate(self.model.encoder.layers, start=1):
            prunes_here = self.config.prunes and number == self.config.prune_after_layer
            tokens, scores = self._layer(layer, tokens, places, prunes_here)
            if scores is not None:
                tokens, places = self._pruned(tokens, places, scores)
        tokens = self.model.norm(tokens)
        return self._pooled(tokens), tokens, places

    def _positions(self, rows: int, columns: int) -> torch.Tensor:
        """(rows, columns, hidden_size): as the embeddings resample them, by a formula that leaves the size open."""
        embeddings, config = self.model.embeddings, self.config
        side, antialias = embeddings.position_grid, config.position_antialias
        stored = embeddings.position_embeddings[0, config.num_prefix_position_embeddings :].float()
        counts = [torch.ones(number, device=stored.device).sum() for number in (rows, columns)]  # as tensors
        is_stored_size = (counts[0] == side) & (counts[1] == side)
        offset = torch.where(is_stored_size, 0.0, float(config.position_interpolation_offset))
        by_row, by_column = (
            bicubic_weights(count, number, side, offset, antialias)
            for count, number in zip(counts, (rows, columns), strict=True)
        )
        positions = by_column @ (by_row @ stored.view(side, -1)).view(rows, side, -1)  # (rows, columns, hidden_size)
        return positions.to(embeddings.position_embeddings.dtype)

    def _with_global_tokens(self, patch_tokens: torch.Tensor) -> torch.Tensor:
        embeddings, prefixes = self.model.embeddings, self.config.num_prefix_position_embeddings
        global_tokens = embeddings.cls_token
        if self.config.num_register_tokens:
            global_tokens = torch.cat([global_tokens, embeddings.register_tokens], dim=1)
        if prefixes:
            with_positions = global_tokens[:, :prefixes] + embeddings.position_embeddings[:, :prefixes]
            global_tokens = torch.cat([with_positions, global_tokens[:, prefixes:]], dim=1)
        return torch.cat([global_tokens.expand(patch_tokens.shape[0], -1, -1), patch_tokens], dim=1)

    def _layer(
        self, layer: nn.Module, tokens: torch.Tensor, places: torch.Tensor, score_tokens: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = layer.attention.query_key_value(layer.norm1(tokens))
        mask = None if self.config.window_size is None else self._mask(places)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=layer.attention.scaling)
        branch = layer.attention.projection(attended.transpose(1, 2).flatten(2))
        tokens = tokens + (layer.layer_scale1(branch) if self.config.use_layerscale else branch)
        branch = layer.mlp(layer.norm2(tokens))
        tokens = tokens + (layer.layer_scale2(branch) if self.config.use_layerscale else branch)
        return tokens, self._scores(query, key, value, layer.attention.scaling) if score_tokens else None

    def _mask(self, places: torch.Tensor) -> torch.Tensor:
        """(batch, 1, G + K, G + K) bool: which key each query sees."""
        blocks = places // self.config.window_size
        distance = (blocks[:, :, None] - blocks[:, None]).abs().amax(dim=-1)  # (batch, K, K) in blocks
        near = distance <= self.config.neighbor_radius
        count = self.config.num_global_tokens
        return nn.functional.pad(near, (count, 0, count, 0), value=True)[:, None]

    def _scores(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """(batch, K) float32, see `prune_scores`."""
        count = self.config.num_global_tokens
        queries = 1 if self.config.prune_score == "cls_attention" else count
        logits = query[:, :, :queries].float() @ key.float().transpose(2, 3) * scale
        received = logits.softmax(dim=-1)[..., count:].mean(dim=2)  # (batch, heads, K)
        if self.config.prune_score == "attention_value":
            received = received * value[:, :, count:].float().norm(dim=-1)
        return received.mean(dim=1)

    def _pruned(
        self, tokens: torch.Tensor, places: torch.Tensor, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        count = self.config.num_global_tokens
        kept = scores.topk(num_kept(scores.shape[1], self.config.prune_ratio), dim=1).indices.sort(dim=1).values
        patch_tokens = tokens[:, count:].gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))
        return torch.cat([tokens[:, :count], patch_tokens], dim=1), places.gather(1, kept[:, :, None].expand(-1, -1, 2))

    def _pooled(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.config.pooling == "cls":
            return tokens[:, 0]
        mean = tokens[:, self.config.num_global_tokens :].float().mean(dim=1)
        return torch.cat([tokens[:, 0], mean.to(tokens.dtype)], dim=-1)


def bicubic_weights(
    count: torch.Tensor, number: int, old_size: int, offset: torch.Tensor, antialias: bool
) -> torch.Tensor:
    """One axis of torch's bicubic resampling as a matrix; see `resampling_weights` of the embeddings.

    Args:
        count: how many samples are wanted, as a number in a tensor.
        number: the same, as a size.
        old_size: samples there are.
        offset: the samples lie as if there were `count + offset` of them.
        antialias: as for `torch.nn.functional.interpolate`.

    Returns:
        (number, old_size) float32.
    """
    scale = old_size / (count + offset)
    centers = (torch.arange(number, device=count.device) + 0.5) * scale - 0.5  # (number,) in old samples
    old = torch.arange(old_size, device=count.device)
    if antialias:
        weights = _cubic((old - centers[:, None]) / scale.clamp(min=1.0), -0.5)
        weights = weights / weights.sum(dim=1, keepdim=True)
        same = (torch.arange(number, device=count.device)[:, None] == old).to(weights.dtype)
        return torch.where(count == old_size, same, weights)  # torch passes over such an axis, whatever the offset
    taps = centers.floor()[:, None] + torch.arange(-1, 3, device=count.device)  # (number, 4)
    weights = _cubic(taps - centers[:, None], -0.75)
    lands_on = taps.clamp(0, old_size - 1)[:, :, None] == old  # beyond the edge the last sample goes on
    return (weights[:, :, None] * lands_on).sum(dim=1)


def _cubic(distance: torch.Tensor, a: float) -> torch.Tensor:
    """Keys' cubic convolution kernel."""
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


def export_program(model: SparsePathViTModel) -> torch.export.ExportedProgram:
    """The model as a program of `torch.export`, for any batch and any sides that are multiples of the patch size.

    Args:
        model: the encoder.

    Raises:
        ValueError: see `ExportableEncoder`.

    Example:
    ```python
    >>> program = export_program(model)
    >>> pooler_output, last_hidden_state, patch_positions = program.module()(pixel_values)
    ```
    """
    encoder = ExportableEncoder(model)
    with torch.no_grad():
        return torch.export.export(encoder, (_example(model),), dynamic_shapes=_open_shapes(model))


def export_onnx(model: SparsePathViTModel, path: str | os.PathLike[str]) -> Path:
    """Writes the model as ONNX, for any batch and any sides that are multiples of the patch size.

    The input is `pixel_values`, the outputs are the fields of `ExportedOutput`. Weights above 2 GB lie in a file beside
    it. Needs onnx and onnxscript.

    Args:
        model: the encoder, in float32.
        path: the file; its folder must exist.

    Raises:
        ValueError: see `ExportableEncoder`.
        ImportError: onnx or onnxscript is missing.
    """
    for name in ("onnx", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f"{name} is needed to write ONNX: pip install onnx onnxscript")
    program = torch.onnx.export(
        ExportableEncoder(model),
        (_example(model),),
        dynamo=True,
        dynamic_shapes=_open_shapes(model),
        opset_version=_ONNX_OPSET,
        input_names=["pixel_values"],
        output_names=list(ExportedOutput._fields),
        verbose=False,
    )
    is_large = sum(parameter.nbytes for parameter in model.parameters()) > _LARGEST_FILE
    program.save(os.fspath(path), external_data=is_large)
    return Path(path)


def _example(model: SparsePathViTModel) -> torch.Tensor:
    height, width = (side * model.config.patch_size for side in _EXAMPLE_GRID)
    return torch.zeros(2, model.config.num_channels, height, width, device=model.device, dtype=model.dtype)


def _open_shapes(model: SparsePathViTModel) -> tuple[dict[int, torch.export.Dim]]:
    batch = torch.export.Dim("batch", min=1, max=_MOST)
    rows, columns = (torch.export.Dim(name, min=2, max=_MOST) for name in ("rows", "columns"))
    return ({0: batch, 2: model.config.patch_size * rows, 3: model.config.patch_size * columns},)
