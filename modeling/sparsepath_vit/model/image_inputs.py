# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""From whatever a user calls an image to one RGB tensor, or to an error that says what to do.

A tensor made here is (3, height, width), either uint8 in 0..255 or float32 in 0..1. The dtype alone says which: an
integer image is never taken for a scaled one, nor the other way round.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers.image_utils import ChannelDimension
from transformers.utils import is_vision_available

from .pillow_images import open_without_limit, pil_to_rgb, reason_to_refuse_pil

if is_vision_available():
    import PIL.Image

CHANNEL_COUNTS = (1, 3, 4)
# Rounding of a float16 or a resampled image; anything further outside 0..1 is another scale.
_CODECS_OFTEN_LEFT_OUT = ("webp", "zstd", "lzma")  # of Pillow's TIFF decoder, as it is built
RANGE_TOLERANCE = 1e-4


def flatten_images(images: Any) -> list[Any]:
    """The single images in `images`: nested lists are opened and 4-D arrays split along their first axis.

    Args:
        images: an image (path, PIL image, numpy array, torch tensor), a 4-D batch of them, or lists of either.

    Returns:
        `list`: paths, PIL images and arrays in the order given.

    Raises:
        ValueError: there is no image at all.
    """

    def walk(item: Any) -> Iterator[Any]:
        if isinstance(item, (list, tuple)):
            for element in item:
                yield from walk(element)
        elif isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim == 4:
            yield from item
        else:
            yield item

    flat = list(walk(images))
    if not flat:
        raise ValueError(f"images={images!r} holds no image: pass at least one path, PIL image, array or tensor.")
    return flat


def name_of(image: Any, index: int) -> str:
    """How messages call an image: its place in the call, and its path where it has one."""
    path = image if isinstance(image, (str, os.PathLike)) else getattr(image, "filename", "")
    return f"image {index} ({os.fspath(path)!r})" if path else f"image {index}"


def check_pixel_count(height: int, width: int, max_pixels: int, name: str) -> None:
    """Refuses an image that would fill the memory, before it is decoded, converted or resampled.

    Raises:
        ValueError: `height * width > max_pixels`.
    """
    if height * width > max_pixels:
        raise ValueError(
            f"{name} is {height} x {width} (height x width) = {height * width:,} pixels, more than "
            f"max_pixels={max_pixels:,}. Pass max_pixels={height * width} to accept it (it takes 12 bytes of memory "
            "per pixel), or cut smaller regions out of it."
        )


def load_rgb(
    image: Any, name: str, max_pixels: int, input_data_format: str | ChannelDimension | None = None
) -> torch.Tensor:
    """One image as an RGB tensor.

    Grayscale and palette images become RGB, transparency is composited on white (the background of a slide), CMYK,
    YCbCr and HSV are converted as Pillow does. The EXIF orientation is applied to files, as Transformers does.

    Args:
        image: path (`str` or `os.PathLike`) of a file Pillow reads, of which the first page is taken; PIL image; numpy
            array or torch tensor, (H, W), (C, H, W) or (H, W, C) with 1, 3 or 4 channels, uint8 in 0..255 or any
            float type in 0..1.
        name: what messages call the image.
        max_pixels: largest height x width accepted.
        input_data_format: `"channels_first"` or `"channels_last"`; inferred from the shape where it is `None`, and
            channels first where both fit.

    Returns:
        `torch.Tensor`: (3, height, width), uint8 or float32; may share memory with `image`, so it is only to be read.

    Raises:
        TypeError: not an image.
        ValueError: wrong shape, dtype, mode or values, or more than `max_pixels`.
        OSError: a file that is missing, truncated or no image.
    """
    if isinstance(image, (str, os.PathLike)):
        with _open(image, name) as opened:
            return _from_pil(opened, name, max_pixels, transpose=True)
    if is_vision_available() and isinstance(image, PIL.Image.Image):
        return _from_pil(image, name, max_pixels)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _from_array(image, name, max_pixels, input_data_format)
    raise TypeError(
        f"{name} is a {type(image).__name__}: pass a path, PIL image, numpy array, torch tensor, or a list of them."
    )


def white_level(image: torch.Tensor) -> float:
    """The value of white in a tensor made by `load_rgb`."""
    return 255.0 if image.dtype == torch.uint8 else 1.0


@contextmanager
def _open(path: str | os.PathLike, name: str) -> Iterator["PIL.Image.Image"]:
    """Opens a file for `load_rgb`: `max_pixels` is the limit that counts."""
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{name}: there is no such file. Check the path; URLs and encoded strings are not read, so download first."
        )
    try:
        with open_without_limit(path) as image:
            yield image
    except PIL.UnidentifiedImageError as error:
        raise OSError(
            f"{name} is not an image Pillow can read: convert it to PNG, JPEG or TIFF, or read a slide's region first."
        ) from error


