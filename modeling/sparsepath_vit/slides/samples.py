# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What the samples of a TIFF mean, and the one way in which they become 8-bit RGB.

Only what has one right meaning is converted. The value of white must be known: it is 2^bits - 1 for up to 15 bits; a
container of 16 or more bits may hold a camera's 10, 12 or 14, so there the file must state it. Transparency is laid on
white, the background of a slide.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .errors import SlideError, UnsupportedSlideError

_COLOURS = {"RGB": 3, "YCBCR": 3, "MINISBLACK": 1, "MINISWHITE": 1, "PALETTE": 1, "SEPARATED": 4}
_FLOAT_WHITES = (1.0, 255.0, 65535.0)


@dataclass(frozen=True)
class YCbCr:
    """How luma and chroma become RGB: the luma coefficients of red, green and blue, and black and white of each."""

    luma: tuple[float, float, float] = (0.299, 0.587, 0.114)
    reference: tuple[float, ...] = (0.0, 255.0, 128.0, 255.0, 128.0, 255.0)


@dataclass(frozen=True)
class Samples:
    """The samples of one pixel.

    Attributes:
        count: how many there are, alpha included.
        bits: of each.
        kind: `uint`, `int`, `float` or `complex`.
        photometric: TIFF's name of the colours, such as `RGB` or `MINISBLACK`.
        alpha: `straight`, `premultiplied`, `unspecified`, or None without.
        white: the stored value of white; None where the file does not tell.
        ycbcr: set where luma and chroma are left for us to convert (JPEG decoders do it themselves).
        colormap: (entries, 3) uint8 for `PALETTE`.
    """

    count: int
    bits: int
    kind: str
    photometric: str
    alpha: str | None = None
    white: float | None = None
    ycbcr: YCbCr | None = None
    colormap: np.ndarray | None = None

    @property
    def dtype_name(self) -> str:
        """As NumPy would call it: `uint16`, `float32`; `12-bit uint` where NumPy has none."""
        return f"{self.kind}{self.bits}" if self.bits in (8, 16, 32, 64) else f"{self.bits}-bit {self.kind}"

    def reason_to_refuse(self) -> str | None:
        """Why these samples have no one right meaning as RGB, with the way out; None where they have."""
        if self.photometric not in _COLOURS:
            return f"its colours are stored as {self.photometric}: export it as RGB first"
        colours = _COLOURS[self.photometric]
        if self.count - colours not in (0, 1):
            return (
                f"it holds {self.count} channels of type {self.dtype_name} as {self.photometric}, where a bright-field "
                f"slide has {colours}, or {colours + 1} with transparency. If these are stains or fluorescence, the "
                "models do not know them: render it as 8-bit RGB first"
            )
        if self.photometric == "PALETTE" and (self.bits > 8 or self.colormap is None):
            return f"its palette of {self.dtype_name} indices is not one of up to 8 bits: export it as RGB first"
        if self.white is None:
            return (
                f"its samples are {self.dtype_name} and the file does not state which value is white (a 12-bit camera "
                "also writes 16-bit files): scale it to 8-bit RGB first, or write the tags MinSampleValue = 0 and "
                "MaxSampleValue = the value of white, such as 4095 or 65535"
            )
        return None


def white_of(
    kind: str, bits: int, stated: list[float], lowest: list[float], significant_bits: int | None
) -> float | None:
    """The value of white, or None where it is not known.

    Args:
        kind: of the samples, `uint` or `float`; nothing else has a known white.
        bits: per sample.
        stated: the file's largest sample values. They may be statistics of the image, so only 2^n - 1 counts.
        lowest: likewise the smallest ones; anything but 0 tells of a scale that we do not know.
        significant_bits: as OME-XML states them. The size of the container is what many writers put there by
            default, so only fewer count.
    """
    if kind == "uint" and 1 <= bits < 16:
        return 2.0**bits - 1
    if any(lowest):
        return None
    if kind == "float":
        return stated[0] if len(set(stated)) == 1 and lowest and stated[0] in _FLOAT_WHITES else None
    if kind != "uint":
        return None
    if significant_bits is not None and 8 <= significant_bits < bits:
        stated = [*stated, 2.0**significant_bits - 1]
    possible = {2.0**n - 1 for n in range(8, bits + 1)}
    return stated[0] if len(set(stated)) == 1 and stated[0] in possible else None


