# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What tells the content of a file from another's, without reading gigabytes."""

import hashlib
import os
from pathlib import Path

WHOLE_BYTES = 4 * 2**20  # files up to this size are hashed whole
_END_BYTES = 256 * 2**10
_BLOCK_BYTES = 16 * 2**10
_NUM_BLOCKS = 64


def content_sample(path: str | os.PathLike[str]) -> str:
    """SHA-256, in hexadecimal, of a file's size and of a sample of its content.

    Of files up to 4 MiB the sample is all of it. Of larger ones it is the first and the last 256 KiB and 64 blocks of
    16 KiB spread evenly between: 1.5 MiB, whatever the size. A file that was exported, compressed or stained anew
    differs in all of these; a change of a few bytes in a file of the same size may lie between them.

    Raises:
        OSError: the file cannot be read.
    """
    path = Path(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        if size <= WHOLE_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        digest.update(file.read(_END_BYTES))
        between = size - 2 * _END_BYTES - _BLOCK_BYTES
        for number in range(_NUM_BLOCKS):
            file.seek(_END_BYTES + between * number // (_NUM_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
        file.seek(size - _END_BYTES)
        digest.update(file.read())
    return digest.hexdigest()
