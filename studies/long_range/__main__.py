#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""How far apart may two structures be for block-local attention to relate them, and what do global tokens add?

Strips of real tissue hold two structures d tokens apart, each stained in one of two ways; the label says whether both
are stained alike, and is read from the left structure's tokens. One small model is trained from the same weights for
each of dense, w = 8 and w = 64, with and without global tokens, and with global and context tokens. Without means that
no attention passes between global and patch tokens, so that information moves from block to block only.

It shows what each pattern can learn in a small network, not what a foundation model has learnt. Writes
OUT/long_range.csv, row by row (a stopped run goes on with the next model), and long_range.png.

Examples:
    python -m studies.long_range --tissue-images regions/*.png --out outputs/long_range
    python -m studies.long_range --tissue-images regions/*.png --out outputs/long_range --quick
"""

import argparse
import logging
from dataclasses import asdict
from pathlib import Path

import torch

from sparsepath_vit.runtime.extras import ScriptParser, imports_of_extra, run_script

with imports_of_extra("train", "matplotlib"):
    from sparsepath_vit.runtime.measure import describe_run

    from ..figures import plot_long_range
    from ..results import ResultsTable
    from .experiment import LongRangePattern, LongRangeSettings, TissueStrips, patterns_of, tested, train


logger = logging.getLogger("long_range_check")

# Half the tokens: all six models in a third of the time.
QUICK = {"columns": 96, "distances": (4, 12, 24, 48, 80), "steps": 400, "test_strips": 128, "windows": (None, 8, 24)}
KEYS = ("window_size", "has_globals", "num_context_tokens", "distance", "settings")
VALUES = ("accuracy", "strips", "reach", "commit", "torch", "machine", "threads")


def main() -> None:
    defaults = LongRangeSettings()
    parser = ScriptParser(__doc__)
    parser.add_argument("--tissue-images", type=Path, nargs="+", required=True, help="stained tissue, no white margins")
    parser.add_argument("--quick", action="store_true", help="shorter strips, and w = 24 in place of 64")
    parser.add_argument("--columns", type=int, help=f"patch tokens of a strip; {defaults.columns} by default")
    parser.add_argument("--distances", help="tokens, comma separated; 4,12,24,48,96,160 by default")
    parser.add_argument("--windows", help="tokens per block side, 0 is dense; 0,8,64 by default")
    parser.add_argument("--contexts", help="most context tokens, comma separated; 0,48 by default")
    parser.add_argument("--steps", type=int, help=f"of training; {defaults.steps} by default")
    parser.add_argument("--test-strips", type=int, help=f"per distance; {defaults.test_strips} by default")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; tensors as small as these gain from one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", "--output-dir", dest="output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run_script(run, arguments)


def settings_of(arguments: argparse.Namespace) -> LongRangeSettings:
    """The flags as settings."""
    given = {name: getattr(arguments, name) for name in ("columns", "steps", "test_strips")}
    if arguments.distances:
        given["distances"] = tuple(int(distance) for distance in arguments.distances.split(","))
    if arguments.windows:
        given["windows"] = tuple(int(window) or None for window in arguments.windows.split(","))
    if arguments.contexts:
        given["contexts"] = tuple(int(context) for context in arguments.contexts.split(","))
    changes = {name: value for name, value in given.items() if value is not None}
    return LongRangeSettings(**{**(QUICK if arguments.quick else {}), **changes, "seed": arguments.seed})


def run(arguments: argparse.Namespace) -> None:
    """Trains and tests what is lacking; draws the figure."""
    settings = settings_of(arguments)
    strips = TissueStrips(arguments.tissue_images, settings)
    table = ResultsTable(arguments.output_dir / "long_range.csv", KEYS, VALUES)
    varied = ("windows", "with_globals", "contexts", "distances")
    common = " ".join(f"{name}={value}" for name, value in asdict(settings).items() if name not in varied)
    described = describe_run()
    rows = []

    def key_of(pattern: LongRangePattern, distance: int) -> dict[str, object]:
        return {
            **asdict(pattern),
            "distance": distance,
            "settings": f"{common} distances={'/'.join(map(str, settings.distances))}",
        }

    for pattern in patterns_of(settings):
        keys = [key_of(pattern, distance) for distance in settings.distances]
        if not all(table.has(key) for key in keys):
            for key in keys:
                table.drop(**key)
            model = train(strips, settings, pattern)
            for key, distance in zip(keys, settings.distances, strict=True):
                table.add({**described, **key, **asdict(tested(model, strips, settings, pattern, distance))})
        for key in keys:
            rows.append(table.find(key))
            logger.info(
                "%-30s d = %3s  accuracy %.3f  (reach %s)",
                *(pattern, key["distance"], float(rows[-1]["accuracy"]), rows[-1]["reach"]),
            )
    plot_long_range(rows, arguments.output_dir / "long_range.png")
    logger.info("wrote %s", arguments.output_dir)


if __name__ == "__main__":
    main()
