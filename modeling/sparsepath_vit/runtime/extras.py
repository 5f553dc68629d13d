# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a user reads where an extra (`slides`, `train`) is not installed; how scripts read flags and report errors."""

import argparse
import importlib
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def install_command(extra: str) -> str:
    """The command that installs an extra.

    Args:
        extra: `"slides"`, `"train"` or `"view"`.
    """
    return f'pip install "sparsepath-vit[{extra}]"'


@contextmanager
def imports_of_extra(extra: str, *used_later: str, asked_by: str = "this script") -> Iterator[None]:
    """Around the imports of a script or command: where one fails, it ends with the command that installs the extra.

    Args:
        extra: the extra that installs what is imported.
        *used_later: modules that the script imports only when it comes to them, perhaps after hours.
        asked_by: what the message calls the script or command.

    Raises:
        SystemExit: a module of the extra is missing; the message names it.

    Example:
    ```python
    >>> from sparsepath_vit.runtime.extras import imports_of_extra

    >>> with imports_of_extra("train", "matplotlib"):
    ...     from sparsepath_vit.tasks.classification.roi_files import load_labelled_rois
    ```
    """
    try:
        yield
        for module in used_later:
            importlib.import_module(module)
    except ImportError as error:
        if (error.name or "").startswith("sparsepath_vit"):  # a fault of this package, which no extra mends
            raise
        raise SystemExit(
            f"error: {asked_by} needs the extra '{extra}', and {error.name or 'a library of it'} cannot be imported "
            f"({error}). Install it with: {install_command(extra)}"
        ) from error


def require(module: str, extra: str = "slides") -> ModuleType:
    """Imports `module`, which an extra installs.

    Raises:
        ImportError: it is missing or its shared library does not load; the message gives the install command.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # openslide raises OSError-like errors where its library is missing
        raise ImportError(
            f"{module} is needed {'to work on slides' if extra == 'slides' else 'for this'} and cannot be imported "
            f"({error}). Install it with: {install_command(extra)}"
        ) from error


class ScriptParser(argparse.ArgumentParser):
    """A parser whose flags are written with dashes, and taken with underscores too, as by `HfArgumentParser`.

    Args:
        description: the script's docstring, whose lines are kept.
        **kwargs: of `ArgumentParser`.
    """

    def __init__(self, description: str | None = None, **kwargs: Any) -> None:
        super().__init__(
            **{"description": description, "formatter_class": argparse.RawDescriptionHelpFormatter, **kwargs}
        )

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As `ArgumentParser.parse_known_args`."""
        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args([_with_dashes(argument) for argument in arguments], namespace)


def comma_separated(kind: type[int] | type[float], least: float = 0) -> Callable[[str], tuple[int | float, ...]]:
    """The type of a flag that takes several numbers, such as `--sizes 224,1400`.

    Args:
        kind: of each number.
        least: the smallest that is taken.
    """

    def numbers(text: str) -> tuple[int | float, ...]:
        try:
            found = tuple(kind(part) for part in text.split(","))
        except ValueError:
            found = ()
        if not found or not all(least <= number < math.inf for number in found):
            words = f"{'whole ' if kind is int else ''}numbers of {least} at least"
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}, with commas between and without spaces")
        return found

    return numbers


def run_script(run: Callable[..., object], *arguments: Any) -> None:
    """Runs a script: log lines are plain text, and what is wrong with the input is one line without a traceback.

    Args:
        run: the script's work.
        *arguments: for it.

    Raises:
        SystemExit: the input cannot be used (ValueError, OSError), or a library is missing (ImportError).
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(*arguments)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from error


def _with_dashes(argument: str) -> str:
    """`--roi_size=3430` -> `--roi-size=3430`; values stay as they are."""
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if argument.startswith("--") else argument
