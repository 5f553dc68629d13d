# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A tiny folder in SegPath's format: two tissues in every image, of which the mask marks the antigen's own."""

import csv
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"panCK_Epithelium": (150, 60, 140), "ERG_Endothelium": (60, 140, 150)}
BOTH = tuple(COLORS)
SIDE = 36


def two_tissues(seed, side=SIDE):
    """(side, side, 3) uint8, and the bool masks of both tissues: a rectangle in the left and one in the right half."""
    generator = np.random.default_rng(seed)
    image = np.full((side, side, 3), 235.0)
    masks, half = {}, side // 2
    lefts = generator.permutation([0, half])
    for antigen, left in zip(BOTH, lefts, strict=True):
        mask = np.zeros((side, side), bool)
        top, height = generator.integers(0, side // 4), generator.integers(side // 2, 3 * side // 4)
        mask[top : top + height, left + 1 : left + half - 1] = True
        image[mask] = COLORS[antigen]
        masks[antigen] = mask
    image += generator.normal(0, 6, image.shape)
    return image.clip(0, 255).astype(np.uint8), masks


def write_pair(folder, name, image, mask):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(folder / f"{name}_HE.png")
    Image.fromarray(np.asarray(mask, dtype=np.uint8)).save(folder / f"{name}_mask.png")


def write_fileinfo(path, antigen, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["antigen", "filename", "train_val_test"])
        writer.writerows([antigen, filename, split] for filename, split in rows)


def small_segpath(folder, splits=("train",) * 6 + ("val",) + ("test",) * 3, side=SIDE):
    """Both antigens, one image per slide and entry of `splits`; the second table is gzipped, its images in a folder."""
    folder = Path(folder)
    for number, (antigen, ending) in enumerate(zip(BOTH, ("", ".gz"), strict=True)):
        place = folder / antigen if ending else folder
        rows = []
        for index, split in enumerate(splits):
            image, masks = two_tissues(100 * number + index, side)
            name = f"{antigen}_{index:03d}_{index}_{984 * index}"
            write_pair(place, name, image, masks[antigen])
            rows += [(f"{name}_HE.png", split), (f"{name}_mask.png", split)]
        write_fileinfo(folder / f"{antigen}_fileinfo.csv{ending}", antigen, rows)
    return folder


def small_pairs(folder, count=4, side=SIDE):
    for index in range(count):
        image, masks = two_tissues(index, side)
        write_pair(folder, f"case{index // 2}_{index}", image, masks[BOTH[0]])
    return Path(folder)
