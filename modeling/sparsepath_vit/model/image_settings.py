# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Settings of the image processors, checked before any image is looked at."""

import math
from typing import Any

import numpy as np
from transformers.image_utils import ChannelDimension, SizeDict

FIXED_SETTINGS = {
    "do_convert_rgb": True,
    "do_pad": True,
    "do_center_crop": False,
    "crop_size": None,
    "data_format": ChannelDimension.FIRST,
}


def sides(size: SizeDict) -> tuple[int | None, int | None]:
    """Height and width; None for what `size` does not say."""
    return size["height"], size["width"]


def _check_share(name: str, value: Any) -> None:
    if value is None or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} is not possible: it is a share of a patch's pixels and lies in [0, 1].")


def check_settings(**settings: Any) -> None:
    """Checks that do not need an image.

    Raises:
        ValueError: names the argument, its value and what it takes.
    """
    for name in ("patch_size", "max_pixels"):
        if settings[name] is None or settings[name] < 1:
            raise ValueError(f"{name}={settings[name]!r} is not possible: it is a number of pixels and at least 1.")
    _check_share("min_patch_coverage", settings["min_patch_coverage"])
    _check_share("background_fraction", settings["background_fraction"])
    for name, only in FIXED_SETTINGS.items():
        if settings.get(name) not in (None, only):
            raise ValueError(
                f"{name}={settings[name]!r} is not supported: images become RGB, channels first, are padded as far as "
                "patches and the batch need, and never cropped. Leave it out; crop before the call."
            )
    pad_size, patch_size = settings.get("pad_size"), settings["patch_size"]
    if pad_size is not None and not all(side and side > 0 and side % patch_size == 0 for side in sides(pad_size)):
        raise ValueError(
            f"pad_size={dict(pad_size)} is not possible: it takes height and width, both multiples of "
            f"patch_size={patch_size}."
        )
    for name in ("image_mean", "image_std"):
        value = settings[name]
        if isinstance(value, (list, tuple)) and len(value) != 3:
            raise ValueError(f"{name}={value!r} has {len(value)} values: give one per RGB channel, or a single number.")
    if settings["do_normalize"] and settings["image_std"] is not None and np.min(settings["image_std"]) <= 0:
        raise ValueError(f"image_std={settings['image_std']!r} is not possible: pixels are divided by it.")
    mpp, target_mpp = settings["mpp"], settings["target_mpp"]
    resolutions = [("target_mpp", target_mpp)] if target_mpp is not None else []
    if mpp is not None:
        resolutions += [("mpp", value) for value in (mpp if isinstance(mpp, (list, tuple)) else [mpp])]
    for name, value in resolutions:
        if value is None or not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}={value!r} is not possible: it is micrometres per pixel, finite and above 0.")


def check_resampling(
    do_resize: bool | None, size: SizeDict | None, mpp: float | list[float] | None, target_mpp: float | None
) -> None:
    """Checks that it is clear whether and how to resample; the resolution is never guessed.

    Raises:
        ValueError: names what is missing or contradicts.
    """
    by_size = do_resize and size is not None
    if mpp is None and target_mpp is not None and not by_size:
        raise ValueError(
            f"target_mpp={target_mpp} is set but mpp is missing: pass mpp=... (micrometres per pixel of the images, "
            "one or one per image), or do_resize=False in the call to take the pixels as they are."
        )
    if mpp is not None and target_mpp is None:
        raise ValueError(
            f"mpp={mpp} is given but target_mpp is not, so there is nothing to resample to: pass target_mpp=..., or "
            "leave mpp out to take the pixels as they are."
        )
    if mpp is not None and by_size:
        raise ValueError(f"mpp={mpp} and size={dict(size)} both say how to resample: pass mpp=None or size=None.")
    if do_resize and size is None and mpp is None:
        raise ValueError(
            "do_resize=True does not say to what: pass size={'height': ..., 'width': ...}, or mpp=... with target_mpp=."
        )
