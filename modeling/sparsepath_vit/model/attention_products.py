# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The attention of a tile by explicit matrix products, for CPUs with bfloat16 instructions.

torch's flash attention on a CPU multiplies small pieces. For a block and its neighbourhood (64 queries, 585 keys, heads
of 64, AVX512-BF16, torch 2.15) it takes 3.3 ns a logit, and two whole products with a softmax between them 1.8 ns.

A product in bfloat16 rounds its result to bfloat16, and logits are too coarse so. What was lost is a second product:
added to the negated first one it is accumulated in float32 too, and only the small difference is rounded. The sum of
both is the logits to 2^-18 of their size. So what is left of the error is that of flash attention: probabilities and
output are rounded to bfloat16.
"""

import functools
import math
import threading

import torch

# oneDNN compiles each product for its shape, once a process: 0.5 ms, as long as the product of a block takes, and half
# a megabyte that stays. Where pruning leaves blocks of any size, queries and keys are filled up to multiples of these:
# 20 shapes at 3430 px, where multiples of 16 leave 61 and take 58 MB more.
MULTIPLE_OF_QUERIES, MULTIPLE_OF_KEYS = 32, 64
# Logits at once: fewer cost more calls, and more do not stay in the cache (measured with 75,000 to 900,000).
_MOST_LOGITS = 5 * 2**17
# On so many threads at most: a block of 64 queries takes 440 us among two and 490 us alone on one thread, 300 us among
# five and 480 us alone on two.
_MOST_CACHES = 4
# Of one tile, so that one head's logits are not more than that.
_MOST_QUERIES, _MOST_KEYS = 320, 8192


@functools.cache
def _cpu_is_faster_with_products() -> bool:
    """Without bfloat16 instructions products are slow. Flash attention uses AMX; nothing was measured there."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_bf16") and torch.backends.mkldnn.enabled


def products_are_faster(query: torch.Tensor) -> bool:
    """Whether this machine computes the attention of such queries faster by `TileProducts` than by SDPA.

    In float32 it does not: flash attention takes 3.0 ns a logit there, products and softmax 2.9 ns.
    """
    return query.device.type == "cpu" and query.dtype == torch.bfloat16 and _cpu_is_faster_with_products()


def fit_products(num_queries: int, num_keys: int) -> bool:
    """Whether a tile has a size that `TileProducts` takes."""
    return num_queries <= _MOST_QUERIES and num_keys <= _MOST_KEYS and num_queries * num_keys <= _MOST_LOGITS


