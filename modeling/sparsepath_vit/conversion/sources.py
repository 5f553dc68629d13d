# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Opens a checkpoint without reading its weights, and never runs code that comes with it."""

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from .architectures import Architecture, architecture_of_hub_id, known_architectures

SAFETENSORS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pth", ".pt")
PICKLE_STARTS = (b"PK", b"\x80")  # a zip archive, and the older bare pickle
INDEX_SUFFIX = ".index.json"
# Looked for in this order: safetensors before pickles, one file before shards.
STANDARD_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Where training code nests the weights, in this order; a DINO teacher is the network that is meant to be used.
CONTAINER_KEYS = ("teacher", "model", "state_dict", "model_state_dict", "module", "backbone")
AUTHENTICATE = (
    "accept its terms on its Hub page while logged in, then authenticate here with `hf auth login` or the environment "
    "variable HF_TOKEN"
)


@dataclass(frozen=True)
class CheckpointSource:
    """An opened checkpoint.

    Args:
        label: how to name the source to a reader: the Hub id, or the name of the file or folder.
        tensors: tensor name -> tensor; its memory is the file's own mapping wherever the format allows.
        config: the `config.json` beside the weights; empty where there is none.
        preprocessor: the `preprocessor_config.json` beside the weights; empty where there is none.
        known: the known model, where the source is its Hub id.
    """

    label: str
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    known: Architecture | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def open_source(source: str | Path, known: Architecture | None = None) -> CheckpointSource:
    """Opens a checkpoint: a file, a folder, a Hub id or the name of a known model.

    Args:
        source: a `.safetensors`, `.bin`, `.pth` or `.pt` file, an `.index.json` of a sharded checkpoint, a folder that
            holds one, a Hub id `owner/name`, or a name of the table of known models.
        known: the model it is, where the caller knows; says which file of a Hub repository holds the weights.

    Raises:
        ValueError: nothing readable is there, the file is damaged, or it wants to run code.
        OSError: the Hub cannot be reached or refuses access; the message says how to authenticate.
    """
    path = Path(source).expanduser()
    if path.exists():
        weights = path if path.is_file() else find_weights(path, None if known is None else known.weights_file)
        return _open_files(path.resolve().name, weights, known=None)
    name = str(source)
    by_name = next((entry for entry in known_architectures() if entry.name == name.lower() and entry.hub_id), None)
    hub_id = by_name.hub_id if by_name is not None else name
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", hub_id) or path.suffix in (
        SAFETENSORS_SUFFIX,
        ".json",
        *PICKLE_SUFFIXES,
    ):
        raise ValueError(
            f"source={name!r}: no such file or folder, and it is neither a Hub id (owner/name) nor a known model. "
            f"Check the spelling (the working directory is {Path.cwd()}); `sparsepath models` lists the known models."
        )
    published = architecture_of_hub_id(hub_id)
    weights = _download(hub_id, published or known)
    return _open_files(hub_id, weights, known=published)


def find_weights(folder: Path, weights_file: str | None = None) -> Path:
    """The file in a folder that holds the weights.

    Args:
        folder: the folder to look in; subfolders are not searched.
        weights_file: a file name to prefer.

    Raises:
        ValueError: there is none, or several and none has a standard name.
    """
    preferred = STANDARD_FILES if weights_file is None else (weights_file, *STANDARD_FILES)
    for name in preferred:
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in (SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES))
    if not found:
        raise ValueError(
            f"source={folder.name!r} holds no weights. Looked for {', '.join(preferred)}, or one file that ends in "
            f"{', '.join((SAFETENSORS_SUFFIX, *PICKLE_SUFFIXES))}. Found: "
            f"{', '.join(sorted(path.name for path in folder.iterdir())) or 'nothing'}."
        )
    if len(found) > 1:
        raise ValueError(
            f"source={folder.name!r} holds several weight files and none has a standard name: "
            f"{', '.join(path.name for path in found)}. Pass the file itself."
        )
    return found[0]


def _download(hub_id: str, known: Architecture | None) -> Path:
    """Downloads the weights of a Hub repository and the small files beside them, or finds them in the local cache."""
    names = STANDARD_FILES if known is None or known.weights_file is None else (known.weights_file, *STANDARD_FILES)
    with _hub_errors(hub_id):
        weights, offline = _download_first(hub_id, names)
        if weights.name.endswith(INDEX_SUFFIX):
            for shard in _shards(weights):
                hf_hub_download(hub_id, shard.name, local_files_only=offline)
        for name in ("config.json", "preprocessor_config.json"):
            # Not every repository has them; what they would say is then asked for by name.
            with suppress(EntryNotFoundError):
                hf_hub_download(hub_id, name, local_files_only=offline)
    return weights


def _download_first(hub_id: str, names: tuple[str, ...]) -> tuple[Path, bool]:
    """The first of the names that the repository has, and whether only the local cache could be asked."""
    unreachable: LocalEntryNotFoundError | None = None
    for name in names:
        try:
            # After one failed connection only the local cache is asked, else every further name waits for retries.
            return Path(
                hf_hub_download(hub_id, name, local_files_only=unreachable is not None)
            ), unreachable is not None
        except LocalEntryNotFoundError as error:
            unreachable = error
        except EntryNotFoundError:
            continue
    if unreachable is not None:
        raise unreachable
    raise ValueError(
        f"{hub_id} holds no weights under a known name. Looked for {', '.join(names)}. Download its weights file and "
        "pass the path."
    )


