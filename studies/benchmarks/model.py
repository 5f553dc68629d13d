# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Times whole forward passes, checked to be the same network first: ours, timm's and Transformers'.

The peers see the region dense, and as users see it today: as 224 px tiles, as many as the region's pixels fill, in the
batch that takes least time a tile.
"""

import copy
import dataclasses
import logging
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from sparsepath_vit.conversion import architecture, convert_checkpoint
from sparsepath_vit.conversion.mapping import plan_mapping
from sparsepath_vit.conversion.peers import timm_network, transformers_form
from sparsepath_vit.model.configuration_sparsepath_vit import SparsePathViTConfig
from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel
from sparsepath_vit.runtime.cost import forward_flops, mean_keys_per_query, token_grid_of_size
from sparsepath_vit.runtime.measure import (
    describe_run,
    describe_seconds,
    matrix_flops_per_second,
    measured,
    process_peak_bytes,
)

logger = logging.getLogger(__name__)

TILE_PEERS = ("tiles_timm", "tiles_transformers")
DENSE_PEERS = ("timm", "transformers", "dense")
PEERS = (*TILE_PEERS, *DENSE_PEERS, "sparse", "pruned", "stratified")
NUM_CONTEXT_TOKENS = 1024  # of the stratified peer: CLS is nearly that of dense attention
TILE_SIZE = 224  # pixels
TILE_BATCHES = {"cpu": (1, 2, 4, 8, 16), "cuda": (16, 64, 256)}
# Largest difference to timm, relative to the output's scale, that is still the same network in that dtype.
FLOAT32_TOLERANCE = 5e-5  # of 24 layers, as a norm
CHECKED_SIZE = 224
# Rows of the matrix product that stands for what the machine can do: enough for any of them, few enough for a CPU.
MATRIX_ROWS = 16384


@dataclasses.dataclass(frozen=True)
class ModelBenchmark:
    """What is run.

    Attributes:
        architecture: name of a known model; its weights are random.
        sizes: pixels of a square image.
        peers: of `PEERS`.
        dtype: of weights and pixels.
        device: where it runs.
        window_size: tokens per block side of ours.
        prune_ratio: of the pruned peer.
        repeats: timed runs of each; after one that is not timed, where there are several or it compiles.
        dense_up_to: pixels above which dense peers are left out.
        compiles: whether `torch.compile` runs all peers.
    """

    architecture: str
    sizes: tuple[int, ...]
    peers: tuple[str, ...]
    dtype: torch.dtype
    device: str
    window_size: int
    prune_ratio: float
    repeats: int
    dense_up_to: int
    compiles: bool


@dataclasses.dataclass
class Peer:
    """One thing to time: `run` takes (1, 3, height, width) and returns (1, tokens, width) features.

    A peer of tiles takes the region's pixels in its place, `tiles_per_batch` (T, 3, 224, 224) at a time.
    """

    name: str
    run: Callable[[torch.Tensor], torch.Tensor]
    config: SparsePathViTConfig
    tiles_per_batch: int = 0
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0
    peak_growth_bytes: int = 0


def benchmark_models(settings: ModelBenchmark) -> Iterator[list[dict[str, object]]]:
    """Checks, then times the peers at each size; they take turns, so that a drifting machine drifts for all.

    Yields:
        One row per peer, size by size.

    Raises:
        ValueError: an unknown peer, or one that is not the same network; it is not timed.
    """
    unknown = set(settings.peers) - set(PEERS)
    if unknown:
        raise ValueError(f"peers holds {', '.join(sorted(unknown))}: it takes {', '.join(PEERS)}.")
    all_peers = build_peers(settings)
    for size in settings.sizes:
        peers = [peer for peer in all_peers if peer.name not in DENSE_PEERS or size <= settings.dense_up_to]
        if not peers:
            logger.info("%s px is above dense_up_to=%s: no peer is left", size, settings.dense_up_to)
            continue
        pixel_values = torch.randn(1, 3, size, size, device=settings.device, dtype=settings.dtype)
        for peer in peers:
            peer.seconds, peer.peak_bytes, peer.peak_growth_bytes = [], 0, 0
        num_runs = settings.repeats + (settings.repeats > 1 or settings.compiles)
        with tqdm(total=num_runs * len(peers), desc=f"{size} px", unit="run", leave=False) as progress:
            for index in range(num_runs):
                for peer in peers:
                    progress.set_postfix_str(peer.name)
                    time_once(peer, pixel_values, settings.device, is_warm_up=index < num_runs - settings.repeats)
                    progress.update()
        yield _rows(settings, peers, size)


def time_once(peer: Peer, pixel_values: torch.Tensor, device: str, is_warm_up: bool) -> None:
    """One forward; growth counts from what was held before it."""
    held = torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss
    with torch.inference_mode(), measured(device) as measurement:
        peer.run(pixel_values)
    peer.peak_bytes = max(peer.peak_bytes, measurement.peak_bytes)
    peer.peak_growth_bytes = max(peer.peak_growth_bytes, measurement.peak_bytes - held)
    if not is_warm_up:
        peer.seconds.append(measurement.seconds)


def build_peers(settings: ModelBenchmark) -> list[Peer]:
    """The models, all of one shape; timm's weights are converted into ours and compared before anything is timed."""
    known = architecture(settings.architecture)
    config = known.build_config(window_size=settings.window_size, prune_ratio=0.0)
    pruned_config = known.build_config(window_size=settings.window_size, prune_ratio=settings.prune_ratio)
    stratified_config = copy.deepcopy(config)
    stratified_config.num_context_tokens = NUM_CONTEXT_TOKENS
    dense_config = known.build_config(window_size=None, prune_ratio=0.0)
    logger.info("building %s in %s", known.title, settings.dtype)
    runs = {}
    if {"timm", "tiles_timm"} & set(settings.peers):
        network = random_timm_network(config, settings.dtype)
        ours = converted(network, config)
        check_against_timm(ours, network, dense_config)
        runs["timm"] = _compiled(network.to(settings.device).forward_features, settings)
    else:
        # The runs change the model's config; the peers' own must stay what they say.
        ours = random_weights(SparsePathViTModel, copy.deepcopy(config), settings.dtype)
    if {"transformers", "tiles_transformers"} & set(settings.peers):
        model_class, peer_config = transformers_form(config, is_vit=False)
        peer = random_weights(model_class, peer_config, settings.dtype).to(settings.device)
        runs["transformers"] = _features_of(_compiled(peer, settings))
    features_of_ours = _features_of(_compiled(ours.to(settings.device), settings))

    def run_ours(variant: SparsePathViTConfig) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(pixel_values: torch.Tensor) -> torch.Tensor:
            for name in ("window_size", "prune_ratio", "num_context_tokens"):
                setattr(ours.config, name, getattr(variant, name))
            return features_of_ours(pixel_values)

        return run

    variants = {"dense": dense_config, "sparse": config, "pruned": pruned_config, "stratified": stratified_config}
    peers = {
        **{name: Peer(name, run_ours(variant), variant) for name, variant in variants.items()},
        **{name: Peer(name, run, dense_config) for name, run in runs.items()},
        **{f"tiles_{name}": Peer(f"tiles_{name}", run, dense_config) for name, run in runs.items()},
    }
    for name in set(TILE_PEERS) & set(settings.peers):
        peers[name] = of_tiles(peers[name], settings)
    return [peers[name] for name in settings.peers]


