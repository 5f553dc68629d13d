# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Pairs of image and mask as batches for a segmentation model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from ...runtime.pixels import prepare
from .pairs import SegmentationPair

if TYPE_CHECKING:
    from ...model.image_processing_sparsepath_vit import SparsePathViTImageProcessor

# What the collator adds for the metrics, not for the model: number of the example, label, height and width.
ITEMS = "items"


def augmentation(color: float = 0.2) -> v2.Transform:
    """Flips, quarter turns and changes of stain: tissue has no upright, and no two scanners have the same colours.

    Args:
        color: how far brightness, contrast and saturation may change; hue by a fifth of it. 0 leaves colours alone.
    """
    quarter_turn = v2.RandomApply([v2.RandomRotation((90, 90), expand=True)], p=0.5)
    jitter = v2.ColorJitter(brightness=color, contrast=color, saturation=color, hue=color / 5)
    return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), quarter_turn, *([jitter] if color else [])])


class SegmentationImages(torch.utils.data.Dataset):
    """Images with the mask of the one label they are annotated for.

    Args:
        pairs: the images.
        crop_size: side in pixels of square crops; None for the images as they are.
        random_crops: whether an example is one crop at random of each image. Otherwise the examples are all crops that
            lie side by side in the images, the last of each row and column moved back inside.
        transform: of image and mask together, such as `augmentation()`.

    Raises:
        ValueError: an image smaller than a crop.
    """

    def __init__(
        self,
        pairs: Sequence[SegmentationPair],
        crop_size: int | None = None,
        random_crops: bool = False,
        transform: v2.Transform | None = None,
    ) -> None:
        if crop_size is not None and crop_size < 1:
            raise ValueError(f"crop_size={crop_size} is not possible: it is a number of pixels and at least 1.")
        self.pairs, self.transform = list(pairs), transform
        self.random_crop = v2.RandomCrop(crop_size) if random_crops and crop_size else None
        # (pair, top, left, side) of the examples; side None is the whole image
        self.examples = [
            (number, *place)
            for number, pair in enumerate(self.pairs)
            for place in ([(0, 0, None)] if crop_size is None or random_crops else _places(pair, crop_size))
        ]

    def __len__(self) -> int:
        return len(self.examples)

    def pair_of(self, number: int) -> SegmentationPair:
        """The pair that an example is taken from."""
        return self.pairs[self.examples[number][0]]

    def __getitem__(self, number: int) -> dict[str, Any]:
        """`image` (3, height, width) uint8, `mask` (height, width) uint8, `label` and `number`."""
        index, top, left, side = self.examples[number]
        pair = self.pairs[index]
        pixels, marked = pair.read()
        image = tv_tensors.Image(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
        mask = tv_tensors.Mask(torch.from_numpy(marked)[None])
        if side is not None:
            image, mask = (part[:, top : top + side, left : left + side] for part in (image, mask))
        if self.random_crop is not None:
            _check_crop(pair, image.shape[-1], image.shape[-2], self.random_crop.size[0])
            image, mask = self.random_crop(image, mask)
        if self.transform is not None:
            image, mask = self.transform(tv_tensors.Image(image), tv_tensors.Mask(mask))
        return {
            "image": image.as_subclass(torch.Tensor),
            "mask": mask.as_subclass(torch.Tensor)[0],
            "label": pair.label,
            "number": number,
        }


def _places(pair: SegmentationPair, side: int) -> list[tuple[int, int, int]]:
    with Image.open(pair.image) as image:
        width, height = image.size
    _check_crop(pair, width, height, side)
    rows, columns = ([*range(0, length - side, side), length - side] for length in (height, width))
    return [(row, column, side) for row in rows for column in columns]


def _check_crop(pair: SegmentationPair, width: int, height: int, side: int) -> None:
    if min(width, height) < side:
        raise ValueError(
            f"the image {pair.image} is {width} x {height} px (width x height), smaller than a crop of {side} px: pass "
            f"a crop size of at most {min(width, height)}, or take the image out."
        )


class SegmentationCollator:
    """Examples -> one batch of model inputs.

    Each image is annotated for one label. With several labels the batch says which (`annotated_classes`), so that the
    others are ignored and not taken for negatives.

    Args:
        processor: the model's image processor. The pixels are taken as they are, not resampled.
        num_labels: how many labels the model has.
    """

    def __init__(self, processor: "SparsePathViTImageProcessor", num_labels: int) -> None:
        self.processor, self.num_labels = processor, num_labels

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Images of different sizes are put at the top left of the smallest canvas that holds all."""
        sizes = [tuple(example["mask"].shape) for example in examples]
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        inputs = prepare(
            self.processor,
            [example["image"] for example in examples],
            min_patch_coverage=0.0,  # every pixel is to get a label, those of a last, narrow patch too
            input_data_format="channels_first",
        )
        batch: dict[str, Any] = {"pixel_values": inputs["pixel_values"][..., :height, :width].contiguous()}
        if len(set(sizes)) > 1:
            batch |= {"patch_mask": inputs["patch_mask"], "image_sizes": inputs["image_sizes"]}
        labels = torch.tensor([example["label"] for example in examples])
        masks = [
            torch.nn.functional.pad(example["mask"], (0, width - size[1], 0, height - size[0])).float()
            for example, size in zip(examples, sizes, strict=True)
        ]
        # A mask without a pixel is no segment.
        batch["mask_labels"] = [mask[None] if mask.any() else mask.new_zeros(0, height, width) for mask in masks]
        batch["class_labels"] = [
            label[None] if mask.any() else label.new_zeros(0) for label, mask in zip(labels, masks, strict=True)
        ]
        if self.num_labels > 1:
            batch["annotated_classes"] = torch.nn.functional.one_hot(labels, self.num_labels).bool()
        numbers = [example["number"] for example in examples]
        batch[ITEMS] = torch.tensor(
            [[number, int(label), *size] for number, label, size in zip(numbers, labels, sizes, strict=True)]
        )
        return batch
