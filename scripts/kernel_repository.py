#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The attention kernel as a repository for the Hugging Face `kernels` library.

The kernel is pure Triton, compiled where it runs, so there is one build for every version of torch:

    build.toml, README.md                       what the repository is
    torch-ext/sparsepath_block_attention/       the sources
    build/torch-universal/metadata.json         the build that the library loads, and
    build/torch-universal/sparsepath_block_attention/   its package, the sources once more

`kernels.get_local_kernel(folder)` loads it from a folder, `kernels.get_kernel` from the Hub.

Example:
    python scripts/kernel_repository.py --out outputs/kernel
"""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path

from sparsepath_vit.runtime.atomic_files import atomic_folder
from sparsepath_vit.runtime.extras import ScriptParser, run_script

logger = logging.getLogger("kernel_repository")

KERNEL_NAME = "sparsepath-block-attention"
KERNEL_VERSION = 1

_PACKAGE_NAME = KERNEL_NAME.replace("-", "_")
# The operator and all that it imports: nothing of it needs more than torch, and Triton where there is a GPU.
_SOURCES = (
    "operator_names.py",
    "stratified_sampling.py",
    "token_grid.py",
    "token_strips.py",
    "context_tokens.py",
    "mean_query_correction.py",
    "attention_specification.py",
    "attention_precision.py",
    "attention_checks.py",
    "attention_backend.py",
    "attention_backends.py",
    "attention_products.py",
    "attention_sdpa_tables.py",
    "attention_sdpa_correction.py",
    "attention_sdpa_keys.py",
    "attention_sdpa_probabilities.py",
    "attention_sdpa_batches.py",
    "attention_sdpa_queries.py",
    "attention_sdpa_backward.py",
    "attention_sdpa_tiles.py",
    "host_compiler.py",
    "attention_cpu_vectors.py",
    "attention_cpu_source.py",
    "attention_cpu.py",
    "attention_triton.py",
    "attention_triton_tables.py",
    "attention_triton_context_tables.py",
    "attention_triton_launch.py",
    "attention_triton_context.py",
    "attention_triton_functions.py",
    "attention_triton_forward.py",
    "attention_triton_backward.py",
    "attention_triton_mean.py",
    "attention_triton_context_kernels.py",
    "attention_operator.py",
)
_MODEL_FOLDER = Path(__file__).parents[1] / "modeling" / "sparsepath_vit" / "model"
_LICENCE_LINE = "# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.\n"

_PACKAGE_INIT = (
    _LICENCE_LINE
    + '''"""Block-local attention with fused global tokens, ragged after token pruning (arXiv 2601.12150)."""

from .attention_operator import block_attention
from .context_tokens import draw_context_tokens
from .token_grid import TokenGrid

__all__ = ["TokenGrid", "block_attention", "draw_context_tokens"]
'''
)

_BUILD_TOML = f"""[general]
edition = 5
name = "{KERNEL_NAME}"
version = {KERNEL_VERSION}
license = "Apache-2.0"
backends = ["cuda"]

[torch-noarch]
"""

_README = f"""---
license: apache-2.0
tags:
- kernels
- kernel
---

# {KERNEL_NAME}

Block-local attention for vision transformers on large images, in Triton: each patch token sees the global tokens (CLS
and registers) and the blocks around its own, global tokens see everything, in one softmax (arXiv 2601.12150). Blocks
may be ragged, as they are after token pruning. Forward and backward, bitwise reproducible, bfloat16, float16 and
float32, head_dim 16, 32, 64, 80, 96 and 128, on NVIDIA GPUs; torch.compile takes it whole. Elsewhere tiles of torch
SDPA calls compute the same.

```python
import torch
from kernels import get_local_kernel

kernel = get_local_kernel("path/to/this/folder")
grid = kernel.TokenGrid.create([(245, 245)], num_global_tokens=9, window_size=8, device="cuda")
query, key, value = torch.randn(3, 1, 24, grid.num_tokens, 64, dtype=torch.bfloat16, device="cuda")
output = kernel.block_attention(query, key, value, grid)
```
"""


def export_kernel(output_dir: str | os.PathLike) -> Path:
    """Writes the kernel's repository.

    Args:
        output_dir: folder to write; must not exist yet, or be empty.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder holds something.
        NotADirectoryError: it is a file.
    """
    output_dir = Path(output_dir)
    if output_dir.is_file():
        raise NotADirectoryError(f"output_dir={str(output_dir)!r} is a file: name a folder.")
    if output_dir.exists() and any(output_dir.iterdir()):
        raise FileExistsError(f"output_dir={str(output_dir)!r} is not empty: remove it, or name another folder.")
    with atomic_folder(output_dir) as repository:
        sources = repository / "torch-ext" / _PACKAGE_NAME
        build = repository / "build" / "torch-universal"
        sources.mkdir(parents=True)
        (repository / "build.toml").write_text(_BUILD_TOML, encoding="utf-8")
        (repository / "README.md").write_text(_README, encoding="utf-8")
        (sources / "__init__.py").write_text(_PACKAGE_INIT, encoding="utf-8")
        for name in _SOURCES:
            shutil.copyfile(_MODEL_FOLDER / name, sources / name)
        shutil.copytree(sources, build / _PACKAGE_NAME)
        metadata = json.dumps(_metadata(sources), indent=2) + "\n"
        (build / "metadata.json").write_text(metadata, encoding="utf-8")
    return output_dir


def _metadata(sources: Path) -> dict[str, object]:
    """What the library reads before it loads a build; the id tells builds with different sources apart."""
    digest = hashlib.sha256()
    for path in sorted(sources.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return {
        "name": KERNEL_NAME,
        "id": f"_{_PACKAGE_NAME}_universal_{digest.hexdigest()[:12]}",
        "version": KERNEL_VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }


def main() -> None:
    """Parses the arguments and writes the repository."""
    parser = ScriptParser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/kernel"), help="folder to write, new or empty")
    arguments = parser.parse_args()
    run_script(lambda: logger.info("wrote %s", export_kernel(arguments.out)))


if __name__ == "__main__":
    main()
