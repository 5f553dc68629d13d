#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Draws the pictures of README and model card: the attention pattern, and the recorded benchmarks as curves.

Examples:
    python -m studies.make_figures
    python -m studies.make_figures --output_dir /tmp/figures
"""

import argparse
import logging
from pathlib import Path

from sparsepath_vit.runtime.extras import imports_of_extra

with imports_of_extra("train", "matplotlib"):
    from sparsepath_vit.runtime.figures import block_pattern_figure, save_image

    from .benchmarks.plots import plot_attention, plot_models, read_rows


logger = logging.getLogger("make_figures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("model_card/figures"))
    parser.add_argument("--results_dir", type=Path, default=Path("model_card/results"), help="CSVs of benchmark.py")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
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