def most_at_once(num_heads: int, num_queries: int, num_keys: int) -> int:
    """Of how many tiles of one size the logits fit the caches of torch's threads; at least one."""
    return max(1, _most_logits() // (num_heads * num_queries * num_keys))


def _most_logits() -> int:
    return _MOST_LOGITS * min(torch.get_num_threads(), _MOST_CACHES)


class TileProducts:
    """Attends tile after tile, in the same memory: what is fresh for each tile costs more than the arithmetic."""

    def __init__(self) -> None:
        self._memory: dict[torch.dtype, torch.Tensor] = {}
        self._places: dict[tuple, list[torch.Tensor]] = {}

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        num_keys: int,
        mask: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention of one tile.

        Args:
            query: (queries, heads, head_dim) bfloat16.
            key, value: (heads, keys, head_dim) bfloat16, contiguous.
            num_keys: how many of the keys count; the values of the others must be finite.
            mask: (queries or 1, num_keys), bool where queries see keys, or what is added to the logits; `None` where
                all see all.
            scale: factor on the logits.

        Returns:
            (queries, heads, head_dim), and the natural log-sum-exp of the logits, (heads, queries) float32.
        """
        num_queries = len(query)
        query, mask = _filled_up(query, mask)
        attended, logsumexp = self._attend_in_groups(query, key, value, num_keys, mask, scale)
        return attended[:, :num_queries].transpose(0, 1), logsumexp[:, :num_queries]

    def attend_batch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        """The attention of several tiles of one size.

        Args:
            query: (tiles, heads, queries, head_dim) bfloat16, contiguous.
            key, value: (tiles, heads, keys, head_dim) bfloat16, contiguous.
            mask: as in `attend`, but (tiles, 1, queries or 1, keys).
            scale: factor on the logits.

        Returns:
            (tiles, heads, queries, head_dim).
        """
        if mask is not None and len(query) == 1:
            mask = mask[0, 0]
        states = (states.flatten(0, 1) for states in (query, key, value))
        return self._attend_in_groups(*states, key.shape[2], mask, scale)[0].view(query.shape)

    def _attend_in_groups(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        num_keys: int,
        mask: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`_attend`, of one tile that has more logits than the caches hold of some heads at a time."""
        num_groups = -(-len(query) * query.shape[1] * key.shape[1] // _most_logits())
        if num_groups == 1:
            return self._attend(query, key, value, num_keys, mask, scale)
        groups = zip(*(states.chunk(num_groups) for states in (query, key, value)), strict=True)
        parts = [self._attend(*states, num_keys, mask, scale) for states in groups]
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        num_keys: int,
        mask: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(heads, queries, head_dim) of queries, keys and values of that form, and (heads, queries) log-sum-exp.

        Heads may be those of several tiles, one tile after the other; the mask then has a dimension for tiles and one
        for heads.
        """
        rounded, logits = self._places_of(*query.shape[:2], key.shape[1])  # (2, heads, queries, keys) each
        key = key.mT
        torch.bmm(query, key, out=rounded[0])
        torch.baddbmm(rounded[0], query, key, beta=-1, out=rounded[1])
        # torch.add of two types adds in bfloat16, or copies to memory that is fresh.
        logits.copy_(rounded)
        logits[0].add_(logits[1])
        logsumexp = _softmax_(logits[0], num_keys, mask, scale)
        return torch.bmm(rounded[0].copy_(logits[0]), value), logsumexp

    def _places_of(self, *shape: int) -> list[torch.Tensor]:
        """Memory for two sets of logits in bfloat16 and two in float32, each of a shape (heads, queries, keys)."""
        if shape not in self._places:
            size = math.prod(shape)
            with torch.inference_mode(False):  # else what is made there could not be written to elsewhere
                for dtype in (torch.bfloat16, torch.float32):
                    if dtype not in self._memory or self._memory[dtype].numel() < 2 * size:
                        self._memory[dtype], self._places = torch.empty(2 * size, dtype=dtype), {}
                self._places[shape] = [memory[: 2 * size].view(2, *shape) for memory in self._memory.values()]
        return self._places[shape]


_of_thread = threading.local()


def products_of_thread() -> TileProducts:
    """The same in all layers of all images: memory that is fresh in each layer takes a twentieth of the time."""
    if not hasattr(_of_thread, "products"):
        _of_thread.products = TileProducts()
    return _of_thread.products


def _filled_up(query: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(heads, queries, head_dim) and their mask: a multiple of `MULTIPLE_OF_QUERIES`, or one (a mean query) more."""
    num_queries = query.shape[0]
    missing = 0 if num_queries % MULTIPLE_OF_QUERIES == 1 else -num_queries % MULTIPLE_OF_QUERIES
    if missing == 0:
        return query.transpose(0, 1).contiguous(), mask
    if mask is not None and mask.shape[0] > 1:
        mask = torch.cat([mask, mask[-1:].expand(missing, -1)])
    return torch.nn.functional.pad(query.transpose(0, 1), (0, 0, 0, missing)), mask


def _softmax_(logits: torch.Tensor, num_keys: int, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """(heads, queries, keys) float32 logits without scale and mask become probabilities; returns their log-sum-exp.

    In powers of two: torch's `exp_` takes five times as long as `exp2_`, and its `softmax` a fifth longer than all of
    this.
    """
    factor = scale / math.log(2.0)
    if num_keys < logits.shape[2]:
        logits[..., num_keys:] = -torch.inf
    if mask is not None:
        masked = logits[..., :num_keys]
        if mask.ndim == 4:  # (tiles, 1, queries or 1, keys)
            masked = masked.unflatten(0, (len(mask), -1))
        if mask.dtype == torch.bool:
            masked.masked_fill_(~mask, -torch.inf)
        else:
            masked.add_(mask, alpha=1.0 / scale)
    shift = logits.amax(dim=-1, keepdim=True).mul_(-factor)
    torch.add(shift, logits, alpha=factor, out=logits)
    total = logits.exp2_().sum(dim=-1, keepdim=True)
    logits.mul_(total.reciprocal())
    return total.log2_().sub_(shift).mul_(math.log(2.0))[..., 0]
