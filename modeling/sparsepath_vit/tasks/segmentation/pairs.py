# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Images with the mask of one label each, their splits and slides; and folders of `X_HE.png` and `X_mask.png`."""

import fnmatch
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

logger = logging.getLogger(__name__)

IMAGE_ENDING, MASK_ENDING = "_HE.png", "_mask.png"
_NAMED = 10  # files that a message lists
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SegmentationPair:
    """One image and the mask of one label.

    Attributes:
        name: what the two files' names have in common.
        image: H&E image.
        mask: of the same size, 1 where the label is and 0 elsewhere.
        label: index into `SegmentationPairs.label_names`; the mask says nothing about the other labels.
        split: one of `SPLITS`.
        group: the slide (or patient); images of one group are not independent.
    """

    name: str
    image: Path
    mask: Path
    label: int
    split: str
    group: str

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The image (height, width, 3) uint8 RGB and the mask (height, width) uint8 of 0 and 1.

        Raises:
            ValueError: the mask is of another size than the image, has several channels, or other values than 0 and 1.
            OSError: a file is missing or damaged.
        """
        image, mask = np.asarray(_open(self.image).convert("RGB")), self.read_mask()
        if image.shape[:2] != mask.shape:
            raise ValueError(_size_mismatch(self, image.shape[1::-1], mask.shape[::-1]))
        return image, mask

    def read_mask(self) -> np.ndarray:
        """The mask alone, see `read`."""
        mask = np.asarray(_open(self.mask))
        if mask.ndim != 2:
            raise ValueError(
                f"the mask {self.mask} has {mask.shape[2]} channels: it takes one, with 0 for background and 1 for the "
                "label. Convert it, for instance with PIL's Image.convert('L') and a threshold."
            )
        values = np.unique(mask)
        if not np.isin(values, (0, 1)).all():
            shown = ", ".join(str(value) for value in values[:6].tolist()) + (", ..." if len(values) > 6 else "")
            raise ValueError(
                f"the mask {self.mask} holds the values {shown}: it takes 0 for background and 1 for the label. A mask "
                "of 0 and 255 becomes one with (mask > 127).astype('uint8')."
            )
        return mask.astype(np.uint8)

    def check(self, min_side: int = 1) -> None:
        """Reads the mask and the image's header.

        Args:
            min_side: pixels that width and height must have.

        Raises:
            ValueError: an image that is too small; otherwise as `read` does.
            OSError: as `read` does.
        """
        with _open(self.image, load=False) as image:
            size = image.size
        if min(size) < min_side:
            raise ValueError(
                f"the image {self.image} is {size[0]} x {size[1]} px (width x height), smaller than the {min_side} px "
                "that a crop or a patch takes: use smaller crops, or take the pair out."
            )
        mask = self.read_mask()
        if size != mask.shape[::-1]:
            raise ValueError(_size_mismatch(self, size, mask.shape[::-1]))


@dataclass(frozen=True)
class SegmentationPairs:
    """Pairs of one or several labels.

    Attributes:
        pairs: in a fixed order.
        label_names: by label index.
        source: where they come from, for messages.
    """

    pairs: tuple[SegmentationPair, ...]
    label_names: tuple[str, ...]
    source: str

    def split(self, name: str) -> list[SegmentationPair]:
        """The pairs of one split.

        Raises:
            ValueError: there are none of it, for any of the labels; the message counts what there is.
        """
        chosen = [pair for pair in self.pairs if pair.split == name]
        present = {pair.label for pair in chosen}
        for label, label_name in enumerate(self.label_names):
            if label not in present:
                counts = Counter(pair.split for pair in self.pairs if pair.label == label)
                held = ", ".join(f"{split} {counts[split]}" for split in SPLITS)
                raise ValueError(
                    f"the split {name!r} of {label_name} in {self.source} is empty (pairs: {held}): choose another "
                    "split, or complete the data."
                )
        return chosen

    def check(self, min_side: int = 1) -> None:
        """Reads every mask and every image's header.

        Args:
            min_side: pixels that width and height of an image must have.

        Raises:
            ValueError: the first pair that does not fit, see `SegmentationPair.check`.
        """
        for pair in tqdm(self.pairs, desc="checking masks", unit="pair", disable=None):
            pair.check(min_side)


def read_pairs(
    folder: str | os.PathLike[str],
    label_name: str = "foreground",
    eval_images: Sequence[str] = (),
    eval_fraction: float = 0.25,
    group_pattern: str | None = None,
    seed: int = 0,
) -> SegmentationPairs:
    """A folder of `X_HE.png` and `X_mask.png`, split into train and test. What else lies there is named in a line.

    Args:
        folder: holds the pairs.
        label_name: what the masks mark.
        eval_images: which X are held back: names, or patterns such as "103*". Drawn at random where none is given.
        eval_fraction: share of the groups that is drawn.
        group_pattern: regular expression that finds, in X, what images share that must not be split (a slide or a
            patient): its first group, or all it matches. Every image stands for itself by default.
        seed: of the drawing.

    Raises:
        ValueError: no pairs, an image without mask or mask without image, patterns that fit nothing, or an impossible
            fraction.
    """
    folder = Path(folder)
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    images, masks = (
        {path.name.removesuffix(ending): path for path in entries if path.name.endswith(ending)}
        for ending in (IMAGE_ENDING, MASK_ENDING)
    )
    if not images or not masks:
        raise ValueError(
            f"{folder} holds {len(images)} files X{IMAGE_ENDING} and {len(masks)} files X{MASK_ENDING}: expected pairs "
            "of them."
        )
    for found, others, ending in ((images, masks, MASK_ENDING), (masks, images, IMAGE_ENDING)):
        alone = sorted(found.keys() - others.keys())
        if alone:
            raise ValueError(
                f"{found[alone[0]]} has no {alone[0]}{ending} beside it ({len(alone)} of {len(found)} without a "
                "partner): add it, or take the file out of the folder."
            )
    if others := [path.name for path in entries if not path.name.endswith((IMAGE_ENDING, MASK_ENDING))]:
        shown = ", ".join(others[:_NAMED]) + (", ..." if len(others) > _NAMED else "")
        names = f"X{IMAGE_ENDING} or X{MASK_ENDING}"
        logger.warning("%s: %d entries are left out, as they are not called %s: %s", folder, len(others), names, shown)
    if not 0 < eval_fraction < 1:
        raise ValueError(f"eval_fraction={eval_fraction} is not possible: it lies between 0 and 1.")
    pairs = [
        SegmentationPair(name, images[name], masks[name], 0, "train", _group_of(name, group_pattern)) for name in images
    ]
    held_back = _named(images, eval_images) if eval_images else _drawn(pairs, eval_fraction, seed)
    split = [replace(pair, split="test") if pair.name in held_back else pair for pair in pairs]
    return SegmentationPairs(tuple(split), (label_name,), str(folder))


def _group_of(name: str, pattern: str | None) -> str:
    if pattern is None:
        return name
    try:
        match = re.search(pattern, name)
    except re.error as error:
        raise ValueError(f"group_pattern={pattern!r} is no regular expression: {error}.") from error
    if match is None:
        raise ValueError(f"group_pattern={pattern!r} finds nothing in {name!r}: every name needs a group.")
    return match[1] if match.re.groups else match[0]


def _named(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    chosen: dict[str, list[str]] = defaultdict(list)
    for pattern in patterns:
        chosen[pattern] = fnmatch.filter(names, pattern)
        if not chosen[pattern]:
            raise ValueError(f"eval_images: no image is called {pattern!r}; there are {', '.join(sorted(names)[:20])}.")
    return {name for found in chosen.values() for name in found}


def _drawn(pairs: Sequence[SegmentationPair], fraction: float, seed: int) -> set[str]:
    groups = sorted({pair.group for pair in pairs})
    count = max(1, round(fraction * len(groups)))
    chosen = set(np.random.default_rng(seed).permutation(groups)[:count].tolist())
    return {pair.name for pair in pairs if pair.group in chosen}


def _open(path: Path, load: bool = True) -> Image.Image:
    try:
        image = Image.open(path)
        if load:
            image.load()
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise OSError(f"{path} cannot be read as an image ({error}): copy or extract it again.") from error
    return image


def _size_mismatch(pair: SegmentationPair, image: Sequence[int], mask: Sequence[int]) -> str:
    return (
        f"the mask {pair.mask} is {mask[0]} x {mask[1]} px, its image {pair.image.name} {image[0]} x {image[1]}: both "
        "must be of one size."
    )
