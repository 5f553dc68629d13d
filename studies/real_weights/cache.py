# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Where the weights lie; for those who only use them."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where the weights lie: `SPARSEPATH_REAL_WEIGHTS`, else `sparsepath-vit/dinov2-small` in the user's cache."""
    named = os.environ.get("SPARSEPATH_REAL_WEIGHTS")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named).expanduser() if named else caches / "sparsepath-vit" / "dinov2-small"


def cached_checkpoint(cache: Path | None = None) -> Path | None:
    """The converted SparsePathViT folder where it has been made, else None. Nothing is fetched.

    Args:
        cache: `cache_folder()` by default.
    """
    folder = (cache or cache_folder()) / "sparsepath-vit"
    return folder if (folder / "config.json").is_file() else None


def chosen_checkpoint(name_or_path: str | None) -> Path | str:
    """The checkpoint that a study was given, by default the converted weights of the cache.

    Raises:
        ValueError: none was given, and the cache is empty.
    """
    checkpoint = name_or_path or cached_checkpoint()
    if checkpoint is None:
        raise ValueError(
            f"there are no weights in {cache_folder()}: run python -m studies.real_weights, or name a converted "
            "checkpoint with --model-name-or-path."
        )
    return checkpoint
