# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What a folder holds: its slides, and for everything else the reason why it is none."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .dicom_series import DICOM_SUFFIXES, WHOLE_SLIDE, may_be_dicom, read_dicom_header, series_in
from .ome_parts import files_of_ome, may_have_parts
from .reader import Slide
from .store import SETTINGS_FILE
from .unsupported_formats import reason_against_format

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
SLIDE_SUFFIXES = (
    *(".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi"),
    *(".qptiff", ".btf", ".tf2", ".tf8", ".ptif", ".ptiff", *DICOM_SUFFIXES),
    *IMAGE_SUFFIXES,
)
_ZARR_FILES = (".zattrs", ".zgroup", ".zarray", "zarr.json")
_PICTURE_WORDS = r"(?:thumbnail|thumb|macro|label|overview|preview|mask|heatmap|contour|annotation)s?|prune_scores"
_PICTURE_OF = re.compile(rf"(?P<slide>.+?)(?:[-_. ]tissue)?[-_. ](?:{_PICTURE_WORDS})", re.IGNORECASE)
_PICTURE_FOLDER = re.compile(rf"(?:.*[-_. ])?(?:{_PICTURE_WORDS})", re.IGNORECASE)
_NAMED_ALONE = 20  # files left out for one reason; more share a line


class FoundSlide(NamedTuple):
    """A slide: its file, and its name where that is not the file's."""

    path: Path
    name: str | None = None


class LeftOut(NamedTuple):
    """A file or folder that is not taken for a slide, and why."""

    path: Path
    reason: str


class FolderContent(NamedTuple):
    """The slides of a folder and its subfolders, in order of their paths, and everything else."""

    slides: list[FoundSlide]
    left_out: list[LeftOut]


def search_folder(folder: Path) -> FolderContent:
    """Finds the slides of `folder` and its subfolders, also of linked ones.

    Raises:
        OSError: the folder cannot be read.
    """
    content = FolderContent([], [])
    if reason := _reason_against_folder(folder, sorted(folder.iterdir())):
        content.left_out.append(LeftOut(folder, reason))
        return content
    _search(folder, content, {_identity(folder): folder})
    return _without_picture_folders(content)


def report_left_out(left_out: Sequence[LeftOut]) -> None:
    """Logs a line for each entry; one for all of a reason that holds for very many."""
    by_reason: dict[str, list[Path]] = {}
    for path, reason in left_out:
        by_reason.setdefault(reason, []).append(path)
    for reason, paths in by_reason.items():
        if len(paths) <= _NAMED_ALONE:
            for path in paths:
                logger.warning("%s is left out: %s.", path, reason)
        else:
            named = ", ".join(map(str, paths[:_NAMED_ALONE]))
            logger.warning("%d files are left out: %s: %s, ...", len(paths), reason, named)


def same_slide_key(path: Path) -> tuple[object, ...]:
    """Equal for two paths of one slide: other names and links of a file, and files of one DICOM series or OME-TIFF.

    A path that does not exist is itself.
    """
    try:
        if path.suffix.lower() in DICOM_SUFFIXES:
            header = read_dicom_header(path)
            if header is not None and header.series:
                return (_identity(path.resolve().parent), header.series)
        return _identity(next(iter(files_of_ome(path)), path) if may_have_parts(path) else path)
    except OSError:
        return (path.absolute(),)


def files_of_slide(path: Path) -> list[Path]:
    """Every file that the slide at `path` consists of, `path` itself first.

    Raises:
        OSError: they cannot be listed.
    """
    suffix = path.suffix.lower()
    others: list[Path] = []
    if suffix == ".mrxs" and path.with_suffix("").is_dir():
        others = sorted(file for file in path.with_suffix("").iterdir() if file.is_file())
    elif suffix in (".vms", ".vmu"):
        others = [path.parent / name for name in _files_of_index(path) if (path.parent / name).is_file()]
    elif suffix in (*DICOM_SUFFIXES, "") and path.is_file():
        header = read_dicom_header(path)
        others = series_in(path.parent).get(header.series or "", []) if header is not None else []
    elif may_have_parts(path) and path.is_file():
        others = files_of_ome(path)
    return [path, *(file for file in others if file != path)]


