#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Benchmarks: ours against timm and Transformers dense, in one run on one machine.

`model` times whole forward passes, `attention` the attention alone. Everything is checked before it is timed, models
take turns so that a drifting machine drifts for all, and each row of the CSV carries commit, versions and machine.

Examples:
    python scripts/benchmark.py model
    python scripts/benchmark.py model --architecture uni2-h --sizes 1400 --repeats 1 --peers timm,sparse,pruned
    python scripts/benchmark.py model --architecture uni2-h --sizes 3430 --repeats 1 --peers pruned
    python scripts/benchmark.py attention --tokens 2500,10000 --windows 8,64
"""

import argparse
import copy
import csv
import dataclasses
import logging
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from sparsepath_vit import SparsePathViTConfig, SparsePathViTModel
from sparsepath_vit.analysis.benchmark_attention import CONTENDERS, AttentionCase, time_case
from sparsepath_vit.analysis.cost import forward_flops, mean_keys_per_query, token_grid_of_size
from sparsepath_vit.analysis.measure import describe_run, measured
from sparsepath_vit.conversion import architecture, convert_checkpoint
from sparsepath_vit.conversion.peers import timm_network, transformers_form

logger = logging.getLogger("benchmark")

PEERS = ("timm", "transformers", "dense", "sparse", "pruned")
# Largest difference to timm, relative to the output's scale, that is still the same network in that dtype.
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
CHECKED_SIZE = 224


@dataclasses.dataclass
class Peer:
    """One thing to time: `run` takes (1, 3, height, width) and returns (1, tokens, width) features."""

    name: str
    run: Callable[[torch.Tensor], torch.Tensor]
    config: SparsePathViTConfig
    seconds: list[float] = dataclasses.field(default_factory=list)
    peak_growth_bytes: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="whole forward passes", formatter_class=parser.formatter_class)
    model.add_argument("--architecture", default="vit-small-14-reg8", help="known model, random weights")
    model.add_argument("--sizes", default="224,448,896,1400", help="pixels of a square image, comma separated")
    model.add_argument("--peers", default=",".join(PEERS), help=f"of {', '.join(PEERS)}; comma separated")
    model.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    model.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    model.add_argument("--window-size", type=int, default=8)
    model.add_argument("--prune-ratio", type=float, default=0.6)
    model.add_argument("--repeats", type=int, default=5, help="timed runs of each model; the median counts")
    model.add_argument("--threads", type=int, default=None, help="CPU threads; torch's choice by default")
    model.add_argument("--output", type=Path, default=Path("model_card/results/benchmark_model.csv"))
    model.set_defaults(run=benchmark_models)
    attention = commands.add_parser("attention", help="attention alone", formatter_class=parser.formatter_class)
    attention.add_argument("--tokens", default="2500,10000,60025", help="patch tokens of a square grid")
    attention.add_argument("--windows", default="8,16,64", help="tokens per block side")
    attention.add_argument("--kept", default="1.0,0.4", help="shares of tokens kept; below 1 at random")
    attention.add_argument("--contenders", default="block_sparse,sdpa_dense", help=f"of {', '.join(CONTENDERS)}")
    attention.add_argument("--heads", type=int, default=24)
    attention.add_argument("--head-dim", type=int, default=64)
    attention.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    attention.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    attention.add_argument("--backward", action="store_true", help="time forward and backward together, too")
    attention.add_argument("--repeats", type=int, default=5)
    attention.add_argument("--threads", type=int, default=None, help="CPU threads; torch's choice by default")
    attention.add_argument("--output", type=Path, default=Path("model_card/results/benchmark_attention.csv"))
    attention.set_defaults(run=benchmark_attention)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.run(arguments)


def benchmark_attention(arguments: argparse.Namespace) -> None:
    """Checks, times and records the chosen attentions on each problem."""
    names = arguments.contenders.split(",")
    unknown = set(names) - set(CONTENDERS)
    if unknown:
        raise SystemExit(f"--contenders {', '.join(sorted(unknown))} unknown: choose from {', '.join(CONTENDERS)}.")
    for tokens in map(int, arguments.tokens.split(",")):
        for window_size in map(int, arguments.windows.split(",")):
            for kept_share in map(float, arguments.kept.split(",")):
                case = AttentionCase(
                    tokens=tokens,
                    window_size=window_size,
                    kept_share=kept_share,
                    heads=arguments.heads,
                    head_dim=arguments.head_dim,
                    dtype=getattr(torch, arguments.dtype),
                    device=arguments.device,
                )
                rows = time_case(case, names, arguments.repeats, arguments.backward)
                for row in rows:
                    logger.info(
                        "%9d tokens  w = %3d  %3.0f%% kept  %-14s %-16s %10.2f ms  %8.4f TFLOP/s",
                        row["tokens"],
                        window_size,
                        100 * kept_share,
                        row["attention"],
                        row["direction"],
                        1000 * row["seconds_median"],
                        row["useful_tflop_per_second"],
                    )
                append_rows(arguments.output, rows)


def benchmark_models(arguments: argparse.Namespace) -> None:
    """Checks, times and records the chosen models at each size."""
    dtype = getattr(torch, arguments.dtype)
    names = arguments.peers.split(",")
    unknown = set(names) - set(PEERS)
    if unknown:
        raise SystemExit(f"--peers {', '.join(sorted(unknown))} unknown: choose from {', '.join(PEERS)}.")
    peers = build_peers(arguments, names, dtype)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    with tqdm(total=len(sizes) * len(peers) * (arguments.repeats + 1), unit="run") as progress:
        for size in sizes:
            for peer in peers:
                peer.seconds, peer.peak_growth_bytes = [], 0
            pixel_values = torch.randn(1, 3, size, size, device=arguments.device, dtype=dtype)
            for repeat in range(arguments.repeats + 1):
                for peer in peers:
                    progress.set_postfix_str(f"{size} px {peer.name}")
                    is_warm_up = repeat == 0 and arguments.repeats > 1
                    if repeat > 0 or is_warm_up:
                        time_once(peer, pixel_values, arguments.device, is_warm_up)
                    progress.update()
            record(peers, size, arguments)


def time_once(peer: Peer, pixel_values: torch.Tensor, device: str, is_warm_up: bool) -> None:
    """One forward; memory counts from what the process held before it."""
    held = torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss
    with torch.inference_mode(), measured(device) as measurement:
        peer.run(pixel_values)
    peer.peak_growth_bytes = max(peer.peak_growth_bytes, measurement.peak_bytes - held)
    if not is_warm_up:
        peer.seconds.append(measurement.seconds)


def build_peers(arguments: argparse.Namespace, names: list[str], dtype: torch.dtype) -> list[Peer]:
    """The models, all of one shape; timm's weights are converted into ours and compared before anything is timed."""
    known = architecture(arguments.architecture)
    config = known.build_config(window_size=arguments.window_size, prune_ratio=0.0)
    pruned_config = known.build_config(window_size=arguments.window_size, prune_ratio=arguments.prune_ratio)
    dense_config = known.build_config(window_size=None, prune_ratio=0.0)
    logger.info("building %s in %s", known.title, dtype)
    if "timm" in names:
        network = random_timm_network(config, dtype)
        ours = converted(network, config)
        check_against_timm(ours, network, dense_config)
        network = network.to(arguments.device)
    else:
        # The runs change the model's config; the peers' own must stay what they say.
        network, ours = None, random_weights(SparsePathViTModel, copy.deepcopy(config), dtype)
    ours = ours.to(arguments.device)

    def run_ours(variant: SparsePathViTConfig) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(pixel_values: torch.Tensor) -> torch.Tensor:
            ours.config.window_size, ours.config.prune_ratio = variant.window_size, variant.prune_ratio
            return ours(pixel_values).last_hidden_state

        return run

    runs = {
        "dense": Peer("dense", run_ours(dense_config), dense_config),
        "sparse": Peer("sparse", run_ours(config), config),
        "pruned": Peer("pruned", run_ours(pruned_config), pruned_config),
    }
    if network is not None:
        runs["timm"] = Peer("timm", network.forward_features, dense_config)
    if "transformers" in names:
        model_class, peer_config = transformers_form(config, is_vit=False)
        peer = random_weights(model_class, peer_config, dtype).to(arguments.device)
        runs["transformers"] = Peer("transformers", lambda pixels: peer(pixels).last_hidden_state, dense_config)
    return [runs[name] for name in names]


