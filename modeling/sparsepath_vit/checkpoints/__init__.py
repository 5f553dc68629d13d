# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The trained checkpoint that is installed with the package."""

import shutil
from pathlib import Path

from ..model.configuration_sparsepath_vit import AUTO_MAP as MODEL_AUTO_MAP
from ..model.image_processing_sparsepath_vit import AUTO_MAP as IMAGE_PROCESSOR_AUTO_MAP
from ..model.remote_code import write_remote_code


def tiny_checkpoint() -> Path:
    """The folder of sparsepath-vit-tiny: a small ViT trained without labels on 89 stained tissue images.

    For demonstrations and tests; its model card says what it is not. `SparsePathViTModel.from_pretrained` and every
    Auto class load it offline.

    Returns:
        `Path`: inside the installed package; do not write there, see `copy_tiny_checkpoint`.

    Example:
    ```python
    >>> from sparsepath_vit import SparsePathViTModel, tiny_checkpoint

    >>> model = SparsePathViTModel.from_pretrained(tiny_checkpoint())
    ```
    """
    return Path(__file__).parent / "tiny"


def copy_tiny_checkpoint(output_dir: str | Path) -> Path:
    """Copies sparsepath-vit-tiny with the code that loads it where this package is not installed.

    The code comes from the installed package at the time of the call, so it never lags behind.

    Args:
        output_dir: folder that does not exist yet; afterwards `AutoModel.from_pretrained(output_dir,
            trust_remote_code=True)` loads it anywhere.

    Returns:
        `Path`: `output_dir`.

    Raises:
        ValueError: `output_dir` exists.
    """
    output_dir = Path(output_dir)
    if output_dir.exists():
        raise ValueError(f"output_dir={str(output_dir)!r} exists: name a folder that does not, or remove it.")
    shutil.copytree(tiny_checkpoint(), output_dir, ignore=shutil.ignore_patterns("__pycache__"))
    write_remote_code(output_dir, {**MODEL_AUTO_MAP, **IMAGE_PROCESSOR_AUTO_MAP})
    return output_dir
