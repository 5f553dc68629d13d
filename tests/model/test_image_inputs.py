# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What counts as an image, and what each image that does not is told."""

import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from PIL.PngImagePlugin import PngInfo

from sparsepath_vit.model.image_inputs import flatten_images, load_rgb, name_of

LIMIT = 2**28
HEIGHT, WIDTH = 40, 56


@pytest.fixture
def rgb():
    """(height, width, 3) uint8 with every value somewhere."""
    return np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def load(image, **kwargs):
    return load_rgb(image, "image 0", kwargs.pop("max_pixels", LIMIT), **kwargs)


def channels_last(tensor):
    return tensor.permute(1, 2, 0).numpy()


class TestFlatten:
    def test_lists_batches_and_single_images_keep_their_order(self, rgb):
        batch = np.stack([rgb, rgb // 2])
        flat = flatten_images([["a.png", Path("b.png")], batch, torch.from_numpy(batch), rgb])
        assert flat[:2] == ["a.png", Path("b.png")]
        assert len(flat) == 7
        np.testing.assert_array_equal(flat[3], rgb // 2)
        np.testing.assert_array_equal(flat[5].numpy(), rgb // 2)
        np.testing.assert_array_equal(flat[6], rgb)

    @pytest.mark.parametrize("images", [[], [[], []], np.zeros((0, 3, 20, 20), dtype=np.uint8)], ids=str)
    def test_no_image(self, images):
        with pytest.raises(ValueError, match="no image"):
            flatten_images(images)

    def test_messages_name_place_and_path(self, tmp_path, rgb):
        path = tmp_path / "region.png"
        PIL.Image.fromarray(rgb).save(path)
        assert name_of(rgb, 3) == "image 3"
        assert name_of(path, 3) == f"image 3 ({str(path)!r})"
        with PIL.Image.open(path) as opened:
            assert name_of(opened, 3) == f"image 3 ({str(path)!r})"


class TestConversion:
    @pytest.mark.parametrize(
        "convert",
        [
            lambda rgb: rgb,
            lambda rgb: rgb.transpose(2, 0, 1),
            lambda rgb: torch.from_numpy(rgb),
            lambda rgb: torch.from_numpy(rgb).permute(2, 0, 1),
            PIL.Image.fromarray,
            lambda rgb: np.ascontiguousarray(rgb[:, ::-1])[:, ::-1],
            lambda rgb: np.frombuffer(rgb.transpose(2, 0, 1).tobytes(), dtype=np.uint8).reshape(3, HEIGHT, WIDTH),
        ],
        ids=["numpy HWC", "numpy CHW", "torch HWC", "torch CHW", "PIL", "negative strides", "read-only"],
    )
    def test_uint8_stays_uint8(self, rgb, convert):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tensor = load(convert(rgb))
        assert tensor.dtype == torch.uint8
        np.testing.assert_array_equal(channels_last(tensor), rgb)

    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
    def test_floats_become_float32(self, rgb, dtype):
        image = (rgb / 255).astype(dtype)
        tensor = load(image)
        assert tensor.dtype == torch.float32
        np.testing.assert_array_equal(channels_last(tensor), image.astype(np.float32))

    def test_bfloat16_that_requires_grad(self, rgb):
        image = (torch.from_numpy(rgb).permute(2, 0, 1) / 255).to(torch.bfloat16).requires_grad_()
        tensor = load(image)
        assert tensor.dtype == torch.float32 and not tensor.requires_grad
        torch.testing.assert_close(tensor, image.detach().float(), rtol=0, atol=0)

    @pytest.mark.parametrize(
        "convert",
        [
            lambda gray: gray,
            lambda gray: gray[None],
            lambda gray: gray[..., None],
            lambda gray: torch.from_numpy(gray),
            PIL.Image.fromarray,
        ],
        ids=["HW", "1HW", "HW1", "torch HW", "PIL L"],
    )
    def test_grayscale_becomes_rgb(self, rgb, convert):
        gray = rgb[..., 0]
        np.testing.assert_array_equal(channels_last(load(convert(gray))), np.stack([gray] * 3, axis=-1))

    def test_bilevel_becomes_black_and_white(self):
        bilevel = np.zeros((20, 20), dtype=bool)
        bilevel[:, 10:] = True
        tensor = load(PIL.Image.fromarray(bilevel))
        assert tensor[:, :, :10].max() == 0 and tensor[:, :, 10:].min() == 255

    @pytest.mark.parametrize("source", ["PIL", "numpy HWC", "numpy CHW", "torch", "float"])
    def test_transparency_is_composited_on_white(self, rgb, source):
        alpha = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 1), dtype=np.uint8)
        alpha[:10] = 0
        rgba = np.concatenate([rgb, alpha], axis=-1)
        image = {
            "PIL": PIL.Image.fromarray(rgba),
            "numpy HWC": rgba,
            "numpy CHW": rgba.transpose(2, 0, 1),
            "torch": torch.from_numpy(rgba).permute(2, 0, 1),
            "float": (rgba / 255).astype(np.float32),
        }[source]
        result = channels_last(load(image)) * (255.0 if source == "float" else 1.0)
        expected = rgb * (alpha / 255.0) + 255 * (1 - alpha / 255.0)
        np.testing.assert_allclose(result, expected, atol=1e-3 if source == "float" else 1.0)
        assert np.all(result[:10] > 254.99)

    def test_palette_image(self, rgb):
        palette = PIL.Image.fromarray(rgb).quantize(256)
        assert palette.mode == "P"
        np.testing.assert_array_equal(channels_last(load(palette)), np.asarray(palette.convert("RGB")))

    def test_palette_image_with_a_transparent_entry_is_white_there(self, tmp_path):
        palette = PIL.Image.new("P", (20, 20), 0)
        palette.putpalette([200, 0, 0, 0, 200, 0])
        palette.paste(1, (10, 0, 20, 20))
        palette.save(tmp_path / "palette.png", transparency=0)
        tensor = load(tmp_path / "palette.png")
        assert tensor[:, :, :10].min() == 255
        np.testing.assert_array_equal(tensor[:, 0, 15].numpy(), [0, 200, 0])

    @pytest.mark.parametrize("mode", ["LA", "PA", "CMYK", "YCbCr", "HSV"])
    def test_other_modes_are_converted_as_pillow_does(self, rgb, mode):
        image = PIL.Image.fromarray(rgb)
        image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
        assert image.mode == mode
        np.testing.assert_array_equal(channels_last(load(image)), np.asarray(image.convert("RGB")))

    def test_the_callers_image_is_left_alone(self, rgb):
        original, image, tensor = rgb.copy(), PIL.Image.fromarray(rgb), torch.from_numpy(rgb)
        for one in (rgb, image, tensor):
            load(one)
        np.testing.assert_array_equal(rgb, original)
        np.testing.assert_array_equal(np.asarray(image), original)

    def test_input_data_format_decides_where_both_layouts_fit(self):
        image = np.random.default_rng(0).integers(0, 256, (3, 30, 3), dtype=np.uint8)
        np.testing.assert_array_equal(load(image).numpy(), image)
        np.testing.assert_array_equal(channels_last(load(image, input_data_format="channels_last")), image)


class TestFiles:
    @pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "webp"])
    @pytest.mark.parametrize("kind", [str, Path])
    def test_paths(self, tmp_path, rgb, suffix, kind):
        path = tmp_path / f"region.{suffix}"
        PIL.Image.fromarray(rgb).save(path, **({"lossless": True} if suffix == "webp" else {}))
        np.testing.assert_array_equal(channels_last(load(kind(path))), rgb)

    def test_first_page_of_a_pyramid(self, tmp_path, rgb):
        pages = [PIL.Image.fromarray(rgb), PIL.Image.fromarray(rgb[::2, ::2])]
        pages[0].save(tmp_path / "pyramid.tif", save_all=True, append_images=pages[1:])
        np.testing.assert_array_equal(channels_last(load(tmp_path / "pyramid.tif")), rgb)

    def test_exif_orientation_is_applied(self, tmp_path, rgb):
        exif = PIL.Image.Exif()
        exif[0x0112] = 6  # rotate by 270 degrees to display
        PIL.Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
        np.testing.assert_array_equal(channels_last(load(tmp_path / "turned.png")), np.rot90(rgb, 3))

    def test_a_16_bit_rgb_file_is_scaled_to_8_bits_not_wrapped(self, tmp_path):
        # Pillow has no 16-bit RGB mode and reads the upper byte; nor does it write one, hence the chunks by hand.
        values = np.array([[[0, 32768, 65535]] * 20] * 20, dtype=">u2")
        rows = b"".join(b"\x00" + row.tobytes() for row in values)

        def chunk(kind, data):
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", 20, 20, 16, 2, 0, 0, 0)
        chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
        np.testing.assert_array_equal(load(tmp_path / "deep.png")[:, 3, 3].numpy(), [0, 128, 255])

    @pytest.mark.parametrize("path", ["missing.png", "https://example.org/a.png", "data:image/png;base64,AAAA", "."])
    def test_missing_file(self, path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load(path)

    def test_file_that_is_no_image(self, tmp_path):
        (tmp_path / "notes.png").write_text("not an image")
        with pytest.raises(OSError, match="not an image"):
            load(tmp_path / "notes.png")

    @pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
    def test_truncated_file_is_named(self, tmp_path, suffix):
        path = tmp_path / f"truncated.{suffix}"
        noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
        PIL.Image.fromarray(noise).save(path)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(OSError, match=r"truncated\.\w+'\) cannot be decoded.*again"):
            load_rgb(path, name_of(path, 0), LIMIT)
        with PIL.Image.open(path) as opened, pytest.raises(OSError, match="cannot be decoded"):
            load_rgb(opened, name_of(opened, 0), LIMIT)

    def test_text_in_a_file_is_no_obstacle(self, tmp_path, rgb):
        info = PngInfo()
        info.add_text("Comment", "x" * 1000)
        PIL.Image.fromarray(rgb).save(tmp_path / "text.png", pnginfo=info)
        np.testing.assert_array_equal(channels_last(load(tmp_path / "text.png")), rgb)


class TestSizeLimit:
    def test_pillows_limit_does_not_apply_and_survives(self, tmp_path, rgb, monkeypatch):
        PIL.Image.fromarray(rgb).save(tmp_path / "region.png")
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)  # an error above 200 pixels, a warning above 100
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(channels_last(load(tmp_path / "region.png")), rgb)
        assert PIL.Image.MAX_IMAGE_PIXELS == 100
        with pytest.raises(OSError, match="not an image"):
            (tmp_path / "bad.png").write_text("")
            load(tmp_path / "bad.png")
        assert PIL.Image.MAX_IMAGE_PIXELS == 100

    def test_pillows_limit_survives_many_threads(self, tmp_path, rgb, monkeypatch):
        PIL.Image.fromarray(rgb).save(tmp_path / "region.png")
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
        failures = []

        def work():
            try:
                for _ in range(20):
                    load(tmp_path / "region.png")
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert PIL.Image.MAX_IMAGE_PIXELS == 100

    @pytest.mark.parametrize("source", ["path", "PIL", "numpy", "torch"])
    def test_too_many_pixels(self, tmp_path, rgb, source):
        PIL.Image.fromarray(rgb).save(tmp_path / "region.png")
        image = {
            "path": tmp_path / "region.png",
            "PIL": PIL.Image.fromarray(rgb),
            "numpy": rgb,
            "torch": torch.from_numpy(rgb),
        }[source]
        assert load(image, max_pixels=HEIGHT * WIDTH).shape == (3, HEIGHT, WIDTH)
        with pytest.raises(ValueError, match=r"40 x 56 .* max_pixels=2,239.*Pass max_pixels=2240"):
            load(image, max_pixels=HEIGHT * WIDTH - 1)

    def test_a_file_over_the_limit_is_not_decoded(self, tmp_path, monkeypatch):
        PIL.Image.new("RGB", (100, 100)).save(tmp_path / "region.png")

        def fail(self):
            raise AssertionError("decoded")

        monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
        with pytest.raises(ValueError, match="max_pixels=10"):
            load(tmp_path / "region.png", max_pixels=10)


