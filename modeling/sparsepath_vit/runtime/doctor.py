# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What works on this machine, what is missing, and what to do about it."""

import importlib
import importlib.util
import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from huggingface_hub import get_token

from ..model.attention_backends import describe_block_attention_backend
from ..model.device_memory import available_memory
from .compute import describe_dtypes


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    Attributes:
        subject: what was looked at.
        is_well: False where something a user may want does not work.
        state: what was found.
        remedy: what to do where it is not well; empty otherwise.
    """

    subject: str
    is_well: bool
    state: str
    remedy: str = ""


# package -> what it is for, and how to get it
OPTIONAL_PACKAGES = {
    "triton": ("the attention kernel on NVIDIA GPUs", "pip install triton  (comes with torch on Linux)"),
    "openslide": ("slides: SVS, MRXS, NDPI, ...", 'pip install "sparsepath-vit[slides]"'),
    "tifffile": ("slides that OpenSlide refuses, such as OME-TIFF", 'pip install "sparsepath-vit[slides]"'),
    "imagecodecs": ("JPEG 2000 and other codecs for tifffile", 'pip install "sparsepath-vit[slides]"'),
    "h5py": ("storing embeddings", 'pip install "sparsepath-vit[slides]"'),
    "skimage": ("tissue masks and the demo's image", 'pip install "sparsepath-vit[slides]"'),
    "bokeh": ("sparsepath view", 'pip install "sparsepath-vit[view]"'),
    "timm": ("sparsepath convert --verify", "pip install timm"),
    "datasets": ("training scripts", 'pip install "sparsepath-vit[train]"'),
}
DISTRIBUTIONS = {"openslide": "openslide-python", "skimage": "scikit-image"}


def examine() -> list[Finding]:
    """Looks at versions, attention backends, devices, slide readers and access to gated weights."""
    findings = [Finding("python", True, platform.python_version())]
    for package in ("sparsepath-vit", "torch", "torchvision", "transformers", "accelerate"):
        findings.append(_required(package))
    findings += [_optional(package, *purpose) for package, purpose in OPTIONAL_PACKAGES.items()]
    findings.append(_device())
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        described = describe_block_attention_backend(device)
        is_well = not described.startswith("none")
        remedy = "" if is_well else "unset SPARSEPATH_ATTENTION_BACKEND"
        findings.append(Finding(f"block_sparse on {device}", is_well, described, remedy))
        findings.append(Finding(f"numbers on {device}", True, f"{describe_dtypes(device)}; --dtype overrides it"))
    findings.append(_gated_weights())
    return findings


def _required(package: str) -> Finding:
    try:
        return Finding(package, True, version(package))
    except PackageNotFoundError:
        return Finding(package, False, "not installed", f"pip install {package}")


def _optional(package: str, purpose: str, remedy: str) -> Finding:
    if importlib.util.find_spec(package) is None:
        return Finding(package, False, f"not installed; for {purpose}", remedy)
    try:
        importlib.import_module(package)
    except (ImportError, OSError) as error:  # a wheel whose shared library does not load
        return Finding(package, False, f"installed, but does not load: {error}", remedy)
    return Finding(package, True, f"{version(DISTRIBUTIONS.get(package, package))}; for {purpose}")


def _device() -> Finding:
    if torch.cuda.is_available():
        device = torch.device("cuda")
        memory = f"{(available_memory(device) or 0) / 2**30:.0f} GiB free"
        return Finding("GPU", True, f"{torch.cuda.get_device_name(device)}, {memory}")
    remedy = "none needed; a CUDA build of torch and an NVIDIA driver make large regions faster"
    return Finding("GPU", True, f"none: everything runs on the CPU with {torch.get_num_threads()} threads", remedy)


def _gated_weights() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        return Finding("gated weights", True, "HF_HUB_OFFLINE is set: only local checkpoints and the cache are used")
    if get_token() is None:
        remedy = "accept the model's terms on its Hub page, then run: hf auth login"
        return Finding("gated weights", False, "not logged in to the Hub; local checkpoints work", remedy)
    return Finding("gated weights", True, "logged in; each model's terms must be accepted on its Hub page")
