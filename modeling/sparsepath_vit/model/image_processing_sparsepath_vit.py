# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Image processor: a region of interest of any size -> `pixel_values`, `patch_mask` and `image_sizes`.

Both backends share everything but the resampling (torchvision or Pillow). They live in one file, so that a processor
that one of them saves as remote code always carries the other.
"""

from typing import Any, Unpack

import numpy as np
import torch
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_transforms import get_size_with_aspect_ratio
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageInput,
    SizeDict,
    get_image_size_for_max_height_width,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import TensorType, is_vision_available, logging, requires_backends

from .image_inputs import check_pixel_count, flatten_images, load_rgb, name_of, white_level
from .image_settings import check_resampling, check_settings, sides
from .patch_presence import background_patches, covered_patches
from .pixel_normalisation import gain_and_offset
from .remote_code import RemoteCodeMixin

if is_vision_available():
    import PIL.Image

logger = logging.get_logger(__name__)

# Written into preprocessor_config.json: a plain string would make `backend=` be ignored silently.
AUTO_MAP = {
    "AutoImageProcessor": {
        "torchvision": "image_processing_sparsepath_vit.SparsePathViTImageProcessor",
        "pil": "image_processing_sparsepath_vit.SparsePathViTImageProcessorPil",
    }
}
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC
# Pipelines that hand what the processor returns to a model that takes lists of images.
PIPELINES_OF_LISTS = ("image-feature-extraction", "image-classification")


class SparsePathViTImageProcessorKwargs(ImagesKwargs, total=False):
    r"""Arguments of SparsePathViT's image processors beyond those of every image processor.

    patch_size (`int`, *optional*, defaults to `self.patch_size`):
        Pixels per patch side; the model's `config.patch_size`.
    min_patch_coverage (`float`, *optional*, defaults to `self.min_patch_coverage`):
        A patch is present if at least this share of its pixels belongs to the image rather than to the padding.
    mask_background (`bool`, *optional*, defaults to `self.mask_background`):
        Whether patches of white background are masked too.
    background_fraction (`float`, *optional*, defaults to `self.background_fraction`):
        With `mask_background`: a patch is masked if at least this share of its pixels is white.
    mpp (`float` or `list[float]`, *optional*):
        Micrometres per pixel of the images as they are passed in, one value for all or one per image.
    target_mpp (`float`, *optional*, defaults to `self.target_mpp`):
        Micrometres per pixel that the model is to see.
    max_pixels (`int`, *optional*, defaults to `self.max_pixels`):
        Largest height x width of an image, before and after resampling.
    """

    patch_size: int
    min_patch_coverage: float | int
    mask_background: bool
    background_fraction: float | int
    mpp: float | int | list[float | int] | tuple[float | int, ...] | None
    target_mpp: float | int | None
    max_pixels: int


def _resized_shape(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """Height and width that `size` asks for, by the same rules as Transformers' own `resize`."""
    if size.height and size.width:
        return size.height, size.width
    if size.shortest_edge:
        return get_size_with_aspect_ratio((height, width), size.shortest_edge, size.longest_edge)
    if size.max_height and size.max_width:
        return get_image_size_for_max_height_width((height, width), size.max_height, size.max_width)
    raise ValueError(
        f"size={dict(size)} is not supported: give 'height' and 'width', 'shortest_edge' (with or without "
        "'longest_edge'), or 'max_height' and 'max_width'."
    )


def _grid_size(
    grid_sizes: torch.Tensor, names: list[str], pad_size: SizeDict | None, patch_size: int
) -> tuple[int, int]:
    """Rows and columns of patches that hold every image of a batch: as few as do, or those of `pad_size`.

    Raises:
        ValueError: an image is larger than `pad_size`.
    """
    rows, columns = grid_sizes.amax(dim=0).tolist()
    if pad_size is None:
        return rows, columns
    height, width = sides(pad_size)
    for name, size in zip(names, (grid_sizes * patch_size).tolist(), strict=True):
        if size[0] > height or size[1] > width:
            raise ValueError(
                f"{name} takes {size[0]} x {size[1]} pixels in whole patches (height x width), more than "
                f"pad_size={height, width}: pass a larger one."
            )
    return height // patch_size, width // patch_size


