# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Rows of an HDF5 dataset mapped into memory: features of a whole slide are used where they lie, and never copied."""

import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

_ROWS_IN_FLOAT32 = 4096  # converted at once: 25 MB at 1536 channels


class MappedRows:
    """A matrix in an HDF5 file, as runs of consecutive rows that lie one after the other in the file.

    `sparsepath embed` stores features uncompressed in chunks of whole rows, most of them neighbours in the file. A file
    of another layout (compressed, or cut across the rows) is read into memory instead, with a line that says so.

    Args:
        path: the HDF5 file; what is mapped stays readable when another file takes its name.
        dataset: (rows, channels) h5py dataset in it, of floating-point numbers.
    """

    def __init__(self, path: str | os.PathLike[str], dataset: Any) -> None:
        self.shape: tuple[int, int] = dataset.shape
        self._norms: np.ndarray | None = None
        self._lock = threading.Lock()
        places = _places_of_chunks(dataset)
        if places is None:
            if len(dataset):
                logger.warning("%s: %s cannot be mapped into memory and is read whole.", path, dataset.name)
            rows = dataset[:]
            self._runs = [(0, rows.astype(rows.dtype.newbyteorder("="), copy=False))]
            return
        # Copy on write: torch warns of memory that cannot be written to; nobody writes to it.
        mapped = np.memmap(path, mode="c")
        self._runs = [
            (first, mapped[start:end].view(dataset.dtype).reshape(-1, self.shape[1]))
            for first, start, end in _joined(places, self.shape[0], self.shape[1] * dataset.dtype.itemsize)
        ]

    def __len__(self) -> int:
        return self.shape[0]

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The number of the first row, and (rows, channels) float32, of block after block."""
        for first, run in self._runs:
            for start in range(0, len(run), _ROWS_IN_FLOAT32):
                yield first + start, torch.from_numpy(run[start : start + _ROWS_IN_FLOAT32]).float()

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """(len(indices), channels) float32 rows by number, in the order asked for."""
        indices = np.asarray(indices)
        taken = np.empty((len(indices), self.shape[1]), dtype=np.float32)
        for first, run in self._runs:
            inside = (indices >= first) & (indices < first + len(run))
            if inside.any():
                taken[inside] = run[indices[inside] - first]
        return taken

    def norms(self) -> np.ndarray:
        """(rows,) float32 length of each row; computed once."""
        with self._lock:  # who comes while they are computed waits for them
            if self._norms is None:
                norms = np.empty(len(self), dtype=np.float32)
                for first, block in self.blocks():
                    norms[first : first + len(block)] = torch.linalg.vector_norm(block, dim=1).numpy()
                self._norms = norms
            return self._norms

    def product(self, vector: np.ndarray) -> np.ndarray:
        """(rows,) float32 products with a vector of (channels,).

        The vector is rounded to the rows' own type and the products are summed in float32: of float16 rows they are
        right to about one part in a thousand, and no row is converted.
        """
        products = np.empty(len(self), dtype=np.float32)
        for first, run in self._runs:
            rows = torch.from_numpy(run)
            column = torch.from_numpy(np.asarray(vector, dtype=np.float32)).to(rows.dtype)
            products[first : first + len(run)] = torch.mv(rows, column).float().numpy()
        return products


def _places_of_chunks(dataset: Any) -> dict[int, int] | None:
    """Byte offset of the chunk that begins at each row; None where the rows do not lie in the file as they are."""
    channels, itemsize = dataset.shape[1], dataset.dtype.itemsize
    if dataset.dtype.byteorder == ">" or not dataset.size:
        return None
    if dataset.chunks is None:
        offset = dataset.id.get_offset()
        return None if offset is None or offset % itemsize else {0: offset}
    if dataset.chunks[1] != channels or dataset.id.get_create_plist().get_nfilters():
        return None
    places: dict[int, int] = {}
    dataset.id.chunk_iter(lambda chunk: places.update({chunk.chunk_offset[0]: chunk.byte_offset}))
    is_whole = len(places) == -(-dataset.shape[0] // dataset.chunks[0])
    return places if is_whole and not any(offset % itemsize for offset in places.values()) else None


def _joined(places: dict[int, int], rows: int, row_bytes: int) -> list[tuple[int, int, int]]:
    """(first row, first byte, end byte) of the runs that chunks which are neighbours in the file form."""
    firsts = sorted(places)
    runs: list[tuple[int, int, int]] = []
    for first, end in zip(firsts, [*firsts[1:], rows], strict=True):
        start, size = places[first], (end - first) * row_bytes
        if runs and runs[-1][2] == start:
            runs[-1] = (*runs[-1][:2], start + size)
        else:
            runs.append((first, start, start + size))
    return runs
