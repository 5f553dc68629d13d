#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Draws the pictures of README and model card: the attention pattern, and the recorded benchmarks as curves.

Examples:
    python -m studies.make_figures
    python -m studies.make_figures --out /tmp/figures
"""

import argparse
import logging
from pathlib import Path

from sparsepath_vit.runtime.extras import ScriptParser, imports_of_extra, run_script

with imports_of_extra("train", "matplotlib"):
    from sparsepath_vit.runtime.figures import block_pattern_figure, save_image

    from .benchmarks.plots import plot_attention, plot_models, read_rows


logger = logging.getLogger("make_figures")


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--out", "--output-dir", dest="output_dir", type=Path, default=Path("model_card/figures"))
    parser.add_argument("--results-dir", type=Path, default=Path("model_card/results"), help="CSVs of benchmark.py")
    run_script(run, parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    """Draws what there are results for."""
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    path = arguments.output_dir / "block_pattern.png"
    save_image(block_pattern_figure(), path)
    logger.info("wrote %s", path)
    for name, plot in (("benchmark_model", plot_models), ("benchmark_attention", plot_attention)):
        results = arguments.results_dir / f"{name}.csv"
        if results.exists():
            plot(read_rows(results), arguments.output_dir / f"{name}.png")
            logger.info("wrote %s", arguments.output_dir / f"{name}.png")
        else:
            logger.info("%s is not there: run scripts/benchmark.py first for its curves", results)


if __name__ == "__main__":
    main()
