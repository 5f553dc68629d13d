# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Layers at inference, strip by strip: what exists at once is the hidden states and one strip of everything else.

A strip needs queries, keys and values of its own tokens and keys and values of the block rows around it, all made from
the layer's input. So the strips of an image are worked through from the top, each written over its own input as soon as
it is done: the rows below have been read by then, and of the rows above the keys and values are kept. The global tokens
are read first and written last, when they have attended to every strip.

Where several processes share an image, each runs the strips of its own block rows; before that it gets the rows around
them from its neighbours, and what the global tokens attended to is put together from all processes.

A layer is a `SparsePathViTLayer`; the encoder, which defines it, is built on this file.
"""

import torch
from torch import nn

from .attention_backend import StripContext
from .attention_registration import ATTENTION_NAME
from .attention_sdpa_tables import next_multiple
from .attention_strips import MergedAttention, prepare_strips, strip_attention, strips_take_context
from .configuration_sparsepath_vit import SparsePathViTConfig
from .embeddings import OnTokens
from .linear_products import WrittenProducts
from .streamed_context import obstacle_to_streamed_context, strip_contexts
from .streamed_prune_scores import StripScores
from .token_grid import TokenGrid
from .token_shares import TokenShare, in_proportion
from .token_strips import TokenStrip, strips_of

# Patch tokens of a strip. On a CPU (ViT-S/14, bfloat16, two threads) strips of 2,048, 3,072, 4,096 and 6,144 took 1.02,
# 1.00, 0.98 and 0.99 of the time of whole layers at 1400 px, and 0.70, 0.70, 0.68 and 0.68 at 3430 px. On CUDA, where
# nothing was timed, matrix products have to fill the card: in tiles of 128 x 256, `fc2` of UNI2-h has 192 programs for
# 4,096 tokens, 1.45 rounds on the 132 multiprocessors of an H100, so that the second is half empty; for 16,384 tokens
# it has 5.8 rounds.
TOKENS_PER_STRIP = {"cuda": 16_384}
TOKENS_PER_STRIP_ELSEWHERE = 4_096
# Several processes have less of everything but the strips: these are smaller for a twentieth of the time.
TOKENS_PER_STRIP_OF_SHARES = {"cpu": 2_048}
# What is done token by token is done for so many at once. On a CPU oneDNN keeps 0.6 MB for each number of rows that a
# bfloat16 product ever had, and pruning leaves each strip another one: 6 products in each of a hundred strips.
TOKENS_AT_ONCE = {"cpu": 1_024}


def tokens_per_strip(config: SparsePathViTConfig, device: torch.device, is_shared: bool = False) -> int:
    """`config.tokens_per_strip`, or what is best on a device where that is `None`; 0 for no strips.

    Args:
        config: of the model.
        device: where the tokens are.
        is_shared: whether several processes share the image.
    """
    if config.tokens_per_strip is not None:
        return config.tokens_per_strip
    if is_shared and device.type in TOKENS_PER_STRIP_OF_SHARES:
        return TOKENS_PER_STRIP_OF_SHARES[device.type]
    return TOKENS_PER_STRIP.get(device.type, TOKENS_PER_STRIP_ELSEWHERE)


def tokens_at_once(device: torch.device, most_tokens: int) -> int:
    """How many tokens are normalised and multiplied together, of strips of at most `most_tokens`."""
    return min(most_tokens, TOKENS_AT_ONCE.get(device.type, most_tokens))


def may_stream(config: SparsePathViTConfig, grid: TokenGrid, device: torch.device) -> bool:
    """Whether a model's layers run strip by strip on the tokens of a grid, where nothing of `streams` is against it."""
    most_tokens = tokens_per_strip(config, device)
    if not most_tokens or max(grid.counts) <= most_tokens or config._attn_implementation != ATTENTION_NAME:
        return False
    return not grid.has_context or strips_take_context(device)