class TestRefused:
    @pytest.mark.parametrize("mode", ["I;16", "I", "F", "LAB"])
    def test_modes_without_a_known_white(self, mode):
        with pytest.raises(ValueError, match=rf"mode '{mode}'.*65535"):
            load(PIL.Image.new(mode, (20, 20)))

    @pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "int64", "bool", "complex64"])
    def test_numpy_dtypes_without_a_known_white(self, dtype):
        with pytest.raises(ValueError, match=rf"dtype {dtype}.*uint8"):
            load(np.ones((20, 20, 3), dtype=dtype))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.uint16, torch.bool], ids=str)
    def test_torch_dtypes_without_a_known_white(self, dtype):
        with pytest.raises(ValueError, match=rf"dtype {str(dtype)[6:]}.*uint8"):
            load(torch.ones(3, 20, 20, dtype=dtype))

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("kind", [np.asarray, torch.tensor])
    def test_not_finite(self, rgb, value, kind):
        image = (rgb / 255).astype(np.float32)
        image[3, 4, 1] = image[5, 6, 2] = value
        with pytest.raises(ValueError, match=r"image 0 holds 2 values that are NaN or infinite.*nan_to_num"):
            load(kind(image))

    @pytest.mark.parametrize(
        "factor, shift, message",
        [
            (1, 0, "divide by 255"),
            (4 / 255, -2, "Normalised already"),
            (1 / 255, -0.5, "Normalised already"),
            (1 / 255**2, 0, "divided by 255 twice"),
        ],
        ids=["0..255", "normalised", "centred", "rescaled twice"],
    )
    def test_float_images_on_another_scale(self, rgb, factor, shift, message):
        with pytest.raises(ValueError, match=message):
            load((rgb * factor + shift).astype(np.float32))

    def test_black_is_no_scaling_mistake(self):
        assert load(np.zeros((20, 20, 3), dtype=np.float32)).max() == 0

    @pytest.mark.parametrize("shape", [(20,), (2, 20, 20), (20, 20, 5), (1, 2, 3, 20, 20)], ids=str)
    def test_shapes(self, shape):
        with pytest.raises(ValueError, match=r"image 0 has the shape \("):
            load(np.zeros(shape, dtype=np.uint8))

    def test_layout_that_does_not_fit_the_shape(self, rgb):
        with pytest.raises(ValueError, match="input_data_format='channels_first'"):
            load(rgb, input_data_format="channels_first")

    @pytest.mark.parametrize("image", [None, 3, {"pixel_values": 1}, b"bytes"], ids=str)
    def test_what_is_no_image(self, image):
        with pytest.raises(TypeError, match=f"image 0 is a {type(image).__name__}: pass a path"):
            load(image)
