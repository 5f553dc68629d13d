# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The compiled CPU kernel as a backend: where it runs, what it takes, and how a call is made.

It is for inference and for the forward of training. What it does not take (float16, float64, bfloat16 without
instructions for it, an odd head_dim), and gradients, the tiles of `attention_sdpa_tiles.py` compute.
"""

import ctypes
import functools
import math

import torch

from .attention_backend import AttentionBackend, LayerContext, PreparedGrid, StripContext
from .attention_cpu_source import CALL_FIELDS, MAX_HEAD_DIM, MULTIPLE_OF_HEAD_DIM, SOURCE
from .attention_sdpa_backward import tiled_block_attention_backward
from .attention_sdpa_tables import log_weights, prepare_tiles, tile_table
from .attention_sdpa_tiles import tiled_block_attention, tiled_strip_attention
from .host_compiler import CompilationError, compiled_library, start_of_threads
from .token_grid import TokenGrid

_CTYPES = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}
_BLOCK_ROW = 4  # column of a tile


class _Call(ctypes.Structure):
    """`Call` of the C source; pointers are addresses."""

    _fields_ = [(name, _CTYPES.get(kind, ctypes.c_void_p)) for name, kind in CALL_FIELDS]


@functools.cache
def _library() -> ctypes.CDLL:
    library = compiled_library("attention", SOURCE)
    library.attend.argtypes = [ctypes.POINTER(_Call), ctypes.c_void_p, ctypes.c_uint]
    return library


@functools.cache
def _reason_against() -> str | None:
    """What keeps the kernel from being compiled or run on this machine."""
    try:
        _library()
        start_of_threads()
    except CompilationError as error:
        return f"the compiled CPU kernel cannot be had: {error}"
    return None


def _missing(device: torch.device) -> str | None:
    """What keeps the kernel from running on a device; `None` where it runs."""
    if device.type != "cpu":
        return f"the compiled CPU kernel needs tensors on the CPU, and these are on {device.type}"
    return _reason_against()


def takes(query: torch.Tensor) -> bool:
    """Whether the kernel computes with such queries, (..., head_dim); where not, tiles do."""
    head_dim = query.shape[-1]
    if head_dim > MAX_HEAD_DIM or head_dim % MULTIPLE_OF_HEAD_DIM:
        return False
    return query.dtype == torch.float32 or (query.dtype == torch.bfloat16 and bool(_library().takes_bfloat16()))


def _prepare(grid: TokenGrid) -> PreparedGrid:
    """A tile for each block, then what `attention_sdpa_tiles.py` needs."""
    tensors, numbers = prepare_tiles(grid)
    return PreparedGrid([tile_table(grid, min_queries=1), *tensors], numbers)


def _for_tiles(prepared: PreparedGrid) -> PreparedGrid:
    return PreparedGrid(prepared.tensors[1:], prepared.numbers)


class _Kernel:
    """Calls of the kernel for one layer or strip.

    Args:
        query: (queries, heads, head_dim); in a strip of the global tokens and then of its own patch tokens.
        key, value: (M, heads, head_dim) packed tokens.
        prepared: where they are.
        scale: factor on the logits.
        first_query: the packed index of the first query after the first image's global tokens.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        prepared: PreparedGrid,
        scale: float,
        first_query: int,
    ) -> None:
        self.tiles, (self.num_globals, neighbor_radius) = prepared.tensors[0], prepared.numbers
        self.output = query.new_empty(query.shape)
        self.logsumexp = torch.empty(query.shape[1], self.num_globals)
        self._tensors: list[torch.Tensor] = []  # whose addresses the kernel gets live as long as this
        self.call = _Call(
            num_heads=query.shape[1],
            head_dim=query.shape[2],
            num_globals=self.num_globals,
            first_query=first_query,
            tile_columns=self.tiles.shape[1],
            neighbor_radius=neighbor_radius,
            is_bfloat16=query.dtype == torch.bfloat16,
            factor=scale / math.log(2.0),
            logsumexp=self._address(self.logsumexp),
        )
        for name, states in (("query", query), ("key", key), ("value", value), ("output", self.output)):
            self._set_states(name, states)
        weights = log_weights(_for_tiles(prepared), torch.float32)
        if weights is not None:
            self.call.log_weights = self._address(weights / math.log(2.0))

    def add_context(self, context: LayerContext, key: torch.Tensor, value: torch.Tensor, of_mean: torch.Tensor) -> None:
        """Context tokens from here on.

        Args:
            context: which they are.
            key, value: (entries, heads, head_dim), in whose rows `context.tokens` lie.
            of_mean: (images, heads, head_dim) float32, what the mean queries get from all tokens.
        """
        places = torch.stack([context.tokens, context.block_rows, context.block_columns], dim=1)
        offsets = torch.tensor([0, *context.counts]).cumsum(dim=0)
        self._set_states("context_key", key)
        self._set_states("context_value", value)
        self.call.context_places, self.call.context_offsets = self._address(places), self._address(offsets)
        self.call.context_log_weights = self._address(context.weights.float().log2_())
        self.call.mean_query = self._address(context.mean_query.contiguous())
        self.call.of_mean = self._address(of_mean)

    def run(self, tiles: torch.Tensor, writes_of_mean: bool = False) -> None:
        """Writes what the tiles attend to.

        Args:
            tiles: rows of the table.
            writes_of_mean: whether tiles of global tokens write what the mean query of their image gets.
        """
        self.call.tiles, self.call.num_tiles = self._address(tiles), len(tiles)
        self.call.writes_of_mean = writes_of_mean
        if _library().attend(ctypes.byref(self.call), start_of_threads(), torch.get_num_threads()):
            raise MemoryError("The compiled CPU kernel got no memory for its threads.")

    def _set_states(self, name: str, states: torch.Tensor) -> None:
        """(tokens, heads, head_dim), head_dim contiguous."""
        setattr(self.call, name, self._address(states))
        setattr(self.call, f"{name}_stride", states.stride(0) * states.element_size())
        setattr(self.call, f"{name}_head_stride", states.stride(1) * states.element_size())

    def _address(self, tensor: torch.Tensor) -> int:
        self._tensors.append(tensor)
        return tensor.data_ptr()


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prepared: PreparedGrid,
    scale: float,
    dropout: float,
    generator: torch.Generator | None,
    context: LayerContext | None = None,
) -> tuple[torch.Tensor, None]:
    if not takes(query):
        return tiled_block_attention(query, key, value, _for_tiles(prepared), scale, dropout, generator, context)
    kernel = _Kernel(query, key, value, prepared, scale, first_query=prepared.numbers[0])
    tiles = kernel.tiles
    if context is not None:
        kernel.add_context(context, key, value, torch.empty(context.mean_query.shape))
        is_global = tiles[:, _BLOCK_ROW] < 0
        kernel.run(tiles[is_global], writes_of_mean=True)  # which the others are corrected by
        tiles = tiles[~is_global]
    kernel.run(tiles)
    return kernel.output, None


