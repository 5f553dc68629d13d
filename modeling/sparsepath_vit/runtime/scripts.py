# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What scripts share: how their flags are spelled, and what a user reads where one fails."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any


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
