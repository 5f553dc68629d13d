# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Tells a path from a Hub id before anything is downloaded."""

import os
from pathlib import Path


def existing_source(source: str | os.PathLike[str], argument: str = "model") -> str:
    """What `from_pretrained` takes: the path of an existing file or folder (`~` expanded), or a Hub id.

    Args:
        source: as a user wrote it. What begins with `.`, `~` or `/`, or holds more than one separator, is a path.
        argument: what messages call it.

    Raises:
        FileNotFoundError: it is a path, and nothing is there. The Hub would call it a malformed repository id.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.exists():
        return str(path)
    is_path = isinstance(source, os.PathLike) or path.is_absolute() or text.startswith((".", "~"))
    if is_path or text.count("/") > 1 or text.endswith("/") or "\\" in text:
        raise FileNotFoundError(
            f"{argument}={text!r} does not exist (the working directory is {Path.cwd()}): give the folder of a "
            "converted checkpoint, or a Hub id such as owner/name."
        )
    return text