@contextmanager
def _hub_errors(hub_id: str) -> Iterator[None]:
    """Turns the Hub's errors into messages that say what to do."""
    try:
        yield
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{hub_id} is not in the local cache and the Hub cannot be reached (offline, or HF_HUB_OFFLINE is set). "
            "Connect and try again, or download the weights elsewhere and pass the file. The repository may be gated: "
            f"{AUTHENTICATE}."
        ) from error
    except GatedRepoError as error:
        raise OSError(f"{hub_id} is gated and this login has no access: {AUTHENTICATE}.") from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{hub_id} does not exist on the Hub or is private. If it is spelt right, {AUTHENTICATE}."
        ) from error
    except HfHubHTTPError as error:
        raise OSError(f"{hub_id} could not be downloaded: {error}. If access was refused, {AUTHENTICATE}.") from error


def _open_files(label: str, weights: Path, known: Architecture | None) -> CheckpointSource:
    files = _shards(weights) if weights.name.endswith(INDEX_SUFFIX) else (weights,)
    tensors: dict[str, torch.Tensor] = {}
    for file in files:
        opened = _open_safetensors(file) if file.suffix == SAFETENSORS_SUFFIX else _open_pickle(file)
        twice = sorted(tensors.keys() & opened.keys())
        if twice:
            raise ValueError(f"{file.name} repeats tensors of another shard: {', '.join(twice[:20])}.")
        tensors |= opened
    if weights.name.endswith(INDEX_SUFFIX):
        absent = sorted(_weight_map(weights).keys() - tensors.keys())
        if absent:
            raise ValueError(
                f"{weights.name} names {len(absent)} tensors that no shard holds: {', '.join(absent[:20])}. The files "
                "are not of one version: download them together."
            )
    return CheckpointSource(
        label=label,
        tensors=tensors,
        config=_read_json(weights.parent / "config.json"),
        preprocessor=_read_json(weights.parent / "preprocessor_config.json"),
        known=known,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} beside the weights is not valid JSON ({error}). Repair or remove it.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path.name} beside the weights holds a JSON {type(content).__name__}, not an object. Repair or remove it."
        )
    return content


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard, of the index of a sharded checkpoint."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or {type(shard) for shard in weight_map.values()} != {str}:
        raise ValueError(
            f"{index.name} has no weight_map (tensor name -> file name), so it is not the index of a sharded "
            "checkpoint."
        )
    return weight_map


def _shards(index: Path) -> tuple[Path, ...]:
    # `Path(...).name`: an index may not point outside its own folder.
    return tuple(index.parent / Path(name).name for name in sorted(set(_weight_map(index).values())))


def _check_content(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{path.name} is missing, though the index of its checkpoint names it. Download it too.")
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version ") and b"git-lfs" in start:
        raise ValueError(f"{path.name} is a Git LFS pointer, not weights. Fetch the content with `git lfs pull`.")
    is_pickle = start.startswith(PICKLE_STARTS) or not start
    if path.suffix != SAFETENSORS_SUFFIX and not is_pickle:
        raise ValueError(
            f"{path.name} is no PyTorch file: it begins with {start[:16]!r}. Look at what was downloaded, a web page "
            f"perhaps; if it is in the safetensors format, let its name end in {SAFETENSORS_SUFFIX}."
        )


def _open_safetensors(path: Path) -> dict[str, torch.Tensor]:
    _check_content(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _open_pickle(path: Path) -> dict[str, torch.Tensor]:
    _check_content(path)
    try:
        # Only the zip format can be mapped into memory; older files are read whole.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise _damaged(path, error) from error
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        named = f" ({wanted.group(1)})" if wanted else ""
        raise ValueError(
            f"{path.name} was refused: it is not a plain state dict, loading it would run code{named}. Prefer the "
            "publisher's .safetensors file. If you trust the file, load it yourself in a separate process and save "
            "only its tensors with safetensors.torch.save_file."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    return _unwrap(loaded, path)


def _unwrap(loaded: Any, path: Path) -> dict[str, torch.Tensor]:
    """Follows the known container keys down to a mapping of tensors."""
    while isinstance(loaded, Mapping):
        tensors = {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
        inner = next((key for key in CONTAINER_KEYS if isinstance(loaded.get(key), Mapping)), None)
        # Beside a container the few loose tensors are training state (a step, an epoch), not weights.
        if inner is None and tensors:
            return tensors
        if inner is None:
            raise ValueError(
                f"{path.name} holds no state dict: its keys are {', '.join(map(str, list(loaded)[:10]))}. Looked for "
                f"tensors, or for one of {', '.join(CONTAINER_KEYS)} that holds them."
            )
        loaded = loaded[inner]
    raise ValueError(f"{path.name} holds a {type(loaded).__name__}, not a state dict (name -> tensor).")


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = next(iter(str(error).splitlines()), type(error).__name__).split(". ")[0]  # torch goes on with its advice
    return ValueError(
        f"{path.name} is truncated or damaged ({path.stat().st_size:,} bytes; {reason}). "
        "Compare its size with the publisher's and download it again."
    )