class _SparsePathViTImageProcessing(RemoteCodeMixin):
    """What both backends share; they add how a tensor is resampled and handed out."""

    own_auto_map = AUTO_MAP
    valid_kwargs = SparsePathViTImageProcessorKwargs
    model_input_names = ["pixel_values", "patch_mask", "image_sizes"]

    do_resize = False
    resample = BICUBIC
    do_convert_rgb = True
    do_rescale = True
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    patch_size = 14
    min_patch_coverage = 0.5
    mask_background = False
    background_fraction = 0.95
    target_mpp = None
    max_pixels = 2**28
    returns_lists = False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As every image processor; one that a pipeline loads returns lists with one tensor per image.

        A pipeline puts a batch together from the results for single images. Tensors it concatenates, which fails for
        images of different sizes; lists it leaves as they are, and SparsePathViT's models take them.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if kwargs.get("_from_pipeline") in PIPELINES_OF_LISTS:  # Transformers says which pipeline loads it
            loaded.returns_lists = True
        return loaded

    def __init__(self, **kwargs: Unpack[SparsePathViTImageProcessorKwargs]) -> None:
        kwargs.pop("auto_map", None)
        super().__init__(**kwargs)
        check_settings(**{name: getattr(self, name, None) for name in self._valid_kwargs_names})

    def preprocess(self, images: ImageInput, **kwargs: Unpack[SparsePathViTImageProcessorKwargs]) -> BatchFeature:
        """Prepares one image or a batch for SparsePathViT.

        Args:
            images: a path, PIL image, numpy array or torch tensor, a 4-D batch, or lists of them, of any sizes of at
                least one patch. Arrays are uint8 in 0..255 or float in 0..1, with 1, 3 or 4 channels, first or last;
                float images are never rescaled again. Gray and palette images become RGB, transparency white; 16-bit
                images are refused.
            **kwargs: any attribute of the processor, for this call only, and `mpp`, `device`, `return_tensors`
                (`"pt"`, `"np"`, or `None` for lists with one entry per image).

        Returns:
            `BatchFeature`: with H and W the smallest multiples of `patch_size` that hold every image,

            - **pixel_values** -- (B, 3, H, W) float32, normalised; padded with white at the bottom and right. With
              `pad_size`, H and W are its height and width. With `do_rescale=False, do_normalize=False` images of uint8
              stay that, a quarter of the memory: a model whose config has `image_mean` normalises them itself. A list
              in a processor that `transformers.pipeline` loaded.
            - **patch_mask** -- (B, H / patch_size, W / patch_size) bool, True = present.
            - **image_sizes** -- (B, 2) int64, (height, width) in pixels of each image, padded to whole patches.

        Raises:
            ValueError: an image or an argument that would give garbage; the message says which and what to do.
            OSError: a file that is missing, truncated or no image.
        """
        # Said in the call, do_resize=False means these very pixels; as the default it only means that nobody asked.
        if kwargs.get("do_resize") is False:
            kwargs.update(mpp=None, target_mpp=None)
        return super().preprocess(images, **kwargs)

    @property
    def padding_value(self) -> int:
        """White, and the place to say what a pipeline cannot do that was given this processor instead of loading it.

        It asks for it when it is about to batch, and then concatenates images as they are: those of different sizes
        end in torch's error. It is the only question it asks.
        """
        if self.pad_size is None and not self.returns_lists:
            logger.warning_once(
                "With an image processor of its own a pipeline batches by concatenation, so all images of a call must "
                "be of one size. For others let it load the checkpoint, image processor included, from its folder; or "
                "pass batch_size=1, or image_processor_kwargs={'pad_size': {'height': ..., 'width': ...}} (what is "
                "padded is masked)."
            )
        return 255

    def to_dict(self) -> dict[str, Any]:
        """The settings as written to preprocessor_config.json, with the classes of both backends."""
        auto_map = {auto_class: dict(classes) for auto_class, classes in AUTO_MAP.items()}
        settings = {**super().to_dict(), "auto_map": auto_map}
        settings.pop("returns_lists", None)  # not of the checkpoint but of who loaded it
        return settings

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        check_settings(**kwargs)
        check_resampling(kwargs["do_resize"], kwargs["size"], kwargs["mpp"], kwargs["target_mpp"])
        kwargs.pop("do_resize")  # Transformers would insist on a size, but mpp and target_mpp serve as well
        super()._validate_preprocess_kwargs(**kwargs)

    def _preprocess_image_like_inputs(self, images: ImageInput, **kwargs: Any) -> BatchFeature:
        images = flatten_images(images)
        mpps = kwargs.pop("mpp")
        mpps = list(mpps) if isinstance(mpps, (list, tuple)) else [mpps] * len(images)
        if len(mpps) != len(images):
            raise ValueError(f"mpp has {len(mpps)} values for {len(images)} images: give one per image, or one.")
        names = [name_of(image, index) for index, image in enumerate(images)]
        tensors = [self._load(*item, **kwargs) for item in zip(images, names, mpps, strict=True)]
        presences = [self._presence(*item, **kwargs) for item in zip(tensors, names, strict=True)]

        patch_size, device = kwargs["patch_size"], tensors[0].device
        grid_sizes = torch.tensor([presence.shape for presence in presences])  # (B, 2)
        rows, columns = _grid_size(grid_sizes, names, kwargs["pad_size"], patch_size)
        shape = (len(tensors), 3, rows * patch_size, columns * patch_size)
        are_raw = all(tensor.dtype == torch.uint8 for tensor in tensors)
        stay_raw = are_raw and not kwargs["do_rescale"] and not kwargs["do_normalize"]
        pixel_values = torch.empty(shape, dtype=torch.uint8 if stay_raw else torch.float32, device=device)
        patch_mask = torch.zeros(len(tensors), rows, columns, dtype=torch.bool, device=device)
        for index, (tensor, presence) in enumerate(zip(tensors, presences, strict=True)):
            self._write_normalized(tensor, pixel_values[index], **kwargs)
            patch_mask[index, : presence.shape[0], : presence.shape[1]] = presence
        outputs = (pixel_values, patch_mask, (grid_sizes * patch_size).to(device))
        tensor_type = kwargs.get("return_tensors")
        if self.returns_lists and tensor_type in ("pt", TensorType.PYTORCH):
            return BatchFeature(
                {name: list(output) for name, output in zip(self.model_input_names, outputs, strict=True)}
            )
        outputs = [self._to_backend(output) for output in outputs]
        if tensor_type is None:
            outputs = [list(output) for output in outputs]
        data = dict(zip(self.model_input_names, outputs, strict=True))
        return BatchFeature(data=data, tensor_type=tensor_type)

    def _load(self, image: Any, name: str, mpp: float | None, **kwargs: Any) -> torch.Tensor:
        """One image as (3, height, width) at the resolution the model is to see, uint8 or float32 in 0..1."""
        tensor = self._place(load_rgb(image, name, kwargs["max_pixels"], kwargs.get("input_data_format")), **kwargs)
        height, width = tensor.shape[-2:]
        if mpp is not None:
            scale = mpp / kwargs["target_mpp"]
            shape = max(1, round(height * scale)), max(1, round(width * scale))
        elif kwargs["do_resize"]:
            shape = _resized_shape(height, width, kwargs["size"])
        else:
            shape = height, width
        if shape != (height, width):
            name = f"{name}, resampled from {height} x {width},"
            check_pixel_count(*shape, kwargs["max_pixels"], name)
        if min(shape) < kwargs["patch_size"]:
            raise ValueError(
                f"{name} is {shape[0]} x {shape[1]} pixels (height x width), smaller than one patch of "
                f"patch_size={kwargs['patch_size']}: cut a larger region, or enlarge it: do_resize=True, size=..."
            )
        return tensor if shape == (height, width) else self._resample(tensor, shape, kwargs["resample"])

    def _presence(self, image: torch.Tensor, name: str, **kwargs: Any) -> torch.Tensor:
        """The present patches of one image, (rows, columns) bool."""
        patch_size = kwargs["patch_size"]
        present = covered_patches(*image.shape[-2:], patch_size, kwargs["min_patch_coverage"]).to(image.device)
        if kwargs["mask_background"]:
            present &= ~background_patches(image, patch_size, kwargs["background_fraction"])
            if not present.any():
                raise ValueError(
                    f"{name} holds no tissue: every patch is at least {kwargs['background_fraction']:.0%} white. "
                    "Leave it out, pass mask_background=False, or raise background_fraction."
                )
        return present

    def _write_normalized(self, image: torch.Tensor, canvas: torch.Tensor, **kwargs: Any) -> None:
        """Fills `canvas` (3, H, W) with the image at the top left and white elsewhere, all of it normalised."""
        white = white_level(image)
        if canvas.dtype == torch.uint8:
            canvas.fill_(white)[:, : image.shape[-2], : image.shape[-1]] = image
            return
        scale, mean, std = 1.0, 0.0, 1.0
        if kwargs["do_rescale"]:
            scale = kwargs["rescale_factor"] * 255.0 / white
        if kwargs["do_normalize"]:
            mean, std = kwargs["image_mean"], kwargs["image_std"]
            if not kwargs["do_rescale"] and white > 1 and np.max(mean) <= 1:
                raise ValueError(
                    f"do_rescale=False leaves uint8 pixels in 0..255, but image_mean={mean} is meant for 0..1: "
                    "leave do_rescale=True, or pass do_normalize=False as well."
                )
        gain, offset = gain_and_offset(scale, mean, std, canvas)
        # In place and in the batch's own memory: a region of 3430 px has 141 MB in float32, every temporary as much.
        canvas.copy_(white * gain + offset)
        region = canvas[:, : image.shape[-2], : image.shape[-1]]
        region.copy_(image).mul_(gain).add_(offset)