def _from_pil(image: "PIL.Image.Image", name: str, max_pixels: int, transpose: bool = False) -> torch.Tensor:
    check_pixel_count(image.height, image.width, max_pixels, name)
    try:
        refusal = reason_to_refuse_pil(image)
        if refusal is None:
            pixels, refusal = pil_to_rgb(image, transpose)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, PIL.Image.DecompressionBombError) as error:
        if image.format == "TIFF" and image.info.get("compression") in _CODECS_OFTEN_LEFT_OUT:
            raise OSError(
                f"{name} cannot be decoded ({error}): Pillow's TIFF decoder may be without {image.info['compression']} "
                "compression, else the file is damaged. Read it with sparsepath_vit.slides.Slide, or convert it to PNG."
            ) from error
        raise OSError(
            f"{name} cannot be decoded ({error}): the file is truncated or damaged. Copy or download it again."
        ) from error
    if refusal is not None:
        raise ValueError(f"{name} {refusal}")
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (height, width, 3) -> (3, height, width)


def _from_array(
    image: np.ndarray | torch.Tensor, name: str, max_pixels: int, input_data_format: str | ChannelDimension | None
) -> torch.Tensor:
    image = _channels_first(image, name, input_data_format)
    check_pixel_count(image.shape[-2], image.shape[-1], max_pixels, name)
    tensor = _uint8_or_float32(image, name)
    if tensor.dtype == torch.float32:
        _check_range(tensor, name)
    if tensor.shape[0] == 1:
        return tensor.expand(3, -1, -1)
    if tensor.shape[0] == 4 and tensor.dtype == torch.float32:
        color, alpha = tensor[:3], tensor[3:]
        return color * alpha + (1 - alpha)
    if tensor.shape[0] == 4:
        rgba = np.ascontiguousarray(tensor.permute(1, 2, 0).cpu().numpy())  # (height, width, 4)
        return _from_pil(PIL.Image.fromarray(rgba), name, max_pixels).to(tensor.device)
    return tensor


def _channels_first(
    image: np.ndarray | torch.Tensor, name: str, input_data_format: str | ChannelDimension | None
) -> np.ndarray | torch.Tensor:
    """The array as (channels, height, width), a view."""
    if image.ndim == 2:
        return image[None]
    if image.ndim == 3:
        first = image.shape[0] in CHANNEL_COUNTS and input_data_format in (None, ChannelDimension.FIRST)
        last = image.shape[2] in CHANNEL_COUNTS and input_data_format in (None, ChannelDimension.LAST)
        if first:
            return image
        if last:
            return image.transpose(2, 0, 1) if isinstance(image, np.ndarray) else image.permute(2, 0, 1)
    layout = f" with input_data_format={str(input_data_format)!r}" if input_data_format is not None else ""
    raise ValueError(
        f"{name} has the shape {tuple(image.shape)}{layout}: it takes (height, width), (channels, height, width) or "
        f"(height, width, channels) with {CHANNEL_COUNTS} channels. Pass single images or a 4-D batch of them."
    )


def _uint8_or_float32(image: np.ndarray | torch.Tensor, name: str) -> torch.Tensor:
    dtype = str(image.dtype).removeprefix("torch.")
    is_float = image.dtype.kind == "f" if isinstance(image, np.ndarray) else image.is_floating_point()
    if dtype != "uint8" and not is_float:
        raise ValueError(
            f"{name} has the dtype {dtype}, whose white level is not known: it takes uint8 (0..255) or a float type "
            "(0..1). Scale it yourself: image.astype('float32') / 65535 for 16 bits, image.astype('uint8') where all "
            "values lie in 0..255."
        )
    if isinstance(image, np.ndarray):
        # torch wants positive strides, native bytes and, so as not to warn, a writeable array; otherwise no copy.
        image = np.require(image, "float32" if is_float else "uint8", ["C_CONTIGUOUS", "WRITEABLE"])
        return torch.from_numpy(image)
    return image.detach().to(torch.float32) if is_float else image


def _check_range(image: torch.Tensor, name: str) -> None:
    """Refuses a float image that does not hold 0..1: not finite, 0..255, normalised already or scaled twice."""
    if image.numel() == 0:
        return
    low, high = (value.item() for value in torch.aminmax(image))  # NaN spreads to both
    if not (np.isfinite(low) and np.isfinite(high)):
        count = int((~torch.isfinite(image)).sum())
        raise ValueError(
            f"{name} holds {count} values that are NaN or infinite: look for the step that made them, "
            "or replace them, e.g. with torch.nan_to_num(image, nan=1.0)."
        )
    if low < -RANGE_TOLERANCE or high > 1 + RANGE_TOLERANCE:
        raise ValueError(
            f"{name} is a float image with values from {low:.4g} to {high:.4g}: float images lie in 0..1. Values in "
            "0..255: convert to uint8 or divide by 255. Normalised already: pass the original pixels, normalising is "
            "this processor's work. Overshoot of a resampling: clip to 0..1."
        )
    if 0 < high <= (1 + RANGE_TOLERANCE) / 255:
        raise ValueError(
            f"{name} is a float image whose largest value is {high:.4g}, at most 1/255: it looks divided by 255 twice. "
            "Float images lie in 0..1 and are not rescaled again."
        )