def streams(layer: nn.Module, hidden_states: torch.Tensor, grid: TokenGrid) -> bool:
    """Whether a layer runs strip by strip on these tokens.

    It does at inference, where an image has more tokens than a strip; where several processes share the image, always.
    It does not where there is an `obstacle_to_strips`.
    """
    if isinstance(grid, TokenShare):
        return True
    if torch.compiler.is_compiling() or not may_stream(layer.config, grid, hidden_states.device):
        return False
    return obstacle_to_strips(layer, hidden_states.dtype, grid) is None


def obstacle_to_strips(layer: nn.Module, dtype: torch.dtype, grid: TokenGrid) -> str | None:
    """Why a layer cannot run strip by strip, in a few words; `None` where it can.

    Somebody wants to see the whole layer at work: autograd, torch.compile, a hook on it or on a part of it, a dense
    attention implementation.
    """
    if torch.is_grad_enabled():
        return "gradients are on (call it under torch.no_grad())"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "the model is compiled or traced"
    if layer.training:
        return "the model is in training mode (call model.eval())"
    if layer.config._attn_implementation != ATTENTION_NAME:
        return f"attn_implementation is {layer.config._attn_implementation!r}, not {ATTENTION_NAME!r}"
    if grid.has_context and (obstacle := obstacle_to_streamed_context(layer)) is not None:
        return obstacle
    if any(parameter.dtype != dtype for parameter in layer.parameters()):
        return f"not all weights are {dtype}"
    for module in layer.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"a {type(module).__name__} has a hook or a forward of its own"
    return None