def _search(folder: Path, content: FolderContent, seen: dict[tuple[object, ...], Path]) -> None:
    """Adds what `folder` holds to `content`; `seen` are the files and folders met so far, by identity."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        content.left_out.append(LeftOut(folder, f"the folder cannot be read ({error.strerror})"))
        return
    slides, reasons = _dicom_slides(folder, entries)
    files = [path for path in entries if path.suffix.lower() in SLIDE_SUFFIXES and path.is_file()]
    files = [path for path in files if path not in reasons and not path.name.startswith(".")]
    reasons |= _parts_of_slides(files)
    reasons |= _pictures_of_slides([path for path in files if path not in reasons])
    only_slide = len(slides) == 1 and not [path for path in files if path not in reasons and path not in slides]
    for path in entries:
        reason = _reason_against(path, entries) or reasons.get(path)
        known = None if reason else seen.setdefault(_identity(path), path)
        if reason is None and known != path:
            reason = f"it is {known} under another name"
        if reason:
            content.left_out.append(LeftOut(path, reason))
        elif path.is_dir():
            _search(path, content, seen)
        else:
            is_series = path in slides and only_slide
            content.slides.append(FoundSlide(path, folder.absolute().name if is_series else None))


def _identity(path: Path) -> tuple[object, ...]:
    status = os.stat(path)
    return (status.st_dev, status.st_ino)


def _reason_against(path: Path, entries: Sequence[Path]) -> str | None:
    """Why an entry of a folder is neither a slide nor to be searched, from what can be told of it alone."""
    if path.is_symlink() and not path.exists():
        return f"it is a dead link to {os.readlink(path)}"
    if path.name.startswith("._"):
        return "macOS keeps notes on another file in it"
    if path.name.startswith("."):
        return f"it is a hidden {'folder' if path.is_dir() else 'file'}"
    if path.is_dir():
        try:
            return _data_of_slide(path, entries) or _reason_against_folder(path, sorted(path.iterdir()))
        except OSError as error:
            return f"the folder cannot be read ({error.strerror})"
    if not path.is_file():
        return "it is no regular file"
    suffix = path.suffix.lower()
    if reason := reason_against_format(path):
        return reason
    if suffix not in SLIDE_SUFFIXES and not _is_dicom(path):
        return f"{suffix} is no ending of a slide" if suffix else "it has no ending, and is no DICOM file"
    return None


def _reason_against_folder(folder: Path, entries: Sequence[Path]) -> str | None:
    names = {path.name for path in entries}
    if folder.suffix.lower() == ".zarr" or names & set(_ZARR_FILES):
        return "OME-Zarr is not supported: export it as OME-TIFF"
    if "ImageProperties.xml" in names:
        return "it holds Zoomify tiles, which are not supported: export the slide as OME-TIFF or SVS"
    if "Slidedat.ini" in names:
        return "it holds the data of a MIRAX slide: its .mrxs file lies beside the folder and has the folder's name"
    if SETTINGS_FILE in names and any(name.endswith(".h5") for name in names):
        return "it holds embeddings"
    return None


def _data_of_slide(folder: Path, entries: Sequence[Path]) -> str | None:
    for path in entries:
        if path.suffix.lower() == ".mrxs" and path.stem == folder.name:
            return f"it holds the data of {path.name}"
        if path.suffix.lower() == ".dzi" and folder.name == f"{path.stem}_files":
            return f"it holds the tiles of {path.name}"
        if path.suffix.lower() == ".vsi" and folder.name == f"_{path.stem}_":
            return f"it holds the data of {path.name}"
    return None


def _is_dicom(path: Path) -> bool:
    try:
        return may_be_dicom(path) and read_dicom_header(path) is not None
    except OSError:
        return False


def _dicom_slides(folder: Path, entries: Sequence[Path]) -> tuple[set[Path], dict[Path, str]]:
    """The file that stands for each DICOM series, and why the other DICOM files of the folder are no slides."""
    if not any(may_be_dicom(path) for path in entries):
        return set(), {}
    slides: set[Path] = set()
    reasons: dict[Path, str] = {}
    for files in series_in(folder).values():
        slides.add(files[0])
        reasons |= dict.fromkeys(files[1:], f"it belongs to the DICOM series of {files[0].name}")
    for path in entries:
        if path not in slides and path not in reasons and may_be_dicom(path) and path.is_file():
            reason = _other_dicom(path)
            reasons |= {path: reason} if reason else {}
    return slides, reasons


def _other_dicom(path: Path) -> str | None:
    """Why a DICOM file of no whole-slide series is no slide; None where that is for the reader to say."""
    try:
        header = read_dicom_header(path)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if header is None or header.sop_class in (None, WHOLE_SLIDE):
        return None
    return f"it is DICOM, but no whole slide (SOP class {header.sop_class})"


def _parts_of_slides(files: Sequence[Path]) -> dict[Path, str]:
    """The files that an index file names (Hamamatsu VMS and VMU), and those of an OME-TIFF but its first."""
    parts: dict[Path, str] = {}
    for file in files:
        if file not in parts and may_have_parts(file):
            first, *others = files_of_ome(file) or [file]
            parts |= dict.fromkeys(others, f"it is a part of {first.name}")
    for index in files:
        if index.suffix.lower() in (".vms", ".vmu"):
            parts |= {index.parent / name: f"it is a part of {index.name}" for name in _files_of_index(index)}
    return parts


def _files_of_index(index: Path) -> Iterator[str]:
    """The file names in an index file of lines KEY=VALUE."""
    with open(index, encoding="utf-8", errors="replace") as file:
        for line in file.read(2**20).splitlines():
            key, _, value = line.partition("=")
            if re.search("File", key) and value.strip():
                yield value.strip()


def _pictures_of_slides(files: Sequence[Path]) -> dict[Path, str]:
    """Thumbnails, labels and masks of slides beside them, told by their names.

    Such a name is that of another file with a word such as thumbnail at its end. A plain picture is one already when
    it has the very name of a scan (slide.jpg or slide.svs.jpg beside slide.svs).
    """
    scans = [path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES]
    of_scans = {name: path for path in scans for name in _names(path)}
    of_all = {name: path for path in files for name in _names(path)} | of_scans
    pictures: dict[Path, str] = {}
    for path in files:
        match = _PICTURE_OF.fullmatch(path.stem)
        slide = of_all.get(match["slide"].lower()) if match else None
        if slide is None and path.suffix.lower() in IMAGE_SUFFIXES:
            slide = of_scans.get(path.stem.lower())
        if slide not in (None, path):
            pictures[path] = f"its name is that of a picture of {slide.name}: give the file itself to have it"
    return pictures


def _names(path: Path) -> tuple[str, ...]:
    return Slide.name_of(path).lower(), path.stem.lower(), path.name.lower()


def _without_picture_folders(content: FolderContent) -> FolderContent:
    """Takes out what lies in a folder called thumbnails, masks, ... and has the name of a scan found elsewhere."""
    scans = {
        Slide.name_of(path).lower(): path for path, _ in content.slides if path.suffix.lower() not in IMAGE_SUFFIXES
    }
    slides: list[FoundSlide] = []
    left_out = list(content.left_out)
    for found in content.slides:
        scan = scans.get(Slide.name_of(found.path).lower())
        if scan not in (None, found.path) and _PICTURE_FOLDER.fullmatch(found.path.parent.name):
            left_out.append(LeftOut(found.path, f"it is a picture of {scan}, as its folder says"))
        else:
            slides.append(found)
    return FolderContent(slides, left_out)
