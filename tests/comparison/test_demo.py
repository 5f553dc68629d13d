# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_models import small_model

from sparsepath_vit import SparsePathViTImageProcessor, SparsePathViTModel
from sparsepath_vit.comparison import demo
from sparsepath_vit.comparison.images import read_image


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    small_model(SparsePathViTModel).save_pretrained(folder)
    SparsePathViTImageProcessor(patch_size=4).save_pretrained(folder)
    return folder


@pytest.fixture
def region(tmp_path):
    path = tmp_path / "region.png"
    Image.effect_noise((120, 90), 60).convert("RGB").save(path)
    return path


def test_the_demo_compares_sparse_and_pruned_with_dense(tmp_path, checkpoint, region):
    report = demo.run_demo(tmp_path / "out", image_file=region, model_source=str(checkpoint), size=80, device="cpu")
    rows = {row.variant: row for row in report.rows}
    assert [row.size for row in report.rows] == [(80, 80)] * 4
    assert rows["dense"].cosine == pytest.approx(1.0)
    assert rows["sparse"].cosine < 0.99999  # large weights: another pattern gives other features
    assert rows["sparse, whole layers"].cosine == pytest.approx(rows["sparse"].cosine, abs=1e-4)
    assert rows["sparse + pruned"].tokens == (400, 160)
    assert rows["sparse"].keys_per_query < rows["dense"].keys_per_query
    features = load_file(tmp_path / "out" / "features.safetensors")
    assert features["patch_positions"].shape == (1, 160, 2)
    assert all(file.is_file() for file in report.files)


def test_a_dense_run_that_would_take_too_long_is_predicted_not_run(tmp_path, checkpoint, region, monkeypatch):
    monkeypatch.setattr(demo, "_probe_dense_attention", lambda model, tokens: 16 * demo.CROP_SECONDS)
    report = demo.run_demo(
        tmp_path / "out", image_file=region, model_source=str(checkpoint), size=80, device="cpu", dense_budget=1.0
    )
    skipped, *_, pruned_crop = report.rows
    assert skipped.variant == "dense"
    assert not skipped.was_run
    assert skipped.seconds > 16 * demo.CROP_SECONDS
    assert len(report.rows) == 7
    assert pruned_crop.size == (40, 40) or pruned_crop.size == (36, 36)  # a sixteenth of the time: half the side
    assert pruned_crop.cosine is not None


def test_an_unknown_device_is_named(tmp_path):
    """Regression: a traceback of torch."""
    with pytest.raises(ValueError, match="device='gpu' is unknown: it takes cpu, cuda"):
        demo.run_demo(tmp_path / "out", size=56, device="gpu")


def test_a_file_where_the_results_should_go_is_named_before_anything_is_computed(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(NotADirectoryError, match=r"out='.*out/demo' is no folder: .*/out is a file. Name a folder"):
        demo.run_demo(tmp_path / "out" / "demo", model_source="not/asked/for")


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty.png").touch()
    assert (
        read_image_fails(tmp_path / "missing.png", "region")
        == f"region='{tmp_path}/missing.png': there is no such file"
    )
    assert read_image_fails(tmp_path) == f"image='{tmp_path}': there is no such file"
    assert read_image_fails(tmp_path / "empty.png").startswith(
        f"image='{tmp_path}/empty.png' is not an image Pillow can read"
    )


def read_image_fails(path, *argument):
    with pytest.raises(OSError) as failure:
        read_image(path, *argument)
    return str(failure.value).split(". ")[0]


def test_a_small_bundled_image_is_tiled_by_reflection_to_the_size():
    region = demo._load_region(None, 600)
    assert region.size == (600, 600)
    assert region.getpixel((520, 7)) == region.getpixel((2 * 512 - 1 - 520, 7))


def test_features_do_not_keep_the_tokens_alive():
    """Regression: pooler_output was a view, and a list of pooled features held every token of every region."""
    model = small_model(SparsePathViTModel)
    with torch.no_grad():
        outputs = model(torch.randn(1, 3, 32, 32))
    assert outputs.pooler_output.untyped_storage().nbytes() == outputs.pooler_output.nbytes
