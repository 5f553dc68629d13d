# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Images of several sizes as a list: how they become the batch that a model computes on."""

from collections.abc import Iterator
from typing import Any

import torch


def joined_images(
    pixel_values: torch.Tensor | list,
    patch_mask: torch.Tensor | list | None,
    image_sizes: torch.Tensor | list | None,
    patch_size: int,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | list | None]:
    """What a model takes, from a list of images; a batch is returned as it is.

    Lists may be nested, one entry an image: whoever puts a batch together from what the image processor returned for
    each image, as Transformers' pipelines do, makes a list of lists.

    Args:
        pixel_values: (batch, channels, height, width), or (channels, height, width) of each image, whole patches.
        patch_mask: of a list (rows, columns) bool of each image; all patches are present by default.
        image_sizes: of a list (2,) height and width of each image, which need not fill its pixels.
        patch_size: pixels per patch side.

    Returns:
        Pixels on the smallest canvas that holds every image, (batch, channels, height, width), zero beyond an image;
        the mask on that canvas, or `None`; and the size of each image.

    Raises:
        ValueError: names the image of a list that is none, or masks and sizes that are not one an image.
    """
    if isinstance(pixel_values, torch.Tensor) or not isinstance(pixel_values, list | tuple):
        return pixel_values, patch_mask, image_sizes
    images = list(_entries(pixel_values))
    for index, image in enumerate(images):
        _check_image(index, image, images[0], patch_size)
    if not images:
        raise ValueError("pixel_values is an empty list: pass at least one image.")
    canvas = [max(image.shape[axis] for image in images) for axis in (1, 2)]
    batch = images[0].new_zeros(len(images), images[0].shape[0], *canvas)
    for target, image in zip(batch, images, strict=True):
        target[:, : image.shape[1], : image.shape[2]] = image
    masks = None if patch_mask is None else _joined_masks(images, patch_mask, patch_size)
    sizes = [image.shape[1:] for image in images]
    if image_sizes is not None:
        sizes = [torch.as_tensor(size).flatten().tolist() for size in _one_for_each(images, image_sizes, "image_sizes")]
        for index, (size, image) in enumerate(zip(sizes, images, strict=True)):
            if any(side > most for side, most in zip(size, image.shape[1:], strict=True)):
                raise ValueError(
                    f"image_sizes[{index}] is {tuple(size)}: pixel_values[{index}] has {tuple(image.shape[1:])} pixels "
                    "(height, width)."
                )
    return batch, masks, [tuple(size) for size in sizes]


def _joined_masks(images: list[torch.Tensor], patch_mask: Any, patch_size: int) -> torch.Tensor:
    """The masks of all images on one canvas, (batch, rows, columns) bool."""
    shapes = [tuple(side // patch_size for side in image.shape[1:]) for image in images]
    rows, columns = (max(sides) for sides in zip(*shapes, strict=True))
    joined = torch.zeros(len(images), rows, columns, dtype=torch.bool, device=images[0].device)
    for index, (mask, shape) in enumerate(zip(_one_for_each(images, patch_mask, "patch_mask"), shapes, strict=True)):
        if tuple(mask.shape) != shape:
            raise ValueError(
                f"patch_mask[{index}] has shape {tuple(mask.shape)}: it takes {shape}, the rows and columns of patches "
                f"of pixel_values[{index}]."
            )
        joined[index, : shape[0], : shape[1]] = mask
    return joined


def _entries(nested: Any) -> Iterator[Any]:
    """The single entries of a nested list; a pair of numbers is one."""
    is_list = isinstance(nested, list | tuple) and not (nested and isinstance(nested[0], int))
    if is_list:
        for element in nested:
            yield from _entries(element)
    else:
        yield nested


def _one_for_each(images: list[torch.Tensor], entries: Any, name: str) -> list[Any]:
    found = list(entries) if isinstance(entries, torch.Tensor) else list(_entries(entries))
    if len(found) != len(images):
        raise ValueError(
            f"{name} has {len(found)} entries for {len(images)} images in pixel_values: give one an image."
        )
    return found


def _check_image(index: int, image: Any, first: torch.Tensor, patch_size: int) -> None:
    if not isinstance(image, torch.Tensor) or image.ndim != 3 or image.shape[0] != first.shape[0]:
        what = tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
        raise ValueError(
            f"pixel_values[{index}] is {what}: a list takes (channels, height, width) tensors of equally many channels."
        )
    height, width = image.shape[1:]
    if not height or not width or height % patch_size or width % patch_size:
        raise ValueError(
            f"pixel_values[{index}] is {height} x {width} px, no multiple of patch_size={patch_size}: "
            "SparsePathViTImageProcessor pads to the next multiple and masks the padding."
        )
