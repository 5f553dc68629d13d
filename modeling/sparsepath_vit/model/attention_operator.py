# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Block-local and stratified attention: the public operation, and the `torch.library` operator behind it.

`block_attention` checks its arguments and runs the operator, so that `torch.compile` sees one node with shapes and
gradients. What the operator computes with is a backend of `attention_backends.py`.
"""

import torch

from .attention_backend import LayerContext, PreparedGrid, prepared_grid
from .attention_backends import BACKENDS, REFERENCE, backend_for
from .attention_checks import check_context, check_states
from .attention_specification import naive_block_attention
from .context_tokens import ContextTokens
from .mean_query_correction import mean_queries
from .operator_names import operator_name
from .token_grid import TokenGrid


def block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: TokenGrid,
    *,
    context: ContextTokens | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention of every token to the global tokens and to the blocks around its own.

    One softmax over all keys of a query (arXiv 2601.12150). With context tokens it is stratified attention: a query
    sees those outside its neighbourhood too, a key that stands for several tokens counts as often, and what all queries
    of a block have in common is corrected by the mean query (`attention_specification.py` is the definition). Where the
    neighbourhood covers the grid and each token stands for itself it equals
    `torch.nn.functional.scaled_dot_product_attention` without a mask.

    Args:
        query, key, value: (batch, heads, tokens, head_dim) with (batch, tokens) = `grid.batch_shape`, in the grid's
            order: global tokens, then patch tokens block by block.
        grid: where the tokens are.
        context: the context tokens of the layer, see `draw_context_tokens`; `None` where the grid has none.
        scale: positive factor on the logits, head_dim ** -0.5 by default.
        dropout: share of attention probabilities set to zero, in [0, 1). The kernel has none: above 0 the tiles run.

    Returns:
        (batch, heads, tokens, head_dim). Bitwise reproducible on the same machine.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, the grid or the backend.
    """
    return attention_with_logsumexp(query, key, value, grid, context=context, scale=scale, dropout=dropout)[0]


