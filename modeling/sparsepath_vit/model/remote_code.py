# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Copies the model's source files beside a checkpoint, so that it loads where this package is not installed."""

import shutil
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

# The files that `auto_map` names (configuration, model, image processor) and the models built on them carry the model's
# name; everything else follows from their relative imports.
ENTRY_PATTERN = "*_sparsepath_vit.py"


def remote_code_files() -> tuple[Path, ...]:
    """The files that `trust_remote_code=True` needs: the model's own and all they import relatively.

    Returns:
        `tuple[Path, ...]`: paths inside the installed package, sorted by name.

    Raises:
        ValueError: one of them imports something outside the flat folder, which remote code cannot.
    """
    package = Path(__file__).parent
    entries = list(package.glob(ENTRY_PATTERN))
    try:
        imported = [Path(name) for entry in entries for name in get_relative_import_files(entry)]
    except FileNotFoundError as error:
        raise ValueError(
            f"Remote code is one flat folder, but a model file imports {Path(error.filename).stem}, which does not lie "
            "in it: move it beside the model files."
        ) from error
    return tuple(sorted({*entries, *imported}))


def export_remote_code(output_dir: str | Path) -> tuple[Path, ...]:
    """Copies the files that `AutoModel.from_pretrained(output_dir, trust_remote_code=True)` needs.

    Args:
        output_dir: an existing folder, usually that of a saved checkpoint. Files of the same name are replaced.

    Returns:
        `tuple[Path, ...]`: the copies.

    Raises:
        ValueError: `output_dir` is no folder.
    """
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        raise ValueError(f"output_dir={output_dir.name!r} is no folder: save the checkpoint there first.")
    return tuple(Path(shutil.copyfile(file, output_dir / file.name)) for file in remote_code_files())
