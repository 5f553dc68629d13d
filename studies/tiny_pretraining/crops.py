# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Images and crops for self-supervised training: two views of one place, several scales, stain jitter, bare glass.

Every batch is a function of the seed and the step alone, so that a resumed run sees exactly what an uninterrupted one
would have seen.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SMALLEST_CROP = 48  # source pixels; below, a crop is only interpolation
VIEW_SCALES = (0.8, 1.25)  # of each view, relative to the place both show
STAIN_GAINS = (0.8, 1.25)  # factor on each channel's optical density
GLASS_LEVELS = (0.86, 0.98)  # white of empty slide, as a share of full white
GLASS_TINT = 0.015
GLASS_NOISE = 0.008


def find_images(data_dir: Path, patterns: Sequence[str], held_out: Sequence[str]) -> list[Path]:
    """The training images: everything the patterns match except what is held out.

    Args:
        data_dir: folder of the images.
        patterns: globs relative to `data_dir`.
        held_out: paths relative to `data_dir`; one that ends in "/" holds out the whole folder.

    Raises:
        ValueError: the folder is missing, or a pattern matches nothing.
    """
    if not data_dir.is_dir():
        raise ValueError(f"data_dir={str(data_dir)!r} is no folder: pass the folder of the training images.")
    files: set[Path] = set()
    for pattern in patterns:
        matching = {path for path in data_dir.glob(pattern) if path.is_file()}
        if not matching:
            raise ValueError(f"images: the pattern {pattern!r} matches no file in {data_dir}.")
        files |= matching

    def is_held_out(path: Path) -> bool:
        name = path.relative_to(data_dir).as_posix()
        return any(name == entry or (entry.endswith("/") and name.startswith(entry)) for entry in held_out)

    return sorted(path for path in files if not is_held_out(path))


def read_held_out(path: Path) -> list[str]:
    """The entries of a held-out list: one path a line; empty lines and lines that begin with "#" are comments."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


class CropSampler:
    """Draws pairs of views from images held in memory.

    Args:
        files: images Pillow reads; a large one is drawn from more often, in proportion to its side.
        seed: of the whole run.
        scales: smallest and largest source pixels per view pixel.
        glass_share: share of the views into which bare glass is painted.

    Raises:
        ValueError: there is no image.
    """

    def __init__(
        self, files: Sequence[Path], *, seed: int, scales: tuple[float, float] = (0.5, 2.5), glass_share: float = 0.4
    ) -> None:
        if not files:
            raise ValueError("files is empty: there is no image to train on.")
        self.images = [_read_image(path) for path in files]
        self.seed = seed
        self.scales = scales
        self.glass_share = glass_share
        sides = np.array([math.sqrt(image.width * image.height) for image in self.images])
        self._probabilities = sides / sides.sum()

    def views(self, step: int, pairs: int, size: int) -> torch.Tensor:
        """The views of one step.

        Args:
            step: number of the step.
            pairs: places shown.
            size: pixels of a view's side.

        Returns:
            (2 * pairs, 3, size, size) float32 in 0..1: first one view of every place, then the other.
        """
        generator = np.random.default_rng([self.seed, step])
        drawn = [self._pair(generator, size) for _ in range(pairs)]
        return torch.from_numpy(np.stack([views[which] for which in range(2) for views in drawn]))

    def _pair(self, generator: np.random.Generator, size: int) -> list[np.ndarray]:
        image = self.images[generator.choice(len(self.images), p=self._probabilities)]
        largest = min(image.size)
        scale = math.exp(generator.uniform(*np.log(self.scales)))
        side = float(np.clip(size * scale, min(SMALLEST_CROP, largest), largest))
        center = [generator.uniform(side / 2, length - side / 2) for length in image.size]
        views = []
        for _ in range(2):
            view_side = min(side * math.exp(generator.uniform(*np.log(VIEW_SCALES))), largest)
            shifts = generator.uniform(-0.2, 0.2, 2) * side
            left, top = (
                float(np.clip(middle + shift - view_side / 2, 0, length - view_side))
                for middle, shift, length in zip(center, shifts, image.size, strict=True)
            )
            box = (left, top, min(left + view_side, image.width), min(top + view_side, image.height))
            view = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
            views.append(self._augmented(np.asarray(view, dtype=np.float32) / 255, generator))
        return views

    def _augmented(self, view: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Stain jitter in optical density, bare glass, flips and turns: (size, size, 3) -> (3, size, size)."""
        gains = np.exp(generator.uniform(*np.log(STAIN_GAINS), 3)).astype(np.float32)
        view = np.maximum(view, 1 / 255) ** gains  # a factor on the density is a power of the intensity
        if generator.random() < self.glass_share:
            view = _with_glass(view, generator)
        view = np.rot90(view, generator.integers(4))
        if generator.random() < 0.5:
            view = view[:, ::-1]
        return np.ascontiguousarray(view.transpose(2, 0, 1), dtype=np.float32)


def _read_image(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")


def _with_glass(view: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Replaces an irregular part of a view by empty slide: most of the images were cut out of the middle of tissue."""
    size = view.shape[0]
    coarse = Image.fromarray(generator.standard_normal((4, 4)).astype(np.float32))
    field = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    is_glass = field > np.quantile(field, generator.uniform(0.2, 0.8))
    color = generator.uniform(*GLASS_LEVELS) + generator.uniform(-GLASS_TINT, GLASS_TINT, 3)
    glass = color + GLASS_NOISE * generator.standard_normal((size, size, 1))
    return np.where(is_glass[..., None], glass.clip(0, 1), view).astype(np.float32)