def number_of_tiles(size: int) -> int:
    """How many 224 px tiles hold as many pixels as a square region of `size` px."""
    return max(1, round((size / TILE_SIZE) ** 2))


def of_tiles(peer: Peer, settings: ModelBenchmark) -> Peer:
    """`peer` on tiles, in the batch size of `TILE_BATCHES` that takes least time a tile."""
    batches = TILE_BATCHES[torch.device(settings.device).type]
    tiles = torch.randn(max(batches), 3, TILE_SIZE, TILE_SIZE, device=settings.device, dtype=settings.dtype)

    def seconds_per_tile(batch_size: int) -> float:
        with torch.inference_mode(), measured(settings.device) as measurement:
            peer.run(tiles[:batch_size])
        return measurement.seconds / batch_size

    seconds_per_tile(batches[0])  # what is made once, such as compiled code
    fastest = min(batches, key=seconds_per_tile)

    def run(pixel_values: torch.Tensor) -> torch.Tensor:
        count = number_of_tiles(pixel_values.shape[-1])
        for start in range(0, count, fastest):
            features = peer.run(tiles[: min(fastest, count - start)])
        return features

    return Peer(peer.name, run, peer.config, tiles_per_batch=fastest)


def _compiled(run: Callable, settings: ModelBenchmark) -> Callable:
    return torch.compile(run) if settings.compiles else run


def _features_of(model: Callable) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda pixel_values: model(pixel_values).last_hidden_state


