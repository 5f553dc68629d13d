# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Steps of the acceptance that check the kernel: against float64, bitwise, in a CUDA graph, and what it compiles."""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator

import torch

from sparsepath_vit.conversion import architecture
from sparsepath_vit.model import attention_triton_launch as launch
from sparsepath_vit.model.attention_specification import naive_block_attention
from sparsepath_vit.model.attention_triton_launch import launch_block_attention, launch_block_attention_backward
from sparsepath_vit.model.attention_triton_tables import attention_tiles
from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel
from sparsepath_vit.model.token_grid import TokenGrid

from .acceptance import Finding, Scale, wait
from .attention import AttentionCase, grid_places
from .model import random_weights

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
        if self.layout == "images of three sizes":
            sizes = [(rows // 2, columns), (1, 1), (rows, columns // 2 + 1)]
            return TokenGrid.create(sizes, **settings)
        if self.layout == "masked batch":
            generator = torch.Generator().manual_seed(3)
            present = torch.rand(2, rows, columns, generator=generator) < 0.6
            present[0, : window + 1] = False  # whole blocks of background
            present[:, -1, -1] = True
            return TokenGrid.create([(rows, columns)] * 2, present=present.to(self.device), **settings)
        grid = TokenGrid.create([(rows, columns)], **settings)
        if self.layout not in ("random", "clustered"):
            return grid
        side = max(rows, columns)
        places = grid_places(side, self.layout == "clustered")
        places = places[(places // side < rows) & (places % side < columns)]
        places = places // side * columns + places % side
        kept = places[: round(0.4 * rows * columns)].to(self.device)
        return grid.select(grid.raster_order()[kept].sort().values, [len(kept)])


def kernel_cases(scale: Scale) -> list[list[KernelCase]]:
    """Groups of cases that share compiled kernels: bfloat16 over all patterns, the other dtypes over every other."""
    if scale.is_rehearsal:
        chosen = [((4, 1, 16, 5), torch.float32), ((4, 1, 16, 5), torch.float16)]
    else:
        chosen = [(pattern, torch.bfloat16) for pattern in PATTERNS]
        chosen += [(pattern, torch.float16) for pattern in PATTERNS[::2]]
        chosen += [(pattern, torch.float32) for pattern in (PATTERNS[0], *PATTERNS[1::2])]
    return [
        [KernelCase(pattern, layout, dtype, scale.device, scale.is_rehearsal) for layout in LAYOUTS]
        for pattern, dtype in chosen
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
    computed = _kernel_results(query, key, value, weights, grid, scale)
    states = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    expected = naive_block_attention(*states, grid, scale)
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
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """Output and gradients from memory full of NaN."""
    tiles = attention_tiles(grid)
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        output, logsumexp = launch_block_attention(query, key, value, tiles, scale)
        gradients = launch_block_attention_backward(weights, query, key, value, output, logsumexp, tiles, scale)
    finally:
        torch.use_deterministic_algorithms(False)
    return output, *gradients


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
    """Repeats of forward and backward are equal bit by bit, of the full grid and of a pruned one."""
    for kept_share in (1.0, 0.4):
        case = AttentionCase(
            tokens=min(scale.tokens[-1], 60_025),
            window_size=scale.windows[0],
            kept_share=kept_share,
            heads=scale.heads,
            head_dim=scale.head_dim,
            dtype=scale.dtype,
            device=scale.device,
            is_clustered=True,
        )
        grid = case.grid()
        tiles = attention_tiles(grid)
        states = [tensor[0].transpose(0, 1) for tensor in case.states(grid)]  # (tokens, heads, head_dim)
        factor = scale.head_dim**-0.5
        output, logsumexp = launch_block_attention(*states, tiles, factor)

        def forward(states: list = states, tiles: object = tiles, factor: float = factor) -> tuple:
            return launch_block_attention(*states, tiles, factor)

        def backward(arguments: tuple = (output, *states, output, logsumexp, tiles, factor)) -> tuple:
            return launch_block_attention_backward(*arguments)

        for name, run, repeats in (
            ("forward", forward, scale.forward_repeats),
            ("backward", backward, scale.backward_repeats),
        ):
            different, seconds = _count_different(run, repeats, scale)
            row = {"direction": name, "tokens": grid.num_tokens, "repeats": repeats, "different": different}
            yield Finding(
                f"{name}, {grid.num_tokens:,} tokens",
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


@torch.no_grad()
def cuda_graph(scale: Scale) -> Iterator[Finding]:
    """A whole forward with pruning, captured once and replayed on new pixels."""
    config = architecture(scale.architectures[0]).build_config(
        num_hidden_layers=4, prune_after_layer=2, prune_ratio=0.6, window_size=scale.windows[0]
    )
    model = random_weights(SparsePathViTModel, config, scale.dtype, scale.device)
    size = min(scale.sizes[-1], 3430)
    first, second = torch.randn(2, 1, 3, size, size, device=scale.device).to(scale.dtype)
    expected = model(second)
    replay, outputs = captured(model, first.clone(), scale)
    replay(second)
    actual = outputs()
    seconds = seconds_of(lambda: replay(second), scale)
    eager_seconds = seconds_of(lambda: model(second), scale)
    is_equal = torch.equal(actual.last_hidden_state, expected.last_hidden_state)
    kept_alike = (actual.patch_positions == expected.patch_positions).all(dim=-1).float().mean().item()
    difference = (actual.pooler_output.double() - expected.pooler_output.double()).norm().item()
    difference /= expected.pooler_output.double().norm().item()
    yield Finding(
        f"4 layers, {size} px, pruned, replayed on new pixels",
        f"{'bitwise equal' if is_equal else 'not bitwise equal'}, CLS differs by {difference:.1e}, places kept alike "
        f"{kept_alike:.2%}; {1000 * seconds:.2f} ms against {1000 * eager_seconds:.2f} ms eager",
        "CLS differs by 1e-2 at most",
        difference <= 1e-2,
        (
            {
                "size": size,
                "is_equal": is_equal,
                "cls_difference": difference,
                "seconds": seconds,
                "eager_seconds": eager_seconds,
            },
        ),
    )


def seconds_of(call: Callable[[], object], scale: Scale) -> float:
    """Mean seconds of a call among `scale.repeats` of them in a row."""
    wait(scale)
    start = time.perf_counter()
    for _ in range(scale.repeats):
        call()
    wait(scale)
    return (time.perf_counter() - start) / scale.repeats


def captured(
    model: SparsePathViTModel, pixel_values: torch.Tensor, scale: Scale
) -> tuple[Callable[[torch.Tensor], None], Callable[[], object]]:
    """A function that runs the model's graph on other pixels, and one that gives what it wrote."""
    if scale.is_rehearsal:
        results = [model(pixel_values)]
        return lambda pixels: results.__setitem__(0, model(pixels)), lambda: results[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            model(pixel_values)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = model(pixel_values)

    def replay(pixels: torch.Tensor) -> None:
        pixel_values.copy_(pixels)
        graph.replay()

    return replay, lambda: outputs


KERNELS = (
    "forward_kernel",
    "forward_reduce_kernel",
    "delta_kernel",
    "backward_query_kernel",
    "backward_key_value_kernel",
    "backward_reduce_kernel",
)


def num_compiled() -> dict[str, int]:
    """How many forms of each kernel this process has compiled or loaded; none where they are interpreted."""
    counts = {}
    for name in KERNELS:
        caches = getattr(getattr(launch, name), "device_caches", {})
        counts[name] = sum(len(cache[0]) for cache in caches.values())
    return counts


def compilations(scale: Scale) -> Iterator[Finding]:
    """Forms of each kernel over ten image sizes and two numbers of heads; one of each would do."""
    sides = [5 + 2 * index for index in range(10)] if scale.is_rehearsal else [10 + 27 * index for index in range(10)]
    before, seconds = num_compiled(), []
    for heads in (scale.heads, scale.heads // 4 or 1):
        for side in sides[:2] if scale.is_rehearsal else sides:
            case = AttentionCase(
                side * side, scale.windows[0], 1.0, heads, scale.head_dim, scale.dtype, scale.device, 3
            )
            grid = case.grid()
            states = [tensor[0].transpose(0, 1) for tensor in case.states(grid)]
            wait(scale)
            start = time.perf_counter()
            output, logsumexp = launch_block_attention(*states, attention_tiles(grid), 0.125)
            launch_block_attention_backward(output, *states, output, logsumexp, attention_tiles(grid), 0.125)
            wait(scale)
            seconds.append(time.perf_counter() - start)
    forms = {name: count - before[name] for name, count in num_compiled().items()}
    listed = ", ".join(f"{name.removesuffix('_kernel')} {count}" for name, count in forms.items())
    yield Finding(
        f"{len(seconds)} problems of {len(seconds) // 2} sizes, 2 numbers of heads",
        f"forms: {listed}; first call {seconds[0]:.1f} s, longest later {max(seconds[1:]):.2f} s",
        "1 form of each",
        max(forms.values()) <= 1,
        tuple({"kernel": name, "forms": count} for name, count in forms.items()),
    )