def to_rgb(chunk: np.ndarray, samples: Samples) -> np.ndarray:
    """Decoded samples as 8-bit RGB on white.

    Args:
        chunk: (height, width, samples.count), as the file stores them, without the padding of its tiles.
        samples: what they mean; `reason_to_refuse` is None.

    Returns:
        `np.ndarray` (height, width, 3) uint8.

    Raises:
        UnsupportedSlideError: a fourth channel of unknown meaning that is not opaque.
        SlideError: values that are not numbers, or not in the palette.
    """
    colours = _COLOURS[samples.photometric]
    if samples.photometric == "PALETTE":
        indices = chunk[..., 0].astype(np.intp)
        if indices.size and indices.max() >= len(samples.colormap):
            raise SlideError(f"the index {indices.max()} is not in its palette of {len(samples.colormap)} colours")
        rgb = samples.colormap[indices]
    else:
        eight_bits = _eight_bits(chunk[..., :colours], samples)
        if samples.photometric == "MINISWHITE":
            eight_bits = 255 - eight_bits
        if samples.ycbcr is not None:
            rgb = ycbcr_to_rgb(eight_bits, samples.ycbcr)
        elif samples.photometric == "SEPARATED":
            rgb = np.asarray(Image.fromarray(np.ascontiguousarray(eight_bits), "CMYK").convert("RGB"))
        else:
            rgb = eight_bits if colours == 3 else np.repeat(eight_bits, 3, axis=-1)
    if chunk.shape[-1] == colours:
        return rgb
    return _on_white(rgb, _eight_bits(chunk[..., colours:], samples), samples.alpha)


def _eight_bits(values: np.ndarray, samples: Samples) -> np.ndarray:
    if values.dtype == np.uint8 and samples.white == 255:
        return values
    if samples.kind == "float" and not np.isfinite(values).all():
        raise SlideError("it holds values that are NaN or infinite")
    return np.rint(np.clip(values.astype(np.float64) * (255 / samples.white), 0, 255)).astype(np.uint8)


def _on_white(rgb: np.ndarray, alpha: np.ndarray, kind: str | None) -> np.ndarray:
    """(height, width, 3) and (height, width, 1) uint8, the first laid on white."""
    if (alpha == 255).all():
        return np.ascontiguousarray(rgb)
    if kind == "premultiplied":
        return np.minimum(rgb.astype(np.uint16) + (255 - alpha), 255).astype(np.uint8)
    if kind == "straight":
        return image_on_white(Image.fromarray(np.concatenate([rgb, alpha], axis=-1), "RGBA"))
    raise UnsupportedSlideError(
        "it has one channel more than its colours, which is not opaque and of which it does not say what it is: state "
        "it in the tag ExtraSamples (1 premultiplied, 2 straight transparency), or export it as RGB"
    )


def image_on_white(image: Image.Image) -> np.ndarray:
    """`image` composited on white, as (height, width, 3) uint8; opaque pixels are unchanged."""
    if "A" not in image.getbands() and "transparency" not in image.info:
        return np.asarray(image.convert("RGB")).copy()
    image = image.convert("RGBA")
    if image.getextrema()[3][0] == 255:
        return np.ascontiguousarray(np.asarray(image)[..., :3])
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB")).copy()


def ycbcr_to_rgb(values: np.ndarray, meaning: YCbCr) -> np.ndarray:
    """(height, width, 3) uint8 luma and chroma as RGB, in the 16-bit fixed point of libtiff: the same numbers."""
    red, green, blue = meaning.luma
    black_y, white_y, black_cb, white_cb, black_cr, white_cr = meaning.reference
    factors = [2 - 2 * red, red * (2 - 2 * red) / green, 2 - 2 * blue, blue * (2 - 2 * blue) / green]
    to_red, red_in_green, to_blue, blue_in_green = (int(factor * 65536 + 0.5) for factor in factors)
    code = np.arange(256, dtype=np.float64)

    def signed(black: float, white: float) -> np.ndarray:
        # The table's codes are -128..127, so are black and white there.
        span = white - black or 1.0
        return np.clip(np.trunc((code - black) * 127 / span), -128 * 32, 128 * 32).astype(np.int64)

    chroma_blue, chroma_red = signed(black_cb, white_cb), signed(black_cr, white_cr)
    luma = np.clip(np.trunc((code - black_y) * 255 / (white_y - black_y or 1.0)), -4096, 4096).astype(np.int64)
    y, cb, cr = (values[..., channel] for channel in range(3))
    red_part = ((to_red * chroma_red + 32768) >> 16)[cr]
    green_part = ((-red_in_green * chroma_red)[cr] + (-blue_in_green * chroma_blue + 32768)[cb]) >> 16
    blue_part = ((to_blue * chroma_blue + 32768) >> 16)[cb]
    rgb = np.stack([luma[y] + red_part, luma[y] + green_part, luma[y] + blue_part], axis=-1)
    return np.clip(rgb, 0, 255).astype(np.uint8)