def attention_with_logsumexp(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: TokenGrid,
    *,
    context: ContextTokens | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`block_attention`, and the base-2 log-sum-exps of each query's logits, (heads, batch * tokens) float32.

    They have no gradient, and are `None` where the backend does not return them.
    """
    scale = check_states(query, key, value, grid, scale)
    check_context(context, grid)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout!r} is not possible: it must lie in [0, 1).")
    batch, heads, tokens, head_dim = query.shape
    backend = backend_for(query, dropout, grid.weighs_keys)
    # (batch, heads, tokens, head_dim) -> (batch * tokens, heads, head_dim): a view of a fused projection
    packed = [states.transpose(1, 2).reshape(-1, heads, head_dim) for states in (query, key, value)]
    logsumexp = None
    if backend == REFERENCE:
        # Differentiated by autograd itself: it holds the backends' own gradients to account.
        output = naive_block_attention(*packed, grid, scale, dropout, context)
    else:
        # A tensor, since a number would be compiled in; only with dropout, since a tensor of the host keeps a compiled
        # graph from becoming a CUDA graph.
        seed = torch.randint(2**62, ()) if dropout > 0.0 else None
        prepared = prepared_grid(BACKENDS[backend], grid)
        layer_context = [], None, None
        if context is not None:
            layer_context = list(context[:-1]), list(context.counts), mean_queries(packed[0], grid)
        output, returned = _block_attention(*packed, *prepared, *layer_context, scale, dropout, seed, backend)
        logsumexp = returned if BACKENDS[backend].returns_logsumexp else None
    return output.view(batch, tokens, heads, head_dim).transpose(1, 2), logsumexp


def _layer_context(
    tensors: list[torch.Tensor], counts: list[int] | None, mean_query: torch.Tensor | None
) -> tuple[LayerContext] | tuple[()]:
    """The last argument of a backend, which it gets where there is context."""
    return () if mean_query is None else (LayerContext(*tensors, tuple(counts), mean_query),)


def _generator(seed: torch.Tensor | None, device: torch.device) -> torch.Generator | None:
    """Draws the same dropout in the forward and in its recomputation, and leaves the global generator untouched."""
    return None if seed is None else torch.Generator(device).manual_seed(int(seed))


@torch.library.custom_op(operator_name("block_attention"), mutates_args=())
def _block_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid_tensors: list[torch.Tensor],
    grid_numbers: list[int],
    context_tensors: list[torch.Tensor],
    context_counts: list[int] | None,
    mean_query: torch.Tensor | None,
    scale: float,
    dropout: float,
    seed: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the base-2 log-sum-exps; empty where the backend does not return them."""
    prepared, generator = PreparedGrid(grid_tensors, grid_numbers), _generator(seed, query.device)
    context = _layer_context(context_tensors, context_counts, mean_query)
    output, logsumexp = BACKENDS[backend].forward(query, key, value, prepared, scale, dropout, generator, *context)
    return output, query.new_empty(0, dtype=torch.float32) if logsumexp is None else logsumexp


@_block_attention.register_fake
def _block_attention_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid_tensors: list[torch.Tensor],
    grid_numbers: list[int],
    context_tensors: list[torch.Tensor],
    context_counts: list[int] | None,
    mean_query: torch.Tensor | None,
    scale: float,
    dropout: float,
    seed: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_heads, _ = query.shape
    shape = (num_heads, num_tokens) if BACKENDS[backend].returns_logsumexp else (0,)
    return query.new_empty(query.shape), query.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op(operator_name("block_attention_backward"), mutates_args=())
def _block_attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    grid_tensors: list[torch.Tensor],
    grid_numbers: list[int],
    context_tensors: list[torch.Tensor],
    context_counts: list[int] | None,
    mean_query: torch.Tensor | None,
    scale: float,
    dropout: float,
    seed: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value and mean query; the last is empty where there is none."""
    prepared, generator = PreparedGrid(grid_tensors, grid_numbers), _generator(seed, query.device)
    context = _layer_context(context_tensors, context_counts, mean_query)
    gradients = BACKENDS[backend].backward(
        grad_output, query, key, value, output, logsumexp, prepared, scale, dropout, generator, *context
    )
    return *gradients, *([query.new_empty(0)] if mean_query is None else [])


@_block_attention_backward.register_fake
def _block_attention_backward_fake(
    grad_output: torch.Tensor, query: torch.Tensor, *arguments: object, **keywords: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    mean_query = arguments[8]
    return (*(query.new_empty(query.shape) for _ in range(3)), query.new_empty(_shape_of(mean_query)))


def _shape_of(mean_query: torch.Tensor | None) -> tuple[int, ...]:
    return (0,) if mean_query is None else tuple(mean_query.shape)


def _setup_context(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]
) -> None:
    query, key, value, grid_tensors, grid_numbers, context_tensors, context_counts, mean_query, *settings = inputs
    *settings, seed, backend = settings
    ctx.save_for_backward(query, key, value, *output, mean_query, seed, *grid_tensors, *context_tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.num_grid_tensors, ctx.numbers = len(grid_tensors), (grid_numbers, context_counts)
    ctx.settings, ctx.backend = settings, backend


def _backward(
    ctx: torch.autograd.function.FunctionCtx, grad_output: torch.Tensor, _: torch.Tensor
) -> tuple[torch.Tensor | list[None] | None, ...]:
    query, key, value, output, logsumexp, mean_query, seed, *tables = ctx.saved_tensors
    grid_tensors, context_tensors = tables[: ctx.num_grid_tensors], tables[ctx.num_grid_tensors :]
    grid_numbers, context_counts = ctx.numbers
    *gradients, grad_mean_query = _block_attention_backward(
        *(grad_output, query, key, value, output, logsumexp, grid_tensors, grid_numbers),
        *(context_tensors, context_counts, mean_query, *ctx.settings, seed, ctx.backend),
    )
    of_tables = ([None] * len(grid_tensors), None, [None] * len(context_tensors), None)
    return *gradients, *of_tables, None if mean_query is None else grad_mean_query, *[None] * 4


_block_attention.register_autograd(_backward, setup_context=_setup_context)
