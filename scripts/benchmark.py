#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""Benchmarks: ours against timm and Transformers, dense and on 224 px tiles, in one run on one machine.

`model` times whole forward passes, `attention` the attention alone; `memory` takes the peak of a forward; `quantised`
says how far int8 and float8 weights of torchao are from the checkpoint, and how fast. What is timed is checked before,
models take turns so that a drifting machine drifts for all, and each row of the CSV carries commit, versions and
machine.

Examples:
    python scripts/benchmark.py model
    python scripts/benchmark.py model --architecture uni2-h --sizes 1400 --repeats 1 --peers tiles_timm,sparse,pruned
    python scripts/benchmark.py model --architecture uni2-h --sizes 3430 --repeats 1 --peers pruned
    python scripts/benchmark.py attention --tokens 2500,10000 --windows 8,64
    python scripts/benchmark.py memory --architecture uni2-h --layers 3 --sizes 13720 --prune-after-layer 1
    python scripts/benchmark.py quantised --checkpoint ./uni2-h --image region.png --sizes 896
    python scripts/benchmark.py memory --sizes 6860 --processes 1,2
    python scripts/benchmark.py memory --layers 3 --sizes 3430 --prune-ratios 0 --context-tokens 0,1024

On a GPU:
    python scripts/benchmark.py model --architecture uni2-h --sizes 224,448,896,1400,3430,6860,13720 --compile
    python scripts/benchmark.py attention --tokens 2500,10000,60025,240100,1000000 --windows 8,16,64 --backward \
        --peers block_sparse,sdpa_dense,flex_attention,natten,reference
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

from sparsepath_vit.checkpoints import tiny_checkpoint
from sparsepath_vit.runtime.compute import torch_device
from sparsepath_vit.runtime.extras import ScriptParser, comma_separated, run_script

sys.path.insert(0, str(Path(__file__).parents[1]))  # `studies` lies beside this folder and is not installed

from studies.benchmarks import attention_peers
from studies.benchmarks import model as benchmark_model
from studies.benchmarks.attention import DIRECTIONS, AttentionCase, time_case
from studies.benchmarks.memory import MemoryCase, measure_memory
from studies.benchmarks.model import ModelBenchmark
from studies.benchmarks.quantised import KINDS, QuantisedBenchmark, benchmark_quantised
from studies.results import append_rows

logger = logging.getLogger("benchmark")