class SparsePathViTImageProcessor(_SparsePathViTImageProcessing, TorchvisionBackend):
    r"""Image processor of SparsePathViT, torchvision backend: regions of any size of at least one patch.

    Images are rescaled to 0..1, normalised, and padded at the bottom and right with white to whole patches and to the
    largest of the batch. What is padding is masked, not attended: a patch is present if at least `min_patch_coverage`
    of its pixels belong to the image. Images are resampled only when asked: by `mpp` and `target_mpp`, or with
    `do_resize=True` to `size`.

    Args:
        patch_size (`int`, *optional*, defaults to 14): pixels per patch side; the model's `config.patch_size`.
        image_mean, image_std (`float` or `list[float]`, *optional*, default ImageNet's): of the checkpoint's training.
        do_resize (`bool`, *optional*, defaults to `False`): resize to `size`. Passed as `False` in a *call*, it also
            switches the resampling by mpp off.
        size (`dict[str, int]`, *optional*): `{"height", "width"}`, `{"shortest_edge"}` (with or without
            `"longest_edge"`) or `{"max_height", "max_width"}`.
        pad_size (`dict[str, int]`, *optional*): `{"height", "width"}` to which every image is padded, multiples of
            `patch_size`, for batches that others put together (pipelines, a `DataLoader`) and for compiled models.
        target_mpp (`float`, *optional*): micrometres per pixel that the model is to see. Where it is set, every call
            must say `mpp`, the micrometres per pixel of the images (or `do_resize=False`): it is never guessed.
        resample (`int`, *optional*, defaults to bicubic): `PIL.Image.Resampling`; antialiased.
        min_patch_coverage (`float`, *optional*, defaults to 0.5): share of image pixels from which a patch at the
            bottom or right edge is present.
        mask_background (`bool`, *optional*, defaults to `False`): mask patches of white background too.
        background_fraction (`float`, *optional*, defaults to 0.95): share of white pixels from which a patch is
            background. White: darkest channel at least 80 % of white, channels at most 8 % of white apart.
        max_pixels (`int`, *optional*, defaults to 2**28): largest height x width of an image; 16,384 px square. It also
            takes the place of Pillow's own limit for files that this processor opens.
        do_rescale, rescale_factor, do_normalize: as in every image processor; float images in 0..1 count as rescaled.

    Example:
    ```python
    >>> from transformers import AutoImageProcessor

    >>> processor = AutoImageProcessor.from_pretrained(checkpoint)
    >>> inputs = processor(["region.png", "other.tif"], mpp=0.25, target_mpp=0.5, return_tensors="pt")
    >>> outputs = model(**inputs)
    ```
    """

    def __init__(self, **kwargs: Unpack[SparsePathViTImageProcessorKwargs]) -> None:
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)

    def _place(self, image: torch.Tensor, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return image if device is None else image.to(device)

    def _resample(self, image: torch.Tensor, shape: tuple[int, int], resample: int | None) -> torch.Tensor:
        resized = self.resize(image, SizeDict(height=shape[0], width=shape[1]), resample=resample)
        return resized if resized.dtype == torch.uint8 else resized.clamp_(0, 1)  # bicubic overshoots

    def _to_backend(self, output: torch.Tensor) -> torch.Tensor:
        return output


class SparsePathViTImageProcessorPil(_SparsePathViTImageProcessing, PilBackend):
    r"""Image processor of SparsePathViT, Pillow backend: needs no torchvision and resamples with Pillow, on the CPU.

    Same arguments and, where nothing is resampled, the same numbers as [`SparsePathViTImageProcessor`]; resampled
    8-bit pixels differ by at most one or two of 255 levels.
    """

    def _place(self, image: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return image.cpu()

    def _resample(self, image: torch.Tensor, shape: tuple[int, int], resample: int | None) -> torch.Tensor:
        def resized(array: np.ndarray) -> np.ndarray:
            return np.array(PIL.Image.fromarray(array).resize(shape[::-1], resample))

        if image.dtype == torch.uint8:
            array = np.ascontiguousarray(image.permute(1, 2, 0).numpy())  # (height, width, 3)
            return torch.from_numpy(resized(array)).permute(2, 0, 1)
        # Pillow resamples float images one channel at a time; bicubic overshoots.
        channels = [resized(np.ascontiguousarray(channel.numpy())) for channel in image]
        return torch.from_numpy(np.stack(channels)).clamp_(0, 1)

    def _to_backend(self, output: torch.Tensor) -> np.ndarray:
        return output.numpy()


__all__ = ["SparsePathViTImageProcessor", "SparsePathViTImageProcessorPil"]
