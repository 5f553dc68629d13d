# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Steps of the acceptance that time: the machine, whole models beside tiles, and one layer's kernels."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import triton
from torch import nn

from sparsepath_vit.conversion import architecture
from sparsepath_vit.model.configuration_sparsepath_vit import SparsePathViTConfig
from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel
from sparsepath_vit.model.token_grid import TokenGrid
from sparsepath_vit.runtime.cost import forward_flops, token_grid_of_size
from sparsepath_vit.runtime.measure import describe_run, describe_seconds, measured, repeatedly_measured

from .acceptance import Finding, Scale, finding_of, matrix_rate, wait
from .model import TILE_SIZE, check_against_timm, number_of_tiles, random_timm_network, sharing_weights

DENSE_UP_TO = 3430  # pixels; above, dense attention takes many seconds
LARGE_WINDOW_UP_TO = 6860
LEAST_SHARE_OF_MODEL = 0.5  # of the rate of a large matrix product
LONG_SECONDS = 1.0
PROFILED_KERNELS = 25
COMPILED_SIZES = (1400, 3430)


def environment(scale: Scale) -> Iterator[Finding]:
    """What the machine is and can do."""
    row: dict[str, object] = {**describe_run(scale.device), "triton": triton.__version__}
    if scale.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        row["multiprocessors"] = properties.multi_processor_count
        row["memory_gib"] = round(properties.total_memory / 2**30, 1)
        row["capability"] = f"{properties.major}.{properties.minor}"
        row["cuda"] = torch.version.cuda
    source = torch.randn(scale.copied_bytes // 4, device=scale.device)
    target = torch.empty_like(source)
    seconds, _ = repeatedly_measured(lambda: target.copy_(source), scale.device, scale.repeats)
    row["copy_terabytes_per_second"] = round(2 * scale.copied_bytes / statistics.median(seconds) / 1e12, 4)
    row["matrix_tflop_per_second"] = round(matrix_rate(scale) / 1e12, 3)
    yield Finding("machine", f"{row['machine']}, torch {row['torch']}, triton {row['triton']}", rows=(row,))
    yield Finding("copy, read and written", f"{row['copy_terabytes_per_second']} TB/s")
    yield Finding(f"matrix product of {scale.matrix_size}", f"{row['matrix_tflop_per_second']} TFLOP/s")


@dataclasses.dataclass
class Networks:
    """timm's network and ours on the same tensors.

    Attributes:
        name: of the architecture.
        timm: takes pixels of any size and batches of tiles.
        ours: window size and pruning are set through its config.
    """

    name: str
    timm: nn.Module
    ours: SparsePathViTModel

    def config(self, window_size: int | None, prune_ratio: float) -> SparsePathViTConfig:
        """The config of one variant."""
        layers = self.ours.config.num_hidden_layers
        return architecture(self.name).build_config(
            window_size=window_size,
            prune_ratio=prune_ratio,
            num_hidden_layers=layers,
            prune_after_layer=min(4, layers - 1),
        )

    def become(self, config: SparsePathViTConfig) -> None:
        """Makes ours that variant; a dense one uses torch's attention."""
        self.ours.config.window_size, self.ours.config.prune_ratio = config.window_size, config.prune_ratio
        self.ours.config.prune_after_layer = config.prune_after_layer
        self.ours.set_attn_implementation("sdpa" if config.window_size is None else "block_sparse")


def build_networks(name: str, scale: Scale) -> Networks:
    """timm's network and ours, random weights on the device."""
    layers = {} if scale.layers is None else {"num_hidden_layers": scale.layers, "prune_after_layer": 1}
    config = architecture(name).build_config(window_size=None, prune_ratio=0.0, **layers)
    network = random_timm_network(config, scale.dtype, scale.device)
    return Networks(name, network, sharing_weights(network, config))


def _parity_finding(networks: Networks, scale: Scale) -> Finding:
    """Whether both are one network on this device, dense and sparse."""
    title = f"{networks.name}, against timm"

    def measure() -> Finding:
        check_against_timm(networks.ours, networks.timm, networks.config(None, 0.0))
        return Finding(title, "the same features", "the same features", True)

    return finding_of(title, measure, scale)


def timed(call: Callable[[], object], scale: Scale) -> tuple[list[float], int]:
    """Seconds of one call, `repeats` times, and the peak memory; long work is called once a measurement."""
    with torch.inference_mode():
        with measured(scale.device) as warm_up:
            call()
        if warm_up.seconds < 2 * LONG_SECONDS:
            return repeatedly_measured(call, scale.device, scale.repeats)
        seconds, peak = [], 0
        for _ in range(scale.repeats):
            with measured(scale.device) as measurement:
                call()
            seconds.append(measurement.seconds)
            peak = max(peak, measurement.peak_bytes)
        return seconds, peak


def model(scale: Scale) -> Iterator[Finding]:
    """Whole forward passes of the first architecture, and what users do today: the same pixels as tiles."""
    yield from _models(scale.architectures[:1], scale)


def other_models(scale: Scale) -> Iterator[Finding]:
    """The same of the other architectures."""
    yield from _models(scale.architectures[1:], scale)


def _models(architectures: tuple[str, ...], scale: Scale) -> Iterator[Finding]:
    for name in architectures:
        networks = build_networks(name, scale)
        yield _parity_finding(networks, scale)
        batch_size, finding = fastest_batch(networks, scale)
        yield finding
        for size in scale.sizes:
            yield from _models_of_size(networks, size, batch_size, scale)
        del networks
        if scale.device == "cuda":
            torch.cuda.empty_cache()


def fastest_batch(networks: Networks, scale: Scale) -> tuple[int, Finding]:
    """The number of tiles of a batch with which timm takes least time a tile."""
    rates = {}
    for batch_size in scale.tile_batches:
        pixels = torch.randn(batch_size, 3, TILE_SIZE, TILE_SIZE, device=scale.device, dtype=scale.dtype)
        seconds, _ = timed(lambda pixels=pixels: networks.timm.forward_features(pixels), scale)
        rates[batch_size] = batch_size / statistics.median(seconds)
    listed = ", ".join(f"{batch_size}: {rate:.0f}" for batch_size, rate in rates.items())
    return max(rates, key=rates.get), Finding(f"{networks.name}, tiles a second by batch", listed)


def _models_of_size(networks: Networks, size: int, batch_size: int, scale: Scale) -> Iterator[Finding]:
    """All variants at one size."""
    window = scale.windows[0]
    pixels = torch.randn(1, 3, size, size, device=scale.device, dtype=scale.dtype)
    variants = {"pruned": networks.config(window, 0.6), "sparse": networks.config(window, 0.0)}
    if size <= LARGE_WINDOW_UP_TO:
        variants["large window"] = networks.config(8 * window, 0.0)
    dense = networks.config(None, 0.0)
    if size <= DENSE_UP_TO:
        variants["dense"] = dense
    tiles = _tiles_finding(networks, size, batch_size, scale)
    yield tiles
    tile_seconds = tiles.rows[0]["seconds_median"] if tiles.rows else math.nan
    for name, config in variants.items():

        def measure(name: str = name, config: SparsePathViTConfig = config) -> Finding:
            networks.become(config)
            return model_finding(networks, name, size, config, lambda: networks.ours(pixels), scale, tile_seconds)

        yield finding_of(f"{networks.name}, {size} px, {name}", measure, scale)
    if size <= DENSE_UP_TO:
        yield finding_of(
            f"{networks.name}, {size} px, timm",
            lambda: model_finding(
                networks, "timm", size, dense, lambda: networks.timm.forward_features(pixels), scale, tile_seconds
            ),
            scale,
        )


def _tiles_finding(networks: Networks, size: int, batch_size: int, scale: Scale) -> Finding:
    """As many tiles as the region's pixels fill, through timm."""
    num_tiles = number_of_tiles(size)
    tiles = torch.randn(min(batch_size, num_tiles), 3, TILE_SIZE, TILE_SIZE, device=scale.device, dtype=scale.dtype)

    def run() -> None:
        for start in range(0, num_tiles, batch_size):
            networks.timm.forward_features(tiles[: num_tiles - start])

    config = networks.config(None, 0.0)
    flops = num_tiles * forward_flops(config, token_grid_of_size(config, TILE_SIZE, TILE_SIZE))
    return finding_of(
        f"{networks.name}, {size} px, tiles",
        lambda: model_finding(networks, "tiles", size, config, run, scale, math.nan, flops),
        scale,
    )


def model_finding(
    networks: Networks,
    name: str,
    size: int,
    config: SparsePathViTConfig,
    run: Callable[[], object],
    scale: Scale,
    tile_seconds: float,
    flops: float | None = None,
) -> Finding:
    """One variant at one size; pruned ones have to take less time than tiles.

    Args:
        networks: what is timed.
        name: of the variant.
        size: pixels of the square region.
        config: of the variant, for its arithmetic.
        run: one forward.
        scale: how often.
        tile_seconds: of the same pixels as tiles; NaN where they were not timed.
        flops: of `run`, where the config does not say.
    """
    seconds, peak = timed(run, scale)
    median = statistics.median(seconds)
    grid = token_grid_of_size(config, size, size)
    flops = forward_flops(config, grid) if flops is None else flops
    row = {
        "architecture": networks.name,
        "size": size,
        "model": name,
        "window_size": config.window_size or "",
        "prune_ratio": config.prune_ratio,
        "tokens": grid.num_tokens,
        "dtype": str(scale.dtype).removeprefix("torch."),
        "tflop": float(f"{flops / 1e12:.5g}"),
        **describe_seconds(seconds),
        "share_of_matrix_floor": round(flops / matrix_rate(scale) / median, 3),
        "times_tiles": round(median / tile_seconds, 3) if tile_seconds > 0 else "",
        "peak_gib": round(peak / 2**30, 2),
        **describe_run(scale.device),
    }
    text = f"{1000 * median:.2f} ms, {row['share_of_matrix_floor']:.0%} of the floor, {row['peak_gib']} GiB"
    if row["times_tiles"]:
        text += f", {row['times_tiles']} x tiles"
    target, passed = model_target(name, row)
    return Finding(f"{networks.name}, {size} px, {name}", text, target, passed, (row,))


def model_target(name: str, row: dict[str, object]) -> tuple[str, bool | None]:
    """What a variant is asked for, and whether it gives it: nothing of small images, which are launches only."""
    if row["size"] >= 1400 and name == "sparse":
        return f"{LEAST_SHARE_OF_MODEL:.0%} of the floor", row["share_of_matrix_floor"] >= LEAST_SHARE_OF_MODEL
    if row["size"] >= 1400 and name == "pruned" and row["times_tiles"]:
        return "less than tiles", row["times_tiles"] < 1.0
    return "", None


def compiled_model(scale: Scale) -> Iterator[Finding]:
    """The same through torch.compile."""
    networks = build_networks(scale.architectures[0], scale)
    for name, prune_ratio in (("sparse", 0.0), ("pruned", 0.6)):
        config = networks.config(scale.windows[0], prune_ratio)
        networks.become(config)
        torch.compiler.reset()
        compiled = torch.compile(networks.ours, backend="eager" if scale.is_rehearsal else "inductor")
        for size in (56,) if scale.is_rehearsal else COMPILED_SIZES:
            title = f"{networks.name}, {size} px, {name}, compiled"

            def measure(name: str = name, size: int = size, config: object = config, run: object = compiled) -> Finding:
                pixels = torch.randn(1, 3, size, size, device=scale.device, dtype=scale.dtype)
                start = time.perf_counter()
                with torch.inference_mode():
                    run(pixels)
                    wait(scale)
                compile_seconds = time.perf_counter() - start
                finding = model_finding(
                    networks, f"{name}, compiled", size, config, lambda: run(pixels), scale, math.nan
                )
                text = f"{finding.measured}; first call {compile_seconds:.0f} s"
                return dataclasses.replace(finding, measured=text)

            yield finding_of(title, measure, scale)


def profile(scale: Scale) -> Iterator[Finding]:
    """Kernels of one layer, the longest first."""
    config = architecture(scale.architectures[0]).build_config(
        window_size=scale.windows[0], num_hidden_layers=1, prune_ratio=0.0
    )
    layer = _random_layer(config, scale)
    grid = token_grid_of_size(config, *[min(scale.sizes[-1], 3430)] * 2).to(scale.device)
    tokens = torch.randn(*grid.batch_shape, config.hidden_size, device=scale.device, dtype=scale.dtype)
    rows = profiled_kernels(layer, tokens, grid, scale)
    total = sum(row["milliseconds"] for row in rows)
    width = max(len(row["kernel"][:90]) for row in rows)
    for row in rows[:PROFILED_KERNELS]:
        print(f"{row['kernel'][:90]:{width}}  {row['milliseconds']:9.3f} ms  {row['calls']:5} calls")
    attention = sum(row["milliseconds"] for row in rows if "forward_kernel" in row["kernel"])
    yield Finding(
        f"one layer, {grid.num_tokens:,} tokens",
        f"{total:.2f} ms in {sum(row['calls'] for row in rows)} kernels, attention {attention:.2f} ms; longest: "
        + ", ".join(f"{row['kernel'][:40]} {row['milliseconds']:.2f}" for row in rows[:4]),
        rows=tuple(rows[:PROFILED_KERNELS]),
    )


def _random_layer(config: SparsePathViTConfig, scale: Scale) -> nn.Module:
    network = random_timm_network(config, scale.dtype, scale.device)
    return sharing_weights(network, config).encoder.layers[0]


@torch.inference_mode()
def profiled_kernels(layer: nn.Module, tokens: torch.Tensor, grid: TokenGrid, scale: Scale) -> list[dict[str, object]]:
    """Kernels of a layer on some tokens, milliseconds of one run and calls, the longest first."""
    layer(tokens, grid)
    layer(tokens, grid)
    wait(scale)
    kind = torch.autograd.DeviceType.CUDA if scale.device == "cuda" else torch.autograd.DeviceType.CPU
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if scale.device == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(scale.repeats):
            layer(tokens, grid)
        wait(scale)
    field = "self_device_time_total" if scale.device == "cuda" else "self_cpu_time_total"
    rows = [
        {
            "kernel": event.key,
            "milliseconds": round(getattr(event, field) / 1000 / scale.repeats, 4),
            "calls": event.count // scale.repeats,
        }
        for event in profiler.key_averages()
        if event.device_type == kind and getattr(event, field) > 0
    ]
    return sorted(rows, key=lambda row: -row["milliseconds"])
