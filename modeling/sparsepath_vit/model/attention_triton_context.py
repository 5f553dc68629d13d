# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Launches the kernels that only stratified attention needs: context tokens in their slots, and the mean query.

The kernels of block-local attention do the rest, see `attention_triton_launch.py`: they go on over the context tokens
after a tile's own keys, and add the correction by the mean query before they store.
"""

import math
from typing import NamedTuple

import torch

from .attention_backend import LayerContext, StripContext
from .attention_precision import FP_FUSION
from .attention_triton_context_kernels import (
    context_bias_kernel,
    context_gather_kernel,
    context_key_value_kernel,
    context_reduce_kernel,
    sum_of_images_kernel,
)
from .attention_triton_context_tables import CONTEXT_SLOTS, QUERIES_PER_STEP, context_starts, slots_of_images
from .attention_triton_mean import mean_all_kernel, mean_block_kernel, mean_gradient_kernel, mean_merge_kernel
from .attention_triton_tables import AttentionTiles

try:
    import triton
except ImportError as error:
    raise ImportError("The attention kernel needs Triton, which is not installed: pip install triton.") from error

# The queries of context tokens are split: enough programs to fill a GPU, few enough to be joined at once.
_MAX_CONTEXT_SPLITS = 8
_QUERIES_PER_CONTEXT_SPLIT = 8192
# Rows of the mean query that a program works on at a time: matrix products take 16 at least.
MEAN_ROWS = 16


class StratifiedLayer(NamedTuple):
    """What the kernels read of a layer beside its queries, keys and values.

    Attributes:
        context: the context tokens.
        starts: (images + 1,) where those of each image start in their list, and the end.
        key, value: (images * slots, heads, head_dim) of them.
        bias: (entries, slots) float32, what each adds to the logits of a block's queries.
        mean_query: (images, heads, head_dim).
        mean_output: (entries + images, heads, head_dim) float32, what the mean query gets from the keys that each
            block sees, and from all tokens of each image.
        mean_logsumexp: (heads, entries + images) float32, base 2, of the logits of these.
    """

    context: LayerContext
    starts: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor
    mean_query: torch.Tensor
    mean_output: torch.Tensor
    mean_logsumexp: torch.Tensor


def stratified_layer(
    key: torch.Tensor,
    value: torch.Tensor,
    tiles: AttentionTiles,
    context: LayerContext | StripContext,
    scale: float,
) -> StratifiedLayer:
    """Gathers the context tokens of a layer and attends with its mean queries.

    The backward calls it again: that is cheaper than to keep what it made.

    Args:
        key, value: (M, heads, head_dim).
        tiles: where the tokens are.
        context: of the layer; of a strip, with keys and values of its own and what the mean query gets from all tokens.
        scale: positive factor on the logits.
    """
    states, first_tokens, of_all = (key, value), tiles.image_offsets, None
    if isinstance(context, StripContext):
        states, of_all = (context.key, context.value), context.of_mean
        first_tokens, context = torch.zeros_like(first_tokens), context.as_layer_context()
    layer = (context, *_slots(*states, first_tokens, tiles, context), context.mean_query.contiguous())
    return StratifiedLayer(*layer, *_attend_with_mean_queries(key, value, tiles, layer, scale, of_all))


def _slots(
    key: torch.Tensor, value: torch.Tensor, first_tokens: torch.Tensor, tiles: AttentionTiles, context: LayerContext
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`starts`, `key`, `value` and `bias` of a layer.

    Args:
        key, value: (tokens, heads, head_dim), of which `context.tokens` are rows.
        first_tokens: (images + 1,) a row of each image, for slots without a token.
        tiles: where the tokens are.
        context: of the layer.
    """
    entries, (num_images, num_heads, head_dim) = tiles.context.entries, context.mean_query.shape
    starts, context_size = context_starts(context.counts, key.device), slots_of_images(context.counts)
    bias = key.new_empty((len(entries), context_size), dtype=torch.float32)
    context_bias_kernel[(len(entries),)](
        *(entries, starts, context.weights, context.block_rows, context.block_columns, bias, context_size),
        RADIUS=tiles.neighbor_radius,
        BLOCK_N=CONTEXT_SLOTS,
    )
    context_key, context_value = (key.new_empty((num_images * context_size, num_heads, head_dim)) for _ in range(2))
    context_gather_kernel[(num_images * context_size // CONTEXT_SLOTS, num_heads)](
        *(key, value, starts, context.tokens, context.weights, first_tokens, context_key, context_value),
        *(*key.stride()[:2], *value.stride()[:2], context_size),
        HEAD_DIM=head_dim,
        BLOCK_N=CONTEXT_SLOTS,
    )
    return starts, context_key, context_value, bias


def _attend_with_mean_queries(
    key: torch.Tensor,
    value: torch.Tensor,
    tiles: AttentionTiles,
    layer: tuple,
    scale: float,
    of_all: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`mean_output` and `mean_logsumexp` of a layer; of a strip `of_all` is known, and that of its logits unknown."""
    _, starts, context_key, context_value, bias, mean_query = layer
    tables, (num_images, num_heads, head_dim) = tiles.context, mean_query.shape
    num_entries, logit_scale = len(tables.entries), scale * math.log2(math.e)
    partial = bias.new_empty((num_entries, num_heads, head_dim))
    partial_max, partial_sum = (partial.new_empty(partial.shape[:-1]) for _ in range(2))
    mean_output = partial.new_empty((num_entries + num_images, num_heads, head_dim))
    mean_logsumexp = partial.new_empty((num_heads, num_entries + num_images))
    partials, results = (partial, partial_max, partial_sum), (mean_output, mean_logsumexp)
    states, strides = (mean_query, key, value), (*key.stride()[:2], *value.stride()[:2])
    shape, num_globals = {"HEAD_DIM": head_dim, "BLOCK_N": 32, "enable_fp_fusion": FP_FUSION}, tiles.num_global_tokens
    of_globals = {"NUM_GLOBALS": num_globals, "BLOCK_G": max(16, triton.next_power_of_2(num_globals))}
    arguments = (*states, tables.entries, tiles.weights, *partials, *strides, logit_scale)
    mean_block_kernel[(num_entries, num_heads)](*arguments, **shape)
    if of_all is None:
        mean_all_kernel[(num_images, num_heads)](
            *(*states, tables.entry_offsets, tiles.image_offsets, *partials, *results),
            *(*strides, num_entries, logit_scale),
            **of_globals | shape,
        )
    else:
        mean_output[num_entries:] = of_all
    chunks = triton.cdiv(tiles.most_entries, MEAN_ROWS)
    mean_merge_kernel[(num_images * chunks, num_heads)](
        *(*states, tables.entries, tables.entry_offsets, tiles.image_offsets, *partials),
        *(context_key, context_value, bias, starts, *results),
        *(*strides, num_entries, num_images, chunks, tiles.global_shift, bias.shape[1], logit_scale),
        RADIUS=tiles.neighbor_radius,
        BLOCK_E=MEAN_ROWS,
        **of_globals,
        **shape,
    )
    return mean_output, mean_logsumexp


class MeanGradients(NamedTuple):
    """Gradients around the mean queries, whose rows are those of `StratifiedLayer.mean_output`.

    The gradient of a row is a sum over the queries that it corrects, which float16 may not hold. So it is divided by
    the root of their number, and the probabilities are multiplied by it: their products stay the same.

    Attributes:
        output: (entries + images, heads, head_dim) float32, the gradient of `mean_output`, divided.
        logsumexp: (heads, entries + images) float32, base 2, less the logarithm of the divisor.
        delta: (heads, entries + images) float32, what the softmax subtracts, divided.
        partial: (tiles * parts, heads, head_dim) float32, what the programs of tiles contribute to the gradient of the
            mean queries but for the scale.
        partial_splits: (images * splits, heads, head_dim), likewise of the global tokens' programs.
        most_parts: parts of a tile at most.
    """

    output: torch.Tensor
    logsumexp: torch.Tensor
    delta: torch.Tensor
    partial: torch.Tensor
    partial_splits: torch.Tensor
    most_parts: int


def mean_gradients(
    grad_output: torch.Tensor,
    delta: torch.Tensor,
    layer: StratifiedLayer,
    tiles: AttentionTiles,
    most_parts: int,
    num_split_programs: int,
) -> MeanGradients:
    """The gradient of what the mean queries got; takes the correction out of `delta`, (heads, M), in place."""
    tables, mean_output = tiles.context, layer.mean_output
    num_images, num_heads, head_dim = layer.mean_query.shape
    num_entries, grad_mean = len(tables.entries), torch.empty_like(mean_output)
    mean_gradient_kernel[(num_entries, num_heads)](
        *(grad_output, mean_output, delta, grad_mean, tables.entries, *grad_output.stride()[:2]),
        *(delta.shape[1], num_entries),
        HEAD_DIM=head_dim,
        BLOCK_N=32,
        enable_fp_fusion=FP_FUSION,
    )
    # Each query got what the mean query gets from all tokens once.
    grad_mean[num_entries:] = -_sums_of_images(grad_mean[:num_entries], tables.entries[:, 2], num_images)
    delta_mean = (grad_mean * mean_output).sum(dim=-1).T.contiguous()  # (heads, rows)
    shares = _query_counts(tiles, num_images).rsqrt()
    logsumexp = layer.mean_logsumexp + shares.log2()
    grad_mean *= shares[:, None, None]
    partial, partial_splits = (
        grad_mean.new_zeros((rows, num_heads, head_dim)) for rows in (len(tiles.table) * most_parts, num_split_programs)
    )
    return MeanGradients(grad_mean, logsumexp, delta_mean * shares, partial, partial_splits, most_parts)


def _query_counts(tiles: AttentionTiles, num_images: int) -> torch.Tensor:
    """(entries + images,) how many queries each row of the mean queries corrects, at least 1."""
    start, end = tiles.context.entries[:, 0], tiles.context.entries[:, 1]
    of_images = tiles.image_offsets[1 : num_images + 1] - tiles.image_offsets[:num_images]
    return torch.cat([end - start, of_images]).clamp(min=1).float()


def add_context_gradients(
    gradients: tuple[torch.Tensor, torch.Tensor],
    grad_output: torch.Tensor,
    query: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor],
    layer: StratifiedLayer,
    of_mean: MeanGradients,
    tiles: AttentionTiles,
    scale: float,
) -> torch.Tensor:
    """Adds what context tokens get as such to the gradients of keys and values.

    Args:
        gradients: of keys and values, (M, heads, head_dim), which hold what these get as themselves.
        grad_output: (M, heads, head_dim).
        query: (M, heads, head_dim).
        rows: base-2 log-sum-exps and what the softmax subtracts, (heads, M).
        layer: what the kernels read.
        of_mean: gradients around the mean queries, complete.
        tiles: where the tokens are.
        scale: positive factor on the logits.

    Returns:
        What the programs contribute to the gradient of the mean queries but for the scale, those of an image in a row.
    """
    tables, context = tiles.context, layer.context
    num_images, num_heads, head_dim = layer.mean_query.shape
    num_tokens, context_size = len(query), layer.bias.shape[1]
    num_splits = min(_MAX_CONTEXT_SPLITS, triton.cdiv(num_tokens, num_images * _QUERIES_PER_CONTEXT_SPLIT))
    block_m, num_slots = context_block(query.dtype), num_images * context_size
    partial_key, partial_value = (layer.bias.new_empty((num_splits, num_slots, num_heads, head_dim)) for _ in range(2))
    partial_mean = layer.bias.new_empty((num_slots // block_m * num_splits, num_heads, head_dim))
    context_key_value_kernel[(len(partial_mean), num_heads)](
        *(query, grad_output, layer.key, layer.value, layer.bias, *rows),
        *(tables.steps, tables.step_bounds, tables.entry_offsets),
        *(layer.mean_query, of_mean.logsumexp, of_mean.delta, of_mean.output),
        *(partial_key, partial_value, partial_mean),
        *(*query.stride()[:2], *grad_output.stride()[:2]),
        *(num_tokens, context_size, len(tables.entries), num_images, num_splits, scale * math.log2(math.e)),
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        BLOCK_N=QUERIES_PER_STEP,
        BLOCK_R=MEAN_ROWS,
        enable_fp_fusion=FP_FUSION,
        **context_launch_options(query.dtype, head_dim),
    )
    context_reduce_kernel[(num_slots, num_heads)](
        *(*gradients, partial_key, partial_value, layer.starts, context.tokens, context.weights),
        *(context_size, num_splits, scale),
        HEAD_DIM=head_dim,
        BLOCK_S=_MAX_CONTEXT_SPLITS,  # not of their number, which would compile for each
        enable_fp_fusion=FP_FUSION,
    )
    return partial_mean


def grad_mean_query(
    partial_context: torch.Tensor, of_mean: MeanGradients, layer: StratifiedLayer, tiles: AttentionTiles, scale: float
) -> torch.Tensor:
    """The gradient of the mean queries, (images, heads, head_dim), put together from what all programs contribute.

    Args:
        partial_context: what `add_context_gradients` returned.
        of_mean: gradients around the mean queries, complete.
        layer: what the kernels read.
        tiles: where the tokens are.
        scale: positive factor on the logits.
    """
    num_images, images = len(layer.mean_query), tiles.context.entries[:, 2]
    of_tiles = images[tiles.context.tile_entries].repeat_interleave(of_mean.most_parts)
    total = _sums_of_images(of_mean.partial, of_tiles, num_images)
    for partial in (of_mean.partial_splits, partial_context):
        total += partial.unflatten(0, (num_images, -1)).sum(dim=1)
    return (total * scale).to(layer.mean_query.dtype)


def context_block(dtype: torch.dtype) -> int:
    """Context tokens of a program that takes their gradients."""
    return 32 if dtype == torch.float32 else CONTEXT_SLOTS


def context_launch_options(dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """Warps and stages of the kernel that takes the gradients of context tokens."""
    if dtype == torch.float32:
        return {"num_warps": 8, "num_stages": 1}
    return {"num_warps": 4, "num_stages": 3} if head_dim <= 64 else {"num_warps": 8, "num_stages": 2}


def _sums_of_images(values: torch.Tensor, images: torch.Tensor, num_images: int) -> torch.Tensor:
    """(images, heads, head_dim): sums of the rows of each image, in a fixed order, unlike those of an index.

    Args:
        values: (rows, heads, head_dim) float32.
        images: (rows,) int32.
        num_images: how many there are.
    """
    if num_images == 1:
        return values.sum(dim=0, keepdim=True)
    _, num_heads, head_dim = values.shape
    sums = values.new_empty((num_images, num_heads, head_dim))
    sum_of_images_kernel[(num_images, num_heads)](
        *(values, images.contiguous(), sums, len(values)), HEAD_DIM=head_dim, BLOCK_N=64, enable_fp_fusion=FP_FUSION
    )
    return sums