def _forward_strip(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prepared: PreparedGrid,
    scale: float,
    context: StripContext | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not takes(query):
        return tiled_strip_attention(query, key, value, _for_tiles(prepared), scale, context)
    first_query = int(prepared.tensors[0][1, 0])  # the first tile is that of the global tokens
    kernel = _Kernel(query, key, value, prepared, scale, first_query)
    if context is not None:
        of_mean = context.of_mean.float()[None].contiguous()
        kernel.add_context(context.as_layer_context(), context.key, context.value, of_mean)
    kernel.run(kernel.tiles)
    return kernel.output, kernel.logsumexp


def _backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
    prepared: PreparedGrid,
    scale: float,
    dropout: float,
    generator: torch.Generator | None,
    context: LayerContext | None = None,
) -> tuple[torch.Tensor, ...]:
    states = grad_output, query, key, value, output, logsumexp
    settings = _for_tiles(prepared), scale, dropout, generator
    return tiled_block_attention_backward(*states, *settings, context)


CPU_KERNEL = AttentionBackend(
    name="cpu_kernel",
    description="compiled CPU kernel",
    device_type="cpu",
    missing=_missing,
    unwanted=lambda device: None,
    check_query=lambda query: None,
    prepare=_prepare,
    forward=_forward,
    backward=_backward,
    forward_strip=_forward_strip,
    has_dropout=False,
    takes_key_weights=True,
    returns_logsumexp=False,
    strips_take_context=True,
)
