# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Recipes: YAML files that hold a script's flags."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_recipe_and_flags(
    parser: HfArgumentParser, argv: Sequence[str], defaults: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Flags, or a YAML recipe and flags that overrule it.

    Args:
        parser: of the script's dataclasses.
        argv: the command line; a recipe comes first and ends in .yaml or .yml.
        defaults: of the script, by field name; a recipe overrules them.

    Returns:
        One filled-in dataclass for each the parser has.

    Raises:
        ValueError: a recipe that cannot be read, or with an unknown key; a word that is neither recipe nor flag.
    """
    defaults = dict(defaults)
    if argv and argv[0].endswith((".yaml", ".yml")):
        defaults |= _read_recipe(Path(argv[0]), parser)
        argv = argv[1:]
    if argv and not argv[0].startswith("-"):
        raise ValueError(f"{argv[0]!r} is no recipe, which ends in .yaml or .yml, and no flag; --help lists the flags.")
    parser.set_defaults(**defaults)
    return parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)


def _read_recipe(path: Path, parser: HfArgumentParser) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"the recipe {path} cannot be read: {error}") from error
    known = {field.name for kind in parser.dataclass_types for field in dataclasses.fields(kind)}
    if not isinstance(recipe, dict) or set(recipe) - known:
        unknown = sorted(set(recipe) - known) if isinstance(recipe, dict) else recipe
        raise ValueError(
            f"the recipe {path} has unknown settings: {unknown}. They are the names of the flags (--help)."
        )
    return recipe
