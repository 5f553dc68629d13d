# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""SegPath: which file belongs to which label, split and slide.

SegPath (Komura et al., Patterns 2023) holds eight separate binary tasks, one per antibody: in an image stained for one
antigen the other cell types are there too, but nobody marked them. So each pair here has one label, and says nothing
about the other labels.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ...runtime.tables import read_table
from ..segmentation.pairs import IMAGE_ENDING, MASK_ENDING, SPLITS, SegmentationPair, SegmentationPairs

ANTIGENS = (
    "panCK_Epithelium",
    "aSMA_SmoothMuscle",
    "CD235a_RBC",
    "CD45RB_Leukocyte",
    "CD3CD20_Lymphocyte",
    "ERG_Endothelium",
    "MIST1_PlasmaCell",
    "MNDA_MyeloidCell",
)
COLUMNS = ("antigen", "filename", "train_val_test")
_SPLIT_NAMES = {**{split: split for split in SPLITS}, "val": "validation"}
_FILEINFO_ENDINGS = ("_fileinfo.csv", "_fileinfo.csv.gz")


def read_segpath(folder: str | os.PathLike[str], antigens: Sequence[str]) -> SegmentationPairs:
    """The pairs of some antigens of SegPath, with the authors' split.

    Args:
        folder: holds `<antigen>_fileinfo.csv` (or `.csv.gz`) and the images, in it or in folders one below.
        antigens: such as "panCK_Epithelium"; their order numbers the labels.

    Raises:
        ValueError: an unknown antigen (the known ones are listed), a table with other columns or splits, or images or
            masks that the table names and the folder lacks.

    Example:
    ```python
    >>> pairs = read_segpath("SegPath", ["panCK_Epithelium", "ERG_Endothelium"])
    >>> image, mask = pairs.split("train")[0].read()
    ```
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"segpath_dir={str(folder)!r} is no folder: it holds <antigen>_fileinfo.csv and the images.")
    tables = _fileinfo_tables(folder)
    known = [*ANTIGENS, *sorted(tables.keys() - set(ANTIGENS))]
    unknown = [name for name in antigens if name not in known]
    if unknown or not antigens or len(set(antigens)) < len(antigens):
        problem = f"unknown: {', '.join(unknown)}" if unknown else "none is named, or one twice"
        raise ValueError(f"antigens={','.join(antigens)!r}, {problem}. Known are {', '.join(known)}.")
    missing = [name for name in antigens if name not in tables]
    if missing:
        found = ", ".join(sorted(tables)) or "none"
        raise ValueError(
            f"{folder} has no table {missing[0]}_fileinfo.csv (or .csv.gz); tables found: {found}. Download it "
            f"together with the archive of {missing[0]}."
        )
    pairs = [pair for label, name in enumerate(antigens) for pair in _antigen_pairs(folder, tables[name], name, label)]
    return SegmentationPairs(tuple(pairs), tuple(antigens), str(folder))


def _fileinfo_tables(folder: Path) -> dict[str, Path]:
    """Tables in the folder and one below, by antigen."""
    tables = {}
    for pattern in ("*_fileinfo.csv*", "*/*_fileinfo.csv*"):
        for path in sorted(folder.glob(pattern)):
            for ending in _FILEINFO_ENDINGS:
                if path.name.endswith(ending):
                    tables.setdefault(path.name.removesuffix(ending), path)
    return tables


def _antigen_pairs(folder: Path, table: Path, antigen: str, label: int) -> list[SegmentationPair]:
    names = _read_fileinfo(table)
    places = [table.parent, table.parent / antigen, folder / antigen, folder]
    files = {file.name: file for place in reversed(places) if place.is_dir() for file in place.glob("*.png")}
    absent = [name + ending for name in names for ending in (IMAGE_ENDING, MASK_ENDING) if name + ending not in files]
    if absent:
        raise ValueError(
            f"{len(absent)} of {2 * len(names)} files that {table.name} names are missing, such as {absent[0]}: "
            f"expected beside the table or in {folder / antigen}. Extract the whole archive of {antigen}."
        )
    return [
        SegmentationPair(
            name, files[name + IMAGE_ENDING], files[name + MASK_ENDING], label, split, _slide_of(name, antigen)
        )
        for name, split in names.items()
    ]


def _read_fileinfo(table: Path) -> dict[str, str]:
    """Name of each pair, and its split. Rows may name the image, the mask or both."""
    names: dict[str, str] = {}
    for line, row in read_table(table, COLUMNS).rows:
        name = re.sub(f"({IMAGE_ENDING}|{MASK_ENDING})$", "", Path(row["filename"]).name)
        split = _SPLIT_NAMES.get(row["train_val_test"].lower())
        if split is None or names.get(name, split) != split:
            raise ValueError(
                f"{table}, line {line}: train_val_test={row['train_val_test']!r} of {name}: it takes train, val or "
                "test, and one of them for image and mask."
            )
        names[name] = split
    return names


def _slide_of(name: str, antigen: str) -> str:
    """`{antigen}_{celltype}_{slideID}_{x}_{y}` -> the slide."""
    return name.removeprefix(f"{antigen}_").rsplit("_", 2)[0]