def random_weights(
    model_class: type, config: object, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> nn.Module:
    """A model with random weights, made in its final dtype without the slow initialisation."""
    with torch.device("meta"):
        model = model_class(config)
    model = model.to(dtype).to_empty(device=device).eval()
    return draw_weights(model)


@torch.no_grad()
def draw_weights(model: nn.Module) -> nn.Module:
    """Weights large enough that attention is not uniform and residual branches count."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape, device=device)
        is_scale = parameter.ndim == 1 and (
            ("norm" in name and "weight" in name) or "gamma" in name or "lambda" in name
        )
        values.normal_(1.0 if is_scale else 0.0, 0.1 if is_scale else 0.04, generator=generator)
        parameter.copy_(values)
    return model


def random_timm_network(
    config: SparsePathViTConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> nn.Module:
    """timm's VisionTransformer of that shape with random weights."""
    return draw_weights(timm_network(config).to(dtype).to_empty(device=device).eval())


def sharing_weights(network: nn.Module, config: SparsePathViTConfig) -> SparsePathViTModel:
    """Our model on timm's very tensors, on the device where they are."""
    tensors = network.state_dict()
    plan = plan_mapping({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    with torch.device("meta"):
        ours = SparsePathViTModel(config)
    # timm's own names need no stacking: one tensor becomes one parameter.
    ours.load_state_dict({target: tensors[name] for target, (name,) in plan.sources.items()}, assign=True)
    return ours.eval()


def converted(network: nn.Module, config: SparsePathViTConfig) -> SparsePathViTModel:
    """Our model with timm's weights, through the conversion that users run."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "timm.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, source)
        overrides = {"num_attention_heads": config.num_attention_heads, "window_size": config.window_size}
        convert_checkpoint(source, Path(folder) / "ours", layer_norm_eps=config.layer_norm_eps, **overrides)
        return SparsePathViTModel.from_pretrained(Path(folder) / "ours", dtype="auto").eval()


@torch.inference_mode()
def check_against_timm(ours: SparsePathViTModel, network: nn.Module, dense: SparsePathViTConfig) -> None:
    """Raises a ValueError where ours is not the same network as timm's, dense and (one neighbourhood) sparse.

    Copies in float32 are compared: in 16 bits both are some per cent off after 24 layers, each in its own way.
    """
    ours, network = copy.deepcopy(ours).float(), copy.deepcopy(network).float()
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(1, 3, CHECKED_SIZE, CHECKED_SIZE, generator=generator).to(ours.device)
    expected = network.forward_features(pixel_values)
    half_the_grid = -(-CHECKED_SIZE // dense.patch_size // 2)  # 2 x 2 blocks are one neighbourhood: sparse is dense
    for window_size in (None, half_the_grid):
        ours.config.window_size = window_size
        difference = (ours(pixel_values).last_hidden_state - expected).norm() / expected.norm()
        logger.info("check against timm, window_size=%s: relative difference %.1e", window_size, difference)
        if not difference <= FLOAT32_TOLERANCE:
            raise ValueError(f"ours differs from timm by {difference:.1e}, more than {FLOAT32_TOLERANCE}: not timed.")


def _rows(settings: ModelBenchmark, peers: list[Peer], size: int) -> list[dict[str, object]]:
    """One row per model."""
    dense_seconds = [statistics.median(peer.seconds) for peer in peers if peer.name in ("timm", "transformers")]
    config = peers[0].config
    flops_per_second = matrix_flops_per_second(
        MATRIX_ROWS, config.hidden_size, config.intermediate_size, settings.dtype, settings.device
    )
    tile_seconds = [statistics.median(peer.seconds) for peer in peers if peer.tiles_per_batch]
    rows = []
    for peer in peers:
        median = statistics.median(peer.seconds)
        num_images = number_of_tiles(size) if peer.tiles_per_batch else 1
        side = TILE_SIZE if peer.tiles_per_batch else size
        grid = token_grid_of_size(peer.config, side, side)
        flops = num_images * forward_flops(peer.config, grid)
        process_peak = peer.peak_bytes if settings.device == "cuda" else process_peak_bytes()
        rows.append(
            {
                "architecture": settings.architecture,
                "size": size,
                "dtype": str(settings.dtype).removeprefix("torch."),
                "model": peer.name,
                "window_size": peer.config.window_size or "",
                "prune_ratio": peer.config.prune_ratio,
                "tokens": num_images * grid.num_tokens,
                "keys_per_query": round(mean_keys_per_query(grid), 1),
                "tflop": float(f"{flops / 1e12:.6g}"),
                "compiled": settings.compiles,
                **describe_seconds(peer.seconds),
                "speedup_over_fastest_dense_peer": round(min(dense_seconds) / median, 2) if dense_seconds else "",
                "times_tiles": round(median / min(tile_seconds), 3) if tile_seconds else "",
                "tiles_per_batch": peer.tiles_per_batch or "",
                "matrix_tflop_per_second": float(f"{flops_per_second / 1e12:.4g}"),
                "share_of_matrix_floor": round(flops / flops_per_second / median, 3),
                "peak_growth_gib": round(peer.peak_growth_bytes / 2**30, 3),
                "process_peak_gib": round(process_peak / 2**30, 3),
                **describe_run(settings.device),
            }
        )
    return rows