def run_in_strips(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    grid: TokenGrid,
    *,
    overwrites: bool,
    score_tokens: bool = False,
    on_tokens: OnTokens | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One layer, strip by strip; the numbers of `layer(hidden_states, grid)`.

    Args:
        layer: in evaluation mode, one that `streams`.
        hidden_states: (*grid.batch_shape, hidden_size).
        grid: where the tokens are.
        overwrites: whether the result is written over `hidden_states`.
        score_tokens: whether prune scores are wanted.
        on_tokens: called after each strip.

    Returns:
        (*grid.batch_shape, hidden_size), and the prune scores, (T,) float32 in the grid's order, or `None`.
    """
    output = hidden_states if overwrites else torch.empty_like(hidden_states)
    packed, packed_output = hidden_states.flatten(0, 1), output.flatten(0, 1)  # (M, hidden_size), views
    share, num_globals = grid if isinstance(grid, TokenShare) else None, grid.num_global_tokens
    most_tokens = tokens_per_strip(layer.config, hidden_states.device, is_shared=share is not None) or grid.num_tokens
    at_once = tokens_at_once(hidden_states.device, most_tokens)
    if share is not None:
        share.fetch_surroundings(packed)
        on_tokens = in_proportion(on_tokens, share.num_owned, share.whole.counts[0])
    all_strips = strips_of(grid, most_tokens) if share is None else [share.strips(most_tokens)]
    for strips in all_strips:
        prepare_strips(strips, packed.new_empty(0, layer.attention.head_dim))
    scores, processes = [], None if share is None else share.processes
    contexts = strip_contexts(layer, packed, grid, most_tokens) if grid.has_context else [None] * grid.batch_size
    for strips, context, start in zip(all_strips, contexts, grid.image_offsets[:-1], strict=True):
        global_tokens = slice(start, start + num_globals)
        scored = StripScores(layer, packed, global_tokens, strips, at_once, processes) if score_tokens else None
        settings = num_globals, at_once, context, scored, on_tokens
        attention = _run_strips(layer, packed, packed_output, strips, *settings)
        attended = attention.merged(processes).to(packed.dtype)
        _Unfinished(layer, packed, packed_output, start, num_globals).add(attended)
        if scored is not None:
            scores.append(scored.scores())
    if not score_tokens:
        return output, None
    return output, torch.cat(scores) if share is None else share.gather(scores[0])


def _run_strips(
    layer: nn.Module,
    hidden_states: torch.Tensor,
    output: torch.Tensor,
    strips: list[TokenStrip],
    num_globals: int,
    at_once: int,
    context: StripContext | None,
    scored: StripScores | None,
    on_tokens: OnTokens | None,
) -> MergedAttention:
    """The patch tokens of an image: reads its part of (M, hidden_size) hidden states and writes that of the output.

    Returns the attention of the global tokens, which are left to be written.
    """
    attention = MergedAttention()
    if not strips:  # of several processes one may have no tokens
        nothing = hidden_states.new_zeros(layer.attention.num_heads, num_globals, layer.attention.head_dim)
        attention.add_nothing(nothing)
        return attention
    window = _Window(layer, hidden_states, strips, at_once)
    unfinished = _Unfinished(layer, hidden_states, output, strips[0].own_in_batch[0], at_once)
    for strip in strips:
        query, key, value = window.states_of(strip)
        attended, logsumexp = strip_attention(query, key, value, strip, context=context, scale=layer.attention.scaling)
        attention.add(attended[:, :num_globals], logsumexp)
        if scored is not None:
            scored.add(key, value, strip)
        unfinished.add(attended[:, num_globals:])
        if on_tokens is not None:
            on_tokens(strip.own[1] - strip.own[0])
    unfinished.finish()
    return attention


class _Unfinished:
    """Does what the layer does token by token after attention; on devices of `TOKENS_AT_ONCE` tokens wait for enough.

    Args:
        layer: what is done.
        hidden_states: (M, hidden_size), what the layer got.
        output: (M, hidden_size), what it gives; the same memory or other.
        first: packed index of the first token that will be added.
        at_once: so many go together at most.
    """

    def __init__(
        self, layer: nn.Module, hidden_states: torch.Tensor, output: torch.Tensor, first: int, at_once: int
    ) -> None:
        self._layer, self._hidden_states, self._output = layer, hidden_states, output
        self._first, self._at_once, self._length = first, at_once, 0
        self._waiting: torch.Tensor | None = None  # (at_once, heads, head_dim), of which `_length` tokens are there
        if hidden_states.device.type in TOKENS_AT_ONCE:
            self._waiting = hidden_states.new_empty(at_once, layer.attention.num_heads, layer.attention.head_dim)

    def add(self, attended: torch.Tensor) -> None:
        """The next tokens, (heads, tokens, head_dim)."""
        start, num_tokens = 0, attended.shape[1]
        while start < num_tokens:
            end = min(num_tokens, start + self._at_once - self._length)
            part = attended[:, start:end].transpose(0, 1)
            start = end
            if self._waiting is None:
                self._finish(part)
                continue
            length = self._length + len(part)
            self._waiting[self._length : length], self._length = part, length
            if length == self._at_once:
                self.finish()

    def finish(self) -> None:
        """Those that wait, however few."""
        if self._length:
            self._finish(self._waiting[: self._length])
            self._length = 0

    def _finish(self, attended: torch.Tensor) -> None:
        tokens = slice(self._first, self._first + len(attended))
        branch = self._layer.attention.projection(attended.flatten(1))
        self._layer.add_branches(self._hidden_states[tokens], branch, self._output[tokens])
        self._first = tokens.stop


class _Window:
    """Queries, keys and values around the strip in work: made once for each token, kept as long as they are needed.

    Args:
        layer: makes them.
        hidden_states: (M, hidden_size) of the batch.
        strips: of the image, in which order they will be asked for.
        at_once: so many tokens are read at a time.
    """

    def __init__(self, layer: nn.Module, hidden_states: torch.Tensor, strips: list[TokenStrip], at_once: int) -> None:
        self._layer, self._hidden_states, self._at_once = layer, hidden_states, at_once
        self._end = strips[0].image_start  # packed index of the first token that none are made of yet
        num_globals, first_query = strips[0].num_global_tokens, strips[0].own_in_batch[0]
        first_key = strips[0].around_in_batch[0]
        # Packed indices: those between are another process's tokens, which answer and do not ask.
        self._end_of_globals, self._first_query = self._end + num_globals, first_query
        self._last = strips[-1].around_in_batch[1]
        # Rows below a strip are made with it, and more tokens where those are no multiple of what goes together: on a
        # CPU it does not pay to make fewer, see `TOKENS_AT_ONCE`. Their queries wait.
        self._multiple = at_once if hidden_states.device.type in TOKENS_AT_ONCE else 1
        most_queries = max(strip.around_in_batch[1] - strip.own_in_batch[0] for strip in strips) + self._multiple - 1
        most_keys = max(strip.num_tokens for strip in strips) - num_globals + self._multiple - 1
        self._queries = _Kept(num_globals + most_queries, num_globals, first_query)
        self._keys_values = _Kept(num_globals + most_keys, num_globals, first_key)

    def states_of(self, strip: TokenStrip) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query (heads, G + S, head_dim), key and value (heads, M, head_dim) of a strip, the next one of the image."""
        attention, width = self._layer.attention, self._hidden_states.shape[1]
        of_query, of_key_value = slice(0, width), slice(width, 3 * width)
        first_key, end = strip.around_in_batch
        end = min(self._last, self._end + next_multiple(end - self._end, self._multiple))
        self._queries.forget(strip.own_in_batch[0])
        self._keys_values.forget(first_key)
        for start in range(self._end, end, self._at_once):
            part = self._hidden_states[start : min(start + self._at_once, end)]
            qkv = WrittenProducts(attention.qkv, self._layer.norm1(part))  # (tokens, 3 * width)
            end_of_globals, first_query = (
                min(max(0, token - start), len(part)) for token in (self._end_of_globals, self._first_query)
            )
            self._keys_values.append(qkv, slice(0, len(part)), of_key_value)
            self._queries.append(qkv, slice(0, end_of_globals), of_query)
            self._queries.append(qkv, slice(first_query, len(part)), of_query)
        self._end = max(end, self._end)  # the strip before may have seen all
        keys_values = self._keys_values.states()[: strip.num_tokens]
        states = (self._queries.states()[: strip.num_queries], *keys_values.split(width, dim=1))
        return tuple(state.unflatten(1, (attention.num_heads, attention.head_dim)).transpose(0, 1) for state in states)


class _Kept:
    """Something of the global tokens and of consecutive patch tokens, the first of which are forgotten as others come.

    Args:
        most_tokens: at most so many are kept at once.
        num_globals: how many global tokens come first.
        first: packed index of the first patch token.
    """

    def __init__(self, most_tokens: int, num_globals: int, first: int) -> None:
        self._most_tokens, self._num_globals, self._first = most_tokens, num_globals, first
        self._buffer: torch.Tensor | None = None  # (most_tokens, features)
        self._length = 0

    def states(self) -> torch.Tensor:
        """(G + tokens, features) of what is kept."""
        return self._buffer[: self._length]

    def append(self, products: WrittenProducts, tokens: slice, features: slice) -> None:
        """Keeps the features of the next tokens."""
        if self._buffer is None:
            self._buffer = products.new_empty(self._most_tokens, features.stop - features.start)
        end = self._length + tokens.stop - tokens.start
        if end > self._length:
            products.write(tokens, features, self._buffer[self._length : end])
        self._length = end

    def forget(self, first: int) -> None:
        """Forgets the patch tokens before a packed index."""
        passed, start = first - self._first, self._num_globals
        if passed == 0:
            return
        close_gap(self._buffer[: self._length], start, passed)
        self._first, self._length = first, self._length - passed


def close_gap(states: torch.Tensor, start: int, gap: int) -> None:
    """Moves what lies behind a gap in (tokens, features) to where the gap starts, in place.

    Args:
        states: contiguous.
        start: of the gap.
        gap: how many tokens wide it is.
    """
    # In pieces as long as the way they go, so that none is written over before it is read.
    for piece in range(start, len(states) - gap, max(1, gap)):
        end = min(piece + gap, len(states) - gap)
        states[piece:end] = states[piece + gap : end + gap]
