# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Steps of the acceptance that check the kernel: against float64, and bitwise."""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator

import torch

from sparsepath_vit import block_attention, set_block_attention_backend
from sparsepath_vit.model.attention_specification import naive_block_attention
from sparsepath_vit.model.attention_triton_launch import launch_block_attention, launch_block_attention_backward
from sparsepath_vit.model.attention_triton_tables import attention_tiles
from sparsepath_vit.model.context_tokens import ContextTokens
from sparsepath_vit.model.token_grid import TokenGrid

from .acceptance import Finding, Scale
from .attention import AttentionCase, grid_places
from .gpu_stratified import context_of, layer_context

# ||kernel - float64|| / ||float64||. float32 products are exact ones, not TF32, which would give about 3e-4.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GRADIENT_FACTOR = 2.0
# A logit of 1e4 is known to a few hundredths in 16 bits, and to 1e-3 in float32: outputs and no gradients are compared.
LARGE_LOGIT = 1e4
LARGE_LOGIT_TOLERANCES = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 5e-2}
NAMES = ("output", "grad_query", "grad_key", "grad_value")
# (window_size, neighbor_radius, head_dim, global tokens): kernels are compiled anew for each.
PATTERNS = (
    (8, 1, 64, 9),
    (16, 1, 64, 9),
    (64, 1, 64, 9),
    (4, 1, 64, 5),
    (8, 0, 64, 1),
    (8, 2, 64, 5),
    (8, 1, 128, 5),
    (16, 1, 80, 1),
    (8, 1, 96, 1),
    (4, 2, 32, 5),
    (8, 1, 16, 1),
    (64, 0, 128, 9),
    (16, 2, 96, 5),
    (8, 1, 80, 9),
)
LAYOUTS = ("full", "random", "clustered", "masked batch", "images of three sizes", "large logits")
STRATIFIED_LAYOUTS = ("context tokens", "context tokens and weights", "context tokens, masked batch")


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """One comparison with float64."""

    pattern: tuple[int, int, int, int]
    layout: str
    dtype: torch.dtype
    device: str
    is_small: bool = False

    def grid(self) -> TokenGrid:
        """Several blocks a side, the last ones cut; pruned, masked or of several images as the layout says."""
        window, radius, _, num_globals = self.pattern
        blocks = 2 if self.is_small else 8 if window <= 8 else 3
        rows, columns = blocks * window + window // 4 + 1, blocks * window - window // 2 - 1
        if window >= 64:  # float64 attention of all blocks would not fit beside that of other processes
            rows = window // 3
        settings = {"num_global_tokens": num_globals, "window_size": window, "neighbor_radius": radius}
        settings["device"] = self.device
        if self.layout in STRATIFIED_LAYOUTS:
            settings["num_context_tokens"] = max(8, rows * columns // 16)
        if self.layout == "images of three sizes":
            sizes = [(rows // 2, columns), (1, 1), (rows, columns // 2 + 1)]
            return TokenGrid.create(sizes, **settings)
        if "masked batch" in self.layout:
            generator = torch.Generator().manual_seed(3)
            present = torch.rand(2, rows, columns, generator=generator) < 0.6
            present[0, : window + 1] = False  # whole blocks of background
            present[:, -1, -1] = True
            return TokenGrid.create([(rows, columns)] * 2, present=present.to(self.device), **settings)
        grid = TokenGrid.create([(rows, columns)], **settings)
        if self.layout not in ("random", "clustered", "context tokens and weights"):
            return grid
        side = max(rows, columns)
        places = grid_places(side, self.layout == "clustered")
        places = places[(places // side < rows) & (places % side < columns)]
        places = places // side * columns + places % side
        kept = places[: round(0.4 * rows * columns)].to(self.device)
        weights = 1 + kept % 9 if self.layout == "context tokens and weights" else None
        return grid.select(grid.raster_order()[kept].sort().values, [len(kept)], weights)


def kernel_cases(scale: Scale) -> list[list[KernelCase]]:
    """Groups of cases that share compiled kernels: bfloat16 over all patterns, the other dtypes over every other.

    With context tokens bfloat16 over every other and the rest over the first: they compile twice as many kernels.
    """
    if scale.is_rehearsal:
        chosen = [((4, 1, 16, 5), torch.float32)]
    else:
        chosen = [(pattern, torch.bfloat16) for pattern in PATTERNS]
        chosen += [(pattern, torch.float16) for pattern in PATTERNS[::2]]
        chosen += [(pattern, torch.float32) for pattern in (PATTERNS[0], *PATTERNS[1::2])]
    stratified = {(pattern, torch.bfloat16) for pattern in PATTERNS[::2]}
    stratified |= {(PATTERNS[0], dtype) for dtype in TOLERANCES} | {chosen[0]}
    return [
        [KernelCase(pattern, layout, dtype, scale.device, scale.is_rehearsal) for layout in layouts]
        for pattern, dtype in chosen
        for layouts in (LAYOUTS, STRATIFIED_LAYOUTS if (pattern, dtype) in stratified else ())
        if layouts
    ]


def check_kernel_case(case: KernelCase) -> dict[str, object]:
    """Errors of output and gradients against float64; the memory that the kernels write into held NaN before."""
    window, radius, head_dim, num_globals = case.pattern
    grid = case.grid()
    generator = torch.Generator(case.device).manual_seed(grid.num_tokens)
    fused = torch.randn(4, grid.num_tokens, 2, head_dim, generator=generator, device=case.device)
    fused[:2] *= 1.5
    scale = head_dim**-0.5
    if case.layout == "large logits":
        fused[:2] *= (
            LARGE_LOGIT / scale / (fused[0, ::37].flatten(1) @ fused[1, ::41].flatten(1).T).abs().max()
        ) ** 0.5
    query, key, value, weights = fused.to(case.dtype).unbind(0)
    context = context_of(grid)
    computed = _kernel_results(query, key, value, weights, grid, context, scale)
    states = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    expected = naive_block_attention(*states, grid, scale, context=context)
    gradients = torch.autograd.grad(expected, states, weights.double())
    errors = {
        name: ((actual.double() - wanted).norm() / wanted.norm()).item()
        for name, actual, wanted in zip(NAMES, computed, (expected.detach(), *gradients), strict=True)
    }
    tolerance = TOLERANCES[case.dtype]
    limits = {name: tolerance * (1.0 if name == "output" else GRADIENT_FACTOR) for name in NAMES}
    if case.layout == "large logits":
        limits = {"output": LARGE_LOGIT_TOLERANCES[case.dtype]}
    is_finite = all(tensor.isfinite().all().item() for tensor in computed)
    return {
        "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout,
        "window_size": window,
        "neighbor_radius": radius,
        "head_dim": head_dim,
        "global_tokens": num_globals,
        "tokens": grid.num_tokens,
        **{f"error_{name}": float(f"{error:.3g}") for name, error in errors.items()},
        "passed": is_finite and all(errors[name] <= limit for name, limit in limits.items()),
    }


def _kernel_results(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    weights: torch.Tensor,
    grid: TokenGrid,
    context: ContextTokens | None,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Output and gradients, (tokens, heads, head_dim), from memory full of NaN."""
    packed = [states.requires_grad_() for states in (query, key, value)]
    shape = (*grid.batch_shape, *query.shape[1:])
    set_block_attention_backend("triton")
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        states = [tensor.view(shape).transpose(1, 2) for tensor in packed]
        output = block_attention(*states, grid, context=context, scale=scale).transpose(1, 2).reshape(query.shape)
        gradients = torch.autograd.grad(output, packed, weights)
    finally:
        torch.use_deterministic_algorithms(False)
        set_block_attention_backend("auto")
    return output.detach(), *gradients


def check_group(cases: list[KernelCase]) -> list[dict[str, object]]:
    """Rows of the cases; an exception becomes a row, too."""
    rows = []
    for case in cases:
        try:
            rows.append(check_kernel_case(case))
        except Exception as error:
            window, radius, head_dim, num_globals = case.pattern
            rows.append(
                {
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "layout": case.layout,
                    "window_size": window,
                    "neighbor_radius": radius,
                    "head_dim": head_dim,
                    "global_tokens": num_globals,
                    "passed": False,
                    "problem": f"{type(error).__name__}: {str(error).strip()[:300]}",
                }
            )
    return rows


def correctness(scale: Scale) -> Iterator[Finding]:
    """The kernel against float64, dtype by dtype."""
    groups = kernel_cases(scale)
    if scale.workers:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU
        with concurrent.futures.ProcessPoolExecutor(scale.workers, mp_context=context) as pool:
            rows = [row for group in pool.map(check_group, groups) for row in group]
    else:
        rows = [row for group in groups for row in check_group(group)]
    for dtype, tolerance in TOLERANCES.items():
        name = str(dtype).removeprefix("torch.")
        of_dtype = [row for row in rows if row["dtype"] == name]
        if not of_dtype:
            continue
        ordinary = [row for row in of_dtype if row["layout"] != "large logits" and "error_output" in row]
        worst = {key: max([row[f"error_{key}"] for row in ordinary], default=math.nan) for key in NAMES}
        failed = [row for row in of_dtype if not row["passed"]]
        for row in failed:
            print("not passed:", row)
        yield Finding(
            f"{name}, {len(of_dtype)} cases",
            f"worst errors {', '.join(f'{key} {error:.1e}' for key, error in worst.items())}; {len(failed)} failed",
            f"{tolerance:.0e}, gradients {GRADIENT_FACTOR * tolerance:.0e}",
            not failed,
            tuple(of_dtype),
        )


def bitwise(scale: Scale) -> Iterator[Finding]:
    """Repeats of forward and backward are equal bit by bit, of the full grid, a pruned one, one with context tokens."""
    for kept_share, context_tokens in ((1.0, 0), (0.4, 0), (1.0, scale.context_tokens)):
        case = AttentionCase(
            tokens=min(scale.tokens[-1], 60_025),
            window_size=scale.windows[0],
            kept_share=kept_share,
            heads=scale.heads,
            head_dim=scale.head_dim,
            dtype=scale.dtype,
            device=scale.device,
            is_clustered=True,
            context_tokens=context_tokens,
        )
        grid = case.grid()
        states = [tensor[0].transpose(0, 1) for tensor in case.states(grid)]  # (tokens, heads, head_dim)
        settings = (attention_tiles(grid), scale.head_dim**-0.5, layer_context(states[0], grid))
        output, logsumexp = launch_block_attention(*states, *settings)

        def forward(arguments: tuple = (*states, *settings)) -> tuple:
            return launch_block_attention(*arguments)

        def backward(arguments: tuple = (output, *states, output, logsumexp, *settings)) -> tuple:
            return launch_block_attention_backward(*arguments)

        for name, run, repeats in (
            ("forward", forward, scale.forward_repeats),
            ("backward", backward, scale.backward_repeats),
        ):
            different, seconds = _count_different(run, repeats, scale)
            row = {"direction": name, "tokens": grid.num_tokens, "context_tokens": context_tokens}
            row |= {"repeats": repeats, "different": different}
            beside = f", {context_tokens:,} of context" if context_tokens else ""
            yield Finding(
                f"{name}, {grid.num_tokens:,} tokens{beside}",
                f"{different} of {repeats} differ ({seconds:.1f} s)",
                "0 differ",
                different == 0,
                (row,),
            )


def _count_different(run: Callable[[], tuple[torch.Tensor, ...]], repeats: int, scale: Scale) -> tuple[int, float]:
    """Runs whose result differs from the first one's, and the seconds it took."""
    first, start = run(), time.perf_counter()
    is_finite = all(tensor.isfinite().all() for tensor in first)
    different = torch.zeros((), dtype=torch.int64, device=scale.device)
    for _ in range(repeats):
        pairs = zip(first, run(), strict=True)
        is_different = [(one.view(torch.uint8) != other.view(torch.uint8)).any() for one, other in pairs]
        different += torch.stack(is_different).any()
    count = int(different) if is_finite else repeats
    return count, time.perf_counter() - start
