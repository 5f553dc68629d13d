# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Saving writes the source files beside a checkpoint, so that it loads where this package is not installed.

Transformers does so itself only for classes that were loaded from remote code, and then copies over files that another
process may be reading. The mixins here do it whenever a configuration, a model or an image processor is saved.
"""

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

logger = logging.get_logger(__name__)

# The files that an `auto_map` names (configurations, models, image processor) carry the model's name; everything else
# follows from their relative imports.
ENTRY_SUFFIX = "_sparsepath_vit"
# In the first line of each of our files: what tells them from a file of the same name that somebody else wrote.
MARK = "The SparsePathViT authors"


def remote_code_files(auto_map: Mapping[str, Any] | None = None) -> tuple[Path, ...]:
    """The source files that `trust_remote_code=True` needs: those an `auto_map` names and all they import relatively.

    Args:
        auto_map: Auto class -> `"module.Class"`, or a mapping of backends to such references; by default the files of
            all models. Named files that do not lie beside this one are left out, see `write_remote_code`.

    Returns:
        `tuple[Path, ...]`: paths beside this file, sorted by name.

    Raises:
        ValueError: one of them imports something outside the flat folder, which remote code cannot.
    """
    source = Path(__file__).parent
    if auto_map is None:
        entries = set(source.glob(f"*{ENTRY_SUFFIX}.py"))
    else:
        entries = {source / name for name in _named_files(auto_map) if (source / name).is_file()}
    try:
        imported = {Path(name) for entry in entries for name in get_relative_import_files(entry)}
    except FileNotFoundError as error:
        raise ValueError(
            f"Remote code is one flat folder, but a model file imports {Path(error.filename).stem}, which does not lie "
            "in it: move it beside the model files."
        ) from error
    return tuple(sorted(entries | imported))


def write_remote_code(output_dir: str | Path, auto_map: Mapping[str, Any]) -> tuple[Path, ...]:
    """Writes the source files that `auto_map` needs into a folder, each in full or not at all.

    Files of ours that already lie there for something else, such as the image processor's beside a model, are brought
    to the same version. Nothing is removed: what is no longer named is never loaded. A file of the same name that is
    not ours stays as it is, with a warning, for a saved model matters more than its code.

    Code loaded from a local checkpoint knows only the files of the class that was asked for: a configuration saved by
    itself then lacks those of its models, which is warned of. Saving the model writes them.

    Args:
        output_dir: an existing folder, usually that of a saved checkpoint.
        auto_map: see `remote_code_files`.

    Returns:
        `tuple[Path, ...]`: the files written.

    Raises:
        ValueError: `output_dir` is no folder.
    """
    output_dir = Path(output_dir)
    if not output_dir.is_dir():
        raise ValueError(f"output_dir={output_dir.name!r} is no folder: save the checkpoint there first.")
    source = Path(__file__).parent
    if output_dir.samefile(source):
        return ()
    needed = remote_code_files(auto_map)
    lying_there = [file for file in source.glob("[!_]*.py") if _is_ours(output_dir / file.name)]
    written = []
    for file in sorted({*needed, *lying_there}):
        target = output_dir / file.name
        if target.exists() and not _is_ours(target):
            logger.warning(
                f"{target} was not written by SparsePathViT and stays as it is: the model in this folder will not load "
                "with trust_remote_code=True. Save it into a folder of its own."
            )
            continue
        _copy_whole(file, target)
        written.append(target)
    absent = [
        name for name in _named_files(auto_map) if not any((folder / name).exists() for folder in (source, output_dir))
    ]
    if absent:
        logger.warning(
            f"{', '.join(absent)} is missing in {output_dir}: this configuration was loaded without its model's code. "
            "Save the model itself into the folder, or copy the .py files of the checkpoint it comes from."
        )
    return tuple(written)


def _named_files(auto_map: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the files of ours that an `auto_map` points at."""
    references: list[Any] = []
    for value in auto_map.values():
        references += value.values() if isinstance(value, Mapping) else [value]
    return tuple(sorted({f"{_module(reference)}.py" for reference in references if _is_our_reference(reference)}))


def _module(reference: str) -> str:
    """`"owner/name--module.Class"` or `"module.Class"` -> `"module"`."""
    return reference.rpartition("--")[2].partition(".")[0]


def _is_our_reference(reference: Any) -> bool:
    return isinstance(reference, str) and _module(reference).endswith(ENTRY_SUFFIX)


def _is_ours(file: Path) -> bool:
    """Whether it may be replaced: one of ours, or the empty file that an interrupted copy leaves."""
    if not file.is_file():
        return False
    with open(file, encoding="utf-8", errors="replace") as opened:
        first = opened.readline()
    return not first or MARK in first


def _copy_whole(file: Path, target: Path) -> None:
    """Copies a file so that a process that loads the folder meanwhile reads the old or the new one, never a part."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        shutil.copyfile(file, temporary)  # with the time of now: pushing uploads what is newer than before saving
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _prepare_folder(save_directory: str | os.PathLike, auto_map: Mapping[str, Any]) -> None:
    """Writes the code before Transformers writes the rest; what it says of a path that is a file is left to it."""
    if not os.path.isfile(save_directory):
        os.makedirs(save_directory, exist_ok=True)
        write_remote_code(save_directory, auto_map)


def _without_code(timestamps: dict[str, float], auto_map: Mapping[str, Any]) -> dict[str, float]:
    """`save_pretrained(push_to_hub=True)` uploads what it finds changed: code it has just written counts as new."""
    code = {file.name for file in remote_code_files(auto_map)}
    return {name: time for name, time in timestamps.items() if name not in code}


class RemoteCodeMixin:
    """Makes `save_pretrained` and `push_to_hub` write the code of an image processor or a configuration.

    Put it before the Transformers class. The class says in `own_auto_map` by which references it is loaded.
    """

    own_auto_map: ClassVar[Mapping[str, Any]]

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As of the Transformers class, with the source files for `trust_remote_code=True`."""
        _prepare_folder(save_directory, self.own_auto_map)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        return _without_code(super()._get_files_timestamps(working_dir), self.own_auto_map)


class ConfigRemoteCodeMixin(RemoteCodeMixin):
    """For a configuration: config.json names all its Auto classes, and the files in the same folder."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, as they are written to config.json.

        References to our files are those of this class, whatever it was loaded or made from: Transformers may have put
        the name of a Hub repository before them, or added that of another class. Those that a user's own classes
        registered stay.
        """
        output = super().to_dict()
        stored = output.get("auto_map") or {}
        others = {name: reference for name, reference in stored.items() if not _is_our_reference(reference)}
        return {**output, "auto_map": {**self.own_auto_map, **others}}


class ModelRemoteCodeMixin:
    """For a model, whose configuration says which files it needs.

    Saving the configuration is not enough: loaded from a local checkpoint it lies apart from the model's files.
    """

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As of the Transformers class, with the source files for `trust_remote_code=True`.

        The process that writes the configuration writes them. A model with PEFT adapters inside saves these alone, and
        no code.
        """
        saves_adapters = getattr(self, "_hf_peft_config_loaded", False)
        if self.should_save_on_this_rank(is_main_process) and not saves_adapters:
            _prepare_folder(save_directory, self.config.own_auto_map)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        return _without_code(super()._get_files_timestamps(working_dir), self.config.own_auto_map)
