# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a user names as the model: a path or a Hub id, our checkpoint or another, told before weights are read."""

import os
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from ..model.configuration_segmentation_sparsepath_vit import SparsePathViTUniversalSegmentationConfig
from ..model.configuration_sparsepath_vit import SparsePathViTConfig


def existing_source(source: str | os.PathLike[str], argument: str = "model") -> str:
    """What `from_pretrained` takes: the path of an existing folder (`~` expanded), or a Hub id.

    Args:
        source: as a user wrote it. What begins with `.`, `~` or `/`, or holds more than one separator, is a path.
        argument: what messages call it.

    Raises:
        FileNotFoundError: it is a path, and nothing is there, which the Hub would call a malformed repository id; or
            it is one word, which is no Hub id either.
        NotADirectoryError: it is a file.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.is_file():
        raise NotADirectoryError(
            f"{argument}={text!r} is a file: give the folder of a converted checkpoint, or a Hub id such as owner/name."
            f"{_conversion(text)}"
        )
    if path.exists():
        return str(path)
    is_path = isinstance(source, os.PathLike) or path.is_absolute() or text.startswith((".", "~"))
    if is_path or text.count("/") > 1 or text.endswith("/") or "\\" in text:
        raise FileNotFoundError(
            f"{argument}={text!r} does not exist (the working directory is {Path.cwd()}): give the folder of a "
            "converted checkpoint, or a Hub id such as owner/name."
        )
    if "/" not in text:
        raise FileNotFoundError(
            f"{argument}={text!r} is no folder here (the working directory is {Path.cwd()}), and Hub ids have the form "
            f"owner/name.{_conversion(text)}"
        )
    return text


def checkpoint_config(source: str | os.PathLike[str], argument: str = "model") -> PreTrainedConfig:
    """The configuration of one of our checkpoints: encoder, classifier, backbone, adapter or segmentation model.

    Args:
        source: folder or Hub id, as a user wrote it.
        argument: what messages call it.

    Raises:
        OSError: nothing is there, or the Hub cannot be reached or refuses access.
        ValueError: there is no checkpoint, or another model's: that of a foundation model, not converted yet.
    """
    source = existing_source(source, argument)
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        found = (
            "holds no checkpoint of ours" if Path(source).is_dir() else "was taken for a Hub id and cannot be loaded"
        )
        reason = str(error).strip().splitlines()[0].rstrip(".:")
        raise kind(f"{argument}={source!r} {found}: {reason}.{_conversion(source)}") from error
    if not isinstance(config, SparsePathViTConfig | SparsePathViTUniversalSegmentationConfig):
        raise ValueError(
            f"{argument}={source!r} is a checkpoint of the kind {config.model_type!r}, none of ours."
            f"{_conversion(source)}"
        )
    return config


def _conversion(source: str) -> str:
    """The way out for who names a foundation model as its authors publish it."""
    return (
        f" A foundation model (`sparsepath models` lists the known ones) is converted first, and what was written is "
        f"given here: `sparsepath convert {source} FOLDER`."
    )
