#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""How far apart may two structures be for block-local attention to relate them, and what do global tokens add?

Strips of real tissue hold two structures d tokens apart, each stained in one of two ways; the label says whether both
are stained alike, and is read from the left structure's tokens. One small model is trained from the same weights for
each of dense and w = 4, with and without global tokens, with and without context tokens. Without global tokens
means that no token sees them, so that information goes between patch tokens only. The dense models are also tested with
the patterns of the others: the same weights, other attention.

It shows what each pattern can learn in a small network, not what a foundation model has learnt. Writes
OUT/long_range.csv, row by row (a stopped run goes on with the next model), and long_range.png.

Examples:
    python -m studies.long_range --tissue-images regions/*.png --out outputs/long_range
    python -m studies.long_range --tissue-images regions/*.png --out outputs/long_range --seeds 0,1,2 --windows 0,4,8
"""

import argparse
import itertools
import logging
from dataclasses import asdict
from pathlib import Path

import torch

from sparsepath_vit.runtime.extras import ScriptParser, imports_of_extra, run_script

with imports_of_extra("train", "matplotlib"):
    from sparsepath_vit.runtime.measure import describe_run

    from ..figures import plot_long_range
    from ..results import ResultsTable
    from .experiment import LongRangePattern, LongRangeSettings, TissueStrips, patterns_of, tested, tests_of, train


logger = logging.getLogger("long_range_check")

KEYS = ("trained", "window_size", "has_globals", "num_context_tokens", "distance", "seed", "settings")
VALUES = ("accuracy", "keys_per_query", "strips", "reach", "commit", "torch", "machine", "threads")


def main() -> None:
    defaults = LongRangeSettings()
    parser = ScriptParser(__doc__)
    parser.add_argument("--tissue-images", type=Path, nargs="+", required=True, help="stained tissue, no white margins")
    parser.add_argument("--columns", type=int, help=f"patch tokens of a strip; {defaults.columns} by default")
    parser.add_argument("--distances", help="tokens, comma separated; 4,12,24,36,44 by default")
    parser.add_argument("--windows", help="tokens per block side, 0 is dense; 0,4 by default")
    parser.add_argument("--contexts", help="most context tokens, comma separated; 0,12 by default")
    parser.add_argument("--steps", type=int, help=f"of training; {defaults.steps} by default")
    parser.add_argument("--test-strips", type=int, help=f"per distance; {defaults.test_strips} by default")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; tensors as small as these gain from one")
    parser.add_argument("--seeds", default="0", help="of weights and data, comma separated")
    parser.add_argument("--out", "--output-dir", dest="output_dir", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run_script(run, arguments)


def settings_of(arguments: argparse.Namespace, seed: int) -> LongRangeSettings:
    """The flags as settings."""
    given = {name: getattr(arguments, name) for name in ("columns", "steps", "test_strips")}
    if arguments.distances:
        given["distances"] = tuple(int(distance) for distance in arguments.distances.split(","))
    if arguments.windows:
        given["windows"] = tuple(int(window) or None for window in arguments.windows.split(","))
    if arguments.contexts:
        given["contexts"] = tuple(int(context) for context in arguments.contexts.split(","))
    changes = {name: value for name, value in given.items() if value is not None}
    return LongRangeSettings(**changes, seed=seed)


def run(arguments: argparse.Namespace) -> None:
    """Trains and tests what is lacking, seed by seed; draws the figure."""
    table = ResultsTable(arguments.output_dir / "long_range.csv", KEYS, VALUES)
    rows = []
    for seed in map(int, arguments.seeds.split(",")):
        settings = settings_of(arguments, seed)
        strips = TissueStrips(arguments.tissue_images, settings)
        for pattern in patterns_of(settings):
            rows += rows_of(pattern, strips, settings, table)
    plot_long_range(rows, arguments.output_dir / "long_range.png")
    logger.info("wrote %s", arguments.output_dir)


def rows_of(
    trained: LongRangePattern, strips: TissueStrips, settings: LongRangeSettings, table: ResultsTable
) -> list[dict[str, str]]:
    """A row for each pattern that a model is tested with and each distance; trains it where some are lacking."""
    varied = ("windows", "with_globals", "contexts", "distances", "seed")
    common = " ".join(f"{name}={value}" for name, value in asdict(settings).items() if name not in varied)
    common = f"{common} distances={'/'.join(map(str, settings.distances))}"
    tests = list(itertools.product(tests_of(settings, trained), settings.distances))
    keys = [
        {"trained": str(trained), **asdict(by), "distance": distance, "seed": settings.seed, "settings": common}
        for by, distance in tests
    ]
    if not all(map(table.has, keys)):
        model = train(strips, settings, trained)
        for key, (by, distance) in zip(keys, tests, strict=True):
            if not table.has(key):
                table.add({**describe_run(), **key, **asdict(tested(model, strips, settings, by, distance))})
    rows = [table.find(key) for key in keys]
    for row, (by, _) in zip(rows, tests, strict=True):
        accuracy = float(row["accuracy"])
        logger.info("trained %-30s tested %-30s d = %3s  accuracy %.3f", trained, by, row["distance"], accuracy)
    return rows


if __name__ == "__main__":
    main()