def main() -> None:
    parser = ScriptParser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="whole forward passes")
    model.add_argument("--architecture", default="vit-small-14-reg8", help="known model, random weights")
    model.add_argument(
        "--sizes",
        type=comma_separated(int, least=1),
        default="224,448,896,1400",
        help="pixels of a square image, comma separated",
    )
    model.add_argument("--peers", default=",".join(benchmark_model.PEERS), help="comma separated; all by default")
    model.add_argument("--window-size", type=int, default=8)
    model.add_argument("--prune-ratio", type=float, default=0.6)
    model.add_argument("--dense-up-to", type=int, default=3430, help="pixels above which dense peers are left out")
    model.add_argument("--compile", action="store_true", help="run all peers through torch.compile")
    model.add_argument("--out", type=Path, default=Path("model_card/results/benchmark_model.csv"))
    model.set_defaults(run=benchmark_models)
    attention = _attention_parser(commands)
    memory = _memory_parser(commands)
    quantised = _quantised_parser(commands)
    for command in (model, attention, memory, quantised):
        command.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
        command.add_argument("--threads", type=int, default=None, help="CPU threads; torch's choice by default")
    for command in (model, attention, quantised):
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--repeats", type=int, default=5, help="measurements of each; the median counts")
    arguments = parser.parse_args()
    run_script(run, arguments)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command that was asked for.

    Raises:
        ValueError: a device that is not there, no threads or no measurement.
    """
    torch_device(getattr(arguments, "device", "cpu"))
    for name in ("threads", "repeats"):
        number = getattr(arguments, name, None)
        if number is not None and number < 1:
            raise ValueError(f"{name}={number} is not possible: one at least.")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    arguments.run(arguments)


def _attention_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    attention = commands.add_parser("attention", help="attention alone")
    attention.add_argument(
        "--tokens", type=comma_separated(int, least=1), default="2500,10000,60025", help="patch tokens of a square grid"
    )
    attention.add_argument(
        "--windows", type=comma_separated(int, least=1), default="8,16,64", help="tokens per block side"
    )
    attention.add_argument(
        "--kept", type=comma_separated(float), default="1.0,0.4", help="shares of tokens kept; below 1 at random"
    )
    attention.add_argument("--peers", default="block_sparse,sdpa_dense", help=f"of {', '.join(attention_peers.PEERS)}")
    attention.add_argument("--heads", type=int, default=24)
    attention.add_argument("--head-dim", type=int, default=64)
    attention.add_argument("--backward", action="store_true", help="time forward and backward together, too")
    attention.add_argument("--out", type=Path, default=Path("model_card/results/benchmark_attention.csv"))
    attention.set_defaults(run=benchmark_attention)
    return attention


def _memory_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    memory = commands.add_parser("memory", help="peak memory of a forward on a CPU, each in a process of its own")
    memory.add_argument("--architecture", default="vit-small-14-reg8", help="known model, random weights")
    memory.add_argument("--layers", type=int, default=0, help="how many of its layers; all by default")
    memory.add_argument(
        "--sizes", type=comma_separated(int, least=1), default="3430", help="pixels of a square image, comma separated"
    )
    memory.add_argument("--prune-ratios", type=comma_separated(float), default="0,0.6", help="comma separated")
    memory.add_argument("--prune-after-layer", type=int, default=4)
    memory.add_argument(
        "--context-tokens", type=comma_separated(int), default="0", help="comma separated; 0 is block-local attention"
    )
    memory.add_argument("--tokens-per-strip", type=int, default=None, help="0 for whole layers; the model's by default")
    memory.add_argument(
        "--processes", type=comma_separated(int, least=1), default="1", help="how many share the image, comma separated"
    )
    memory.add_argument("--out", type=Path, default=Path("model_card/results/benchmark_memory.csv"))
    memory.set_defaults(run=benchmark_memory)
    return memory


def _quantised_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> argparse.ArgumentParser:
    quantised = commands.add_parser("quantised", help="int8 and float8 of torchao against the checkpoint, on an image")
    quantised.add_argument("--checkpoint", default=None, help="folder or Hub id; the tiny checkpoint by default")
    quantised.add_argument("--image", type=Path, default=None, help="the one that comes with scikit-image by default")
    quantised.add_argument(
        "--sizes",
        type=comma_separated(int, least=1),
        default="224,896",
        help="pixels of the image's longer side, comma separated",
    )
    quantised.add_argument("--kinds", default=",".join(KINDS), help="comma separated; all by default")
    quantised.add_argument("--compile", action="store_true", help="run the models through torch.compile")
    quantised.add_argument("--out", type=Path, default=Path("model_card/results/benchmark_quantised.csv"))
    quantised.set_defaults(run=record_quantised)
    return quantised


def benchmark_models(arguments: argparse.Namespace) -> None:
    """Records whole forward passes, size by size."""
    settings = ModelBenchmark(
        architecture=arguments.architecture,
        sizes=arguments.sizes,
        peers=tuple(arguments.peers.split(",")),
        dtype=getattr(torch, arguments.dtype),
        device=arguments.device,
        window_size=arguments.window_size,
        prune_ratio=arguments.prune_ratio,
        repeats=arguments.repeats,
        dense_up_to=arguments.dense_up_to,
        compiles=arguments.compile,
    )
    for rows in benchmark_model.benchmark_models(settings):
        for row in rows:
            speedup, times_tiles = row["speedup_over_fastest_dense_peer"], row["times_tiles"]
            logger.info(
                "%5d px  %-18s  %9.3f s  %18s  %23s  %3.0f%% of matrix products' rate  +%.2f GiB",
                row["size"],
                row["model"],
                row["seconds_median"],
                f"{times_tiles} x time of tiles" if times_tiles else "",
                f"{speedup} x faster than dense" if speedup else "",
                100 * row["share_of_matrix_floor"],
                row["peak_growth_gib"],
            )
        append_rows(arguments.out, rows)


def benchmark_memory(arguments: argparse.Namespace) -> None:
    """Records peaks of memory, row by row."""
    cases = [
        MemoryCase(
            architecture=arguments.architecture,
            num_layers=arguments.layers,
            size=size,
            dtype=arguments.dtype,
            prune_ratio=prune_ratio,
            prune_after_layer=arguments.prune_after_layer,
            num_context_tokens=num_context_tokens,
            tokens_per_strip=arguments.tokens_per_strip,
            num_threads=torch.get_num_threads(),
            num_processes=num_processes,
        )
        for size in arguments.sizes
        for prune_ratio in arguments.prune_ratios
        for num_context_tokens in arguments.context_tokens
        for num_processes in arguments.processes
    ]
    for row in measure_memory(cases):
        logger.info(
            "%(size)5d px  p = %(prune_ratio)s  %(num_context_tokens)d context tokens  %(processes)d processes  "
            "%(times_hidden_states)s x hidden states above weights and pixels, process %(process_gib).2f GiB",
            {**row, "process_gib": row["process_peak_bytes"] / 2**30},
        )
        append_rows(arguments.out, [row])


def record_quantised(arguments: argparse.Namespace) -> None:
    """Records fidelity and time of quantised weights, kind by kind."""
    settings = QuantisedBenchmark(
        checkpoint=arguments.checkpoint or tiny_checkpoint(),
        image=arguments.image,
        sizes=arguments.sizes,
        kinds=tuple(arguments.kinds.split(",")),
        dtype=getattr(torch, arguments.dtype),
        device=arguments.device,
        repeats=arguments.repeats,
        compiles=arguments.compile,
    )
    for row in benchmark_quantised(settings):
        logger.info(
            "%5d px  %-15s  %8.3f s  pooled cosine %.5f  patch tokens, centred %.4f (5th percentile %.4f)",
            row["size"],
            row["quantised"],
            row["seconds_median"],
            row["pooled_cosine"],
            row["centred_patch_cosine"],
            row["centred_patch_cosine_p5"],
        )
        append_rows(arguments.out, [row])


def benchmark_attention(arguments: argparse.Namespace) -> None:
    """Records attention alone, problem by problem."""
    for tokens in arguments.tokens:
        for window_size in arguments.windows:
            for kept_share in arguments.kept:
                case = AttentionCase(
                    tokens=tokens,
                    window_size=window_size,
                    kept_share=kept_share,
                    heads=arguments.heads,
                    head_dim=arguments.head_dim,
                    dtype=getattr(torch, arguments.dtype),
                    device=arguments.device,
                )
                directions = DIRECTIONS if arguments.backward else DIRECTIONS[:1]
                rows = time_case(case, arguments.peers.split(","), arguments.repeats, directions)
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
                if rows:
                    append_rows(arguments.out, rows)


if __name__ == "__main__":
    main()