def random_weights(model_class: type, config: object, dtype: torch.dtype) -> torch.nn.Module:
    """A model with random weights, made in its final dtype without the slow initialisation."""
    with torch.device("meta"):
        model = model_class(config)
    model = model.to(dtype).to_empty(device="cpu").eval()
    return draw_weights(model)


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that attention is not uniform and residual branches count."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        values = torch.empty(parameter.shape)
        is_scale = parameter.ndim == 1 and (
            ("norm" in name and "weight" in name) or "gamma" in name or "lambda" in name
        )
        values.normal_(1.0 if is_scale else 0.0, 0.1 if is_scale else 0.04, generator=generator)
        parameter.copy_(values)
    return model


def random_timm_network(config: SparsePathViTConfig, dtype: torch.dtype) -> torch.nn.Module:
    """timm's VisionTransformer of that shape with random weights."""
    return draw_weights(timm_network(config).to(dtype).to_empty(device="cpu").eval())


def converted(network: torch.nn.Module, config: SparsePathViTConfig) -> SparsePathViTModel:
    """Our model with timm's weights, through the conversion that users run."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "timm.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, source)
        overrides = {"num_attention_heads": config.num_attention_heads, "window_size": config.window_size}
        convert_checkpoint(source, Path(folder) / "ours", layer_norm_eps=config.layer_norm_eps, **overrides)
        return SparsePathViTModel.from_pretrained(Path(folder) / "ours", dtype="auto").eval()


def check_against_timm(ours: SparsePathViTModel, network: torch.nn.Module, dense: SparsePathViTConfig) -> None:
    """Raises SystemExit where ours is not the same network as timm's, dense and (one neighbourhood) sparse."""
    dtype = ours.dtype
    pixel_values = torch.randn(1, 3, CHECKED_SIZE, CHECKED_SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        expected = network.forward_features(pixel_values).float()
        half_the_grid = -(-CHECKED_SIZE // dense.patch_size // 2)  # 2 x 2 blocks are one neighbourhood: sparse is dense
        for window_size in (None, half_the_grid):
            ours.config.window_size = window_size
            difference = (ours(pixel_values).last_hidden_state.float() - expected).abs().max() / expected.abs().max()
            logger.info("check against timm, window_size=%s: relative difference %.1e", window_size, difference)
            if not difference <= TOLERANCES[dtype]:
                raise SystemExit(f"not timed: differs from timm by {difference:.1e}, more than {TOLERANCES[dtype]}.")


def record(peers: list[Peer], size: int, arguments: argparse.Namespace) -> None:
    """Appends one row per model to the CSV and logs them."""
    dense_seconds = [statistics.median(peer.seconds) for peer in peers if peer.name in ("timm", "transformers")]
    rows = []
    for peer in peers:
        median = statistics.median(peer.seconds)
        quartiles = statistics.quantiles(peer.seconds, n=4) if len(peer.seconds) > 1 else [median] * 3
        grid = token_grid_of_size(peer.config, size, size)
        rows.append(
            {
                "architecture": arguments.architecture,
                "size": size,
                "dtype": arguments.dtype,
                "model": peer.name,
                "window_size": peer.config.window_size or "",
                "prune_ratio": peer.config.prune_ratio,
                "tokens": grid.num_tokens,
                "keys_per_query": round(mean_keys_per_query(grid), 1),
                "tflop": float(f"{forward_flops(peer.config, grid) / 1e12:.6g}"),
                "seconds_median": round(median, 4),
                "seconds_lower_quartile": round(quartiles[0], 4),
                "seconds_upper_quartile": round(quartiles[2], 4),
                "repeats": len(peer.seconds),
                "speedup_over_fastest_dense_peer": round(min(dense_seconds) / median, 2) if dense_seconds else "",
                "peak_growth_gib": round(peer.peak_growth_bytes / 2**30, 3),
                "process_peak_gib": round(process_peak_bytes() / 2**30, 3),
                **describe_run(arguments.device),
            }
        )
        logger.info(
            "%5d px  %-12s  %8.2f s  %s  +%.2f GiB",
            size,
            peer.name,
            median,
            f"{rows[-1]['speedup_over_fastest_dense_peer']:>6} x" if dense_seconds else "",
            peer.peak_growth_bytes / 2**30,
        )
    append_rows(arguments.output, rows)


def process_peak_bytes() -> int:
    """Largest resident size of this process so far, everything included."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def append_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """Adds rows to a CSV; the file is replaced as a whole, so that it is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    earlier = []
    if path.exists():
        with path.open(newline="") as file:
            earlier = list(csv.DictReader(file))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows([*earlier, *rows])
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
