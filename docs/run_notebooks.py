#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Executes the notebooks of examples/ and writes their outputs into them (`make notebooks`).

What differs from run to run and from machine to machine (progress bars, warnings, counters) is left out, so that a
notebook changes only where its text, its code or its results do.
"""

import base64
import io
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat.v4 import new_output
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"


def executed(path: Path, seconds_per_cell: int = 120) -> nbformat.NotebookNode:
    """Runs every cell of a notebook in a fresh kernel.

    Args:
        path: the notebook.
        seconds_per_cell: a cell that takes longer is an error.

    Returns:
        The notebook with the outputs of this run.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised; the message holds the cell and the traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        # A socket file in a folder of this user instead of a port: nobody else on the machine can reach the kernel.
        manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
        NotebookClient(notebook, km=manager, timeout=seconds_per_cell).execute(cwd=str(path.parent))
    return notebook


def without_what_varies(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Leaves the printed lines, and the pictures as small PNGs."""
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        printed = "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        pictures = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        cell.outputs = [new_output("stream", name="stdout", text=printed)] if printed else []
        cell.outputs += [new_output("display_data", {"image/png": _smaller(picture)}) for picture in pictures]
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def _smaller(picture: str) -> str:
    """A base64 PNG with 128 colours: a third of the bytes, and hardly to be told from the original."""
    reduced = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        image.convert("RGB").quantize(128).save(reduced, format="PNG", optimize=True)
    return base64.b64encode(reduced.getvalue()).decode()


def main() -> None:
    """Executes all notebooks, or those named."""
    paths = [Path(name) for name in sys.argv[1:]] or sorted(EXAMPLES.glob("*.ipynb"))
    for path in paths:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        nbformat.write(without_what_varies(executed(path)), temporary)
        os.replace(temporary, path)
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
