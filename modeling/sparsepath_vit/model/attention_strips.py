# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Block-local attention strip by strip: the public operation on one strip, its specification, merging strips.

The patch tokens of a strip find all their keys in it. The global tokens find a part of theirs in each strip; their
attention over all of them is put together from the parts and the log-sum-exps of their logits, exactly, as
flash-decoding does it.
"""

import torch

from .attention_backend import PreparedGrid, StripContext, prepared_grid
from .attention_backends import BACKENDS, REFERENCE, backend_for, block_attention_backend
from .attention_checks import check_strip_states
from .attention_precision import without_autocast
from .attention_specification import attention_bias
from .operator_names import operator_name
from .processes import Processes
from .token_strips import TokenStrip


def strip_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    strip: TokenStrip,
    *,
    context: StripContext | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-local or stratified attention of the queries of one strip; for inference, it has no gradient.

    Args:
        query: (heads, G + S, head_dim), of the global tokens and then of the strip's own patch tokens.
        key, value: (heads, M, head_dim), of all tokens of the strip: global tokens, then the patch tokens around and
            in it, block by block.
        strip: where they are.
        context: the context tokens of the image, see `strip_contexts`; `None` for none.
        scale: positive factor on the logits, head_dim ** -0.5 by default.

    Returns:
        (heads, G + S, head_dim): of the own patch tokens what `block_attention` on the whole image gives, of the global
        tokens their attention to the strip's part of their keys; and the natural log-sum-exp of the global tokens'
        logits, (heads, G), of at least float32. `MergedAttention` makes of all parts what `block_attention` gives.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, the strip or the backend.
    """
    scale = check_strip_states(query, key, value, strip, scale)
    packed = [states.transpose(0, 1) for states in (query, key, value)]  # (tokens, heads, head_dim)
    backend = backend_for(query, 0.0, strip.weighs_keys or context is not None)
    with torch.no_grad():
        if backend == REFERENCE:
            output, logsumexp = naive_strip_attention(*packed, strip, scale, context)
        else:
            prepared = prepared_grid(BACKENDS[backend], strip)
            settings = strip.num_global_tokens, [] if context is None else list(context), scale, backend
            output, logsumexp = _strip_attention(*packed, *prepared, *settings)
    return output.transpose(0, 1), logsumexp


@torch.library.custom_op(operator_name("strip_attention"), mutates_args=())
def _strip_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid_tensors: list[torch.Tensor],
    grid_numbers: list[int],
    num_global_tokens: int,
    context_tensors: list[torch.Tensor],
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    context = (StripContext(*context_tensors),) if context_tensors else ()
    return BACKENDS[backend].forward_strip(query, key, value, PreparedGrid(grid_tensors, grid_numbers), scale, *context)


@_strip_attention.register_fake
def _strip_attention_fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid_tensors: list[torch.Tensor],
    grid_numbers: list[int],
    num_global_tokens: int,
    context_tensors: list[torch.Tensor],
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), query.new_empty((query.shape[1], num_global_tokens), dtype=dtype)


def strips_take_context(device: torch.device) -> bool:
    """Whether `strip_attention` takes context tokens on a device."""
    backend = block_attention_backend(device)
    return backend == REFERENCE or BACKENDS[backend].strips_take_context


def prepare_strips(strips: list[TokenStrip], query: torch.Tensor) -> None:
    """Makes what attention needs of the strips of an image, of all at once.

    Made one by one, between large tensors that come and go, it would stay and leave holes in the memory.

    Args:
        strips: of one image.
        query: (..., head_dim), of the kind that attention will get.
    """
    for strip in strips:
        backend = backend_for(query, 0.0, strip.weighs_keys)
        if backend != REFERENCE:
            prepared_grid(BACKENDS[backend], strip)


def naive_strip_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    strip: TokenStrip,
    scale: float,
    context: StripContext | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of `strip_attention`, written out; (tokens, heads, head_dim) in and out."""
    num_globals, dtype = strip.num_global_tokens, torch.promote_types(query.dtype, torch.float32)
    bias = attention_bias(strip, dtype)[0, strip.query_indices()]  # (G + S, M)
    start, end = strip.global_keys
    bias[:num_globals, :start] = -torch.inf
    bias[:num_globals, end:] = -torch.inf
    if context is not None:
        key, value = torch.cat([key, context.key]), torch.cat([value, context.value])
        bias = torch.cat([bias, _context_bias(strip, context, dtype)], dim=1)
    query, key, value = (states.transpose(0, 1) for states in (query, key, value))

    def attend(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = query @ key.mT * scale + bias  # (heads, G + S, keys)
        return torch.softmax(logits, dim=-1, dtype=dtype).to(value.dtype) @ value, logits

    with without_autocast(query.device.type):
        output, logits = attend(query)
        if context is not None:
            of_mean, _ = attend(context.mean_query[:, None].expand_as(query))
            output[:, num_globals:] += context.of_mean[:, None] - of_mean[:, num_globals:]
    return output.transpose(0, 1), logits[:, :num_globals].logsumexp(dim=-1)


def _context_bias(strip: TokenStrip, context: StripContext, dtype: torch.dtype) -> torch.Tensor:
    """(G + S, entries) logarithms of what context tokens stand for; -inf inside the neighbourhood, and for globals."""
    num_globals, window = strip.num_global_tokens, strip.windows[0]
    own = slice(strip.own[0] - num_globals, strip.own[1] - num_globals)
    differences = (
        (strip.rows[own] // window)[:, None] - context.block_rows,
        (strip.columns[own] // window)[:, None] - context.block_columns,
    )
    is_near = torch.stack([part.abs() <= strip.neighbor_radius for part in differences]).all(dim=0)
    of_own = torch.where(is_near, -torch.inf, context.weights.to(dtype).log())
    return torch.nn.functional.pad(of_own, (0, 0, num_globals, 0), value=-torch.inf)


class MergedAttention:
    """The global tokens' attention, put together from its parts, one after the other."""

    def __init__(self) -> None:
        self._output: torch.Tensor | None = None  # (heads, G, head_dim)
        self._logsumexp: torch.Tensor | None = None  # (heads, G)

    def add(self, output: torch.Tensor, logsumexp: torch.Tensor) -> None:
        """One more part: (heads, G, head_dim), and the log-sum-exp of its logits, (heads, G)."""
        output = output.to(logsumexp.dtype)
        if self._output is None:
            self._output, self._logsumexp = output, logsumexp
            return
        joint = torch.logaddexp(self._logsumexp, logsumexp)
        shares = [(part - joint).exp()[..., None] for part in (self._logsumexp, logsumexp)]
        self._output, self._logsumexp = self._output * shares[0] + output * shares[1], joint

    def add_nothing(self, output: torch.Tensor) -> None:
        """A part without keys: zeros, (heads, G, head_dim)."""
        dtype = torch.promote_types(output.dtype, torch.float32)
        self.add(output, output.new_full(output.shape[:2], -torch.inf, dtype=dtype))

    def merged(self, processes: Processes | None = None) -> torch.Tensor:
        """(heads, G, head_dim) attention over the keys of all parts, of at least float32.

        Args:
            processes: that have a part of the keys each; all get the same numbers.
        """
        if processes is None:
            return self._output
        part = torch.cat([self._output, self._logsumexp[..., None]], dim=-1)
        parts = torch.stack(processes.gather(part))  # (processes, heads, G, head_dim + 1)
        return (parts[..., :-1] * parts[..., -1:].softmax(dim=0)).sum(dim=0)
