# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A tiny PANDA folder in the format of Kaggle: train.csv, pyramidal JPEG TIFFs with their resolution, label masks.

Tissue is real where the shared data are present, else synthesised. Each mask label has its own texture, so that there
is something to learn.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from places import SHARED_DATA

sys.path.append(str(Path(__file__).parent / "slides"))

from slide_files import stained_image

REAL_TISSUE = SHARED_DATA / "rois/cmu1_1120x1120.png"
PROVIDER_MPP = {"radboud": 0.5, "karolinska": 0.5}
FACTORS = (4, 16)
GLEASON = {0: "0+0", 1: "3+3", 2: "3+4", 3: "4+3", 4: "4+4", 5: "4+5"}


def tissue_image(width, height, seed):
    """(height, width, 3) uint8 without background."""
    if not REAL_TISSUE.exists():
        return stained_image(width, height, [(0, 0, width, height)], seed)
    with Image.open(REAL_TISSUE) as image:
        pixels = np.asarray(image.convert("RGB"))
    generator = np.random.default_rng(seed)
    while True:  # the region has glass, too
        top, left = (int(generator.integers(side)) for side in pixels.shape[:2])
        rolled = np.roll(pixels, (-top, -left), (0, 1))
        found = np.tile(rolled, (-(-height // 1120), -(-width // 1120), 1))[:height, :width]
        if np.ptp(found, axis=-1).mean() > 40:
            return found


def paint(image, mask, rectangle, label):
    """Marks (x, y, width, height) with `label`, and darkens stripes in it whose distance grows with the label."""
    x, y, width, height = rectangle
    mask[y : y + height, x : x + width] = label
    rows = np.arange(height)[:, None, None] % (4 * label) < 2 * label
    box = np.s_[y : y + height, x : x + width]
    image[box] = np.where(rows, image[box] // 3, image[box])


def write_levels(path, image, mpp, factors=FACTORS, compression="jpeg", tile=64):
    """A pyramid as PANDA's: levels 1, 4, 16, resolution tags per cm. Levels are subsampled: labels stay labels."""
    options = {"tile": (tile, tile), "photometric": "rgb", "compression": compression, "metadata": None}
    options |= {"compressionargs": {"level": 95}} if compression == "jpeg" else {}
    tags = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"} if mpp else {"resolutionunit": "NONE"}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(image, **tags, **options)
        for factor in factors:
            tiff.write(image[::factor, ::factor], subfiletype=1, **options)


class PandaFolder:
    """Grows a PANDA folder slide by slide; `write_csv` completes it."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.rows = []
        for name in ("train_images", "train_label_masks"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def slide_path(self, image_id):
        return self.folder / "train_images" / f"{image_id}.tiff"

    def mask_path(self, image_id):
        return self.folder / "train_label_masks" / f"{image_id}_mask.tiff"

    def add_row(self, image_id, provider="radboud", isup=0, gleason=None):
        if gleason is None:
            gleason = "negative" if (isup, provider) == (0, "radboud") else GLEASON[isup]
        self.rows.append([image_id, provider, isup, gleason])

    def add(self, image_id, labels, provider="radboud", isup=0, size=256, side=128, mpp=None, gleason=None, mask=True):
        """A slide of size x size pixels; `labels` are those of its squares in raster order, 0 for glass."""
        seed = sum(map(ord, image_id))
        image, mask_labels = tissue_image(size, size, seed), np.zeros((size, size), np.uint8)
        columns = size // side
        for index, label in enumerate(labels):
            rectangle = (index % columns * side, index // columns * side, side, side)
            if label:
                paint(image, mask_labels, rectangle, label)
        image[mask_labels == 0] = 245
        write_levels(self.slide_path(image_id), image, PROVIDER_MPP.get(provider, 0.5) if mpp is None else mpp)
        if mask:
            self.write_mask(image_id, mask_labels)
        self.add_row(image_id, provider, isup, gleason)

    def write_mask(self, image_id, labels):
        """The label in the red channel, as PANDA's."""
        pixels = np.zeros((*labels.shape, 3), np.uint8)
        pixels[..., 0] = labels
        write_levels(self.mask_path(image_id), pixels, None, compression="deflate")

    def write_csv(self):
        with (self.folder / "train.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["image_id", "data_provider", "isup_grade", "gleason_score"])
            writer.writerows(self.rows)
        return self.folder


def small_panda(folder, slides=12):
    """`slides` Radboud slides of 2 x 2 squares of 128 px, one class each, and half as many of Karolinska."""
    panda = PandaFolder(folder)
    for number in range(slides):
        labels = [1 + (number + offset) % 5 for offset in range(4)]
        panda.add(f"radboud{number:02d}", labels, "radboud", isup=number % 3)
    for number in range(slides // 2):
        panda.add(f"karolinska{number:02d}", [1, 2, 1, 2], "karolinska", isup=number % 2)
    return panda.write_csv()
