# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import psutil
import pytest
import torch
from slide_files import stained_image, write_pyramid
from small_models import small_config

from sparsepath_vit import SparsePathViTConfig, SparsePathViTModel
from sparsepath_vit.model.embeddings import token_grid_of_sizes
from sparsepath_vit.model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
from sparsepath_vit.runtime.cost import forward_flops, token_grid_of_size
from sparsepath_vit.runtime.measure import measured
from sparsepath_vit.slides import EmbedSettings, Slide, TissueMask, embed_slides, find_tissue, tissue_regions
from sparsepath_vit.slides.estimate import _Probe, estimate_for, estimate_size, estimate_slide, release_unused
from sparsepath_vit.slides.forward import forward_strips
from sparsepath_vit.slides.image_shares import largest_share

PATCH = 16
CONFIG = {"patch_size": PATCH, "image_size": 96, "window_size": 8}


@pytest.fixture
def slide(small_slide):
    return Slide(small_slide)


def test_image_counts_are_those_of_the_forward():
    config = small_config(**CONFIG, prune_ratio=0.5)
    result = estimate_size(config, 300, 170)
    assert (result.forwards, result.tokens, result.kept_tokens) == (1, 19 * 11, 105)
    assert result.flops == forward_flops(config, token_grid_of_size(config, 170, 300))
    assert result.tissue_share == 1 and result.seconds > 0


def test_slide_counts_are_those_of_embed(slide, model_folder, tmp_path):
    for settings in (EmbedSettings(region_size=256), EmbedSettings(whole_slide=True)):
        out = tmp_path / str(settings.whole_slide)
        report = embed_slides([slide.path], model_folder, out, settings, device="cpu")
        tissue = find_tissue(slide)
        result = estimate_slide(small_config(**CONFIG, prune_ratio=0.5), slide, tissue, settings, 0.5)
        assert (result.tokens, result.forwards) == (report.tokens, report.regions)
        present = tissue.token_grid(slide, PATCH, 0.5)
        assert result.tissue_share == pytest.approx(present.mean()) and result.tokens == present.sum()


def test_flops_of_regions_add_up(slide):
    config, tissue = small_config(**CONFIG), TissueMask.everywhere(slide)
    result = estimate_slide(config, slide, tissue, EmbedSettings(region_size=320), 0.5)
    regions = tissue_regions(slide, tissue, PATCH, 320)
    expected = sum(forward_flops(config, token_grid_of_size(config, region.height, region.width)) for region in regions)
    assert len(regions) == result.forwards == 4 and result.flops == pytest.approx(expected)


def test_deeper_models_take_longer_and_hold_more_weights(monkeypatch):
    monkeypatch.setattr(_Probe, "seconds_per_flop", lambda probe: 2e-12)
    shallow, deep = (
        estimate_size(small_config(**CONFIG, num_hidden_layers=layers, hidden_size=256), 320, 320)
        for layers in (4, 400)
    )
    assert deep.flops > 50 * shallow.flops
    assert [one.seconds for one in (shallow, deep)] == pytest.approx([2e-12 * one.flops for one in (shallow, deep)])
    layer = 4 * 256**2 + 4 * 256 + 3 * 256 * 40 + 80 + 256 + 6 * 256
    assert deep.peak_bytes - shallow.peak_bytes == pytest.approx(396 * layer * 4, rel=0.2)


@pytest.mark.parametrize("whole_slide", [True, False], ids=["whole slide", "regions"])
def test_peak_memory_is_predicted_within_20_percent(tmp_path, whole_slide):
    """On a run whose activations are large against what the process holds anyway."""
    config = SparsePathViTConfig(
        hidden_size=512, num_hidden_layers=3, num_attention_heads=8, intermediate_size=64, window_size=8,
        patch_size=16, image_size=224, num_register_tokens=2,
    )  # fmt: skip
    side = 1280
    path = write_pyramid(
        tmp_path / "large.tiff", stained_image(side, side, [(0, 0, side, side)]), factors=(), compression=None
    )
    SparsePathViTModel(config).save_pretrained(tmp_path / "model")
    SparsePathViTImageProcessor(patch_size=16).save_pretrained(tmp_path / "model")
    settings = EmbedSettings(region_size=side, whole_slide=whole_slide)
    with Slide(path) as slide:
        predicted = estimate_slide(config, slide, find_tissue(slide), settings, 0.5, workers=1)
    release_unused(torch.device("cpu"))
    held = psutil.Process().memory_info().rss
    report = embed_slides([path], tmp_path / "model", tmp_path / "out", settings, device="cpu", workers=1)
    assert report.tokens == predicted.tokens == 80 * 80
    assert predicted.peak_bytes == pytest.approx(report.peak_bytes, rel=0.2)
    needed = report.peak_bytes - held
    assert needed > 7e7 and predicted.peak_bytes - held == pytest.approx(needed, rel=0.5)


@pytest.mark.parametrize("prune_ratio", [0.0, 0.6])
def test_peak_memory_of_streamed_layers_is_predicted_within_15_percent(prune_ratio):
    """60,000 tokens in strips of 1,600, with 44 MiB of hidden states."""
    config = SparsePathViTConfig(
        hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64, window_size=8,
        patch_size=2, image_size=28, num_register_tokens=2, tokens_per_strip=2000, prune_after_layer=1,
        prune_ratio=prune_ratio,
    )  # fmt: skip
    present = np.ones((600, 100), dtype=bool)
    release_unused(torch.device("cpu"))
    probe = _Probe(config, present, torch.device("cpu"), torch.float32)
    predicted = probe.peak_bytes() - probe.idle_bytes - probe._full_weight_bytes()  # beside what is held anyway
    model = SparsePathViTModel(config).eval()
    strips = [torch.randn(1, 3, 40, 200) for _ in range(30)]
    release_unused(torch.device("cpu"))
    held = psutil.Process().memory_info().rss
    with measured() as measurement:
        forward_strips(model, strips, present, dense=False)
    needed = measurement.peak_bytes - held
    assert needed > 60_000 * 192 * 4 and predicted == pytest.approx(needed, rel=0.3)
    assert held + predicted == pytest.approx(measurement.peak_bytes, rel=0.15)


class TestSeveralProcesses:
    def test_the_share_is_that_of_the_process_with_most_tokens(self):
        config = small_config(**CONFIG, tokens_per_strip=100)
        present = torch.ones(1, 50, 10, dtype=torch.bool)
        present[:, :13] = False
        grid = token_grid_of_sizes(config, [(50, 10)], present)  # 7 rows of blocks: 0, 30, 80, 80, 80, 80 and 20 tokens
        share = largest_share(config, grid, 3, torch.device("cpu"))
        assert share == (320, 160 / 370, 80, 240)
        assert largest_share(config, grid, 1, torch.device("cpu")) == (370, 1.0, 100, 240)

    def test_memory_and_time_are_those_of_the_share(self):
        config = SparsePathViTConfig(
            hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, window_size=8,
            patch_size=2, image_size=28, num_register_tokens=2, tokens_per_strip=800,
        )  # fmt: skip
        present, predicted = np.ones((400, 80), dtype=bool), []
        for processes in (1, 4):
            release_unused(torch.device("cpu"))
            probe = _Probe(config, present, torch.device("cpu"), torch.float32, processes)
            probe._run(probe.part)  # what the first run of all takes is none of its tokens'
            predicted.append(probe.peak_bytes() - probe.idle_bytes - probe._full_weight_bytes())
        hidden = 400 * 80 * 256 * 4
        # Of four processes the largest has 13 of 50 rows of blocks, and 2 around.
        assert predicted[0] - predicted[1] == pytest.approx((1 - 15 / 50) * hidden, rel=0.2)
        assert probe.share.of_image == 13 / 50
        result = estimate_size(small_config(**CONFIG), 320, 320, processes=2)
        assert result.num_processes == 2 and "peak memory, each of 2 processes" in dict(result.lines())

    def test_what_they_cannot_share_is_said(self, slide):
        config, tissue = small_config(**CONFIG), TissueMask.everywhere(slide)
        with pytest.raises(ValueError, match="processes=2 share one image each: pass --whole-slide, or --size"):
            estimate_slide(config, slide, tissue, EmbedSettings(region_size=320), 0.5, processes=2)
        with pytest.raises(ValueError, match="processes=9 are more than the 3 rows of blocks"):
            estimate_size(config, 320, 320, processes=9)
        for name, value in (("num_context_tokens", 5), ("unprune", "scatter")):
            with pytest.raises(ValueError, match=rf"processes=2 cannot share an image with {name}='?{value}"):
                estimate_size(small_config(**CONFIG, **{name: value}), 500, 500, processes=2)
        with pytest.raises(ValueError, match="processes=0 is not possible"):
            estimate_size(config, 320, 320, processes=0)


def test_defaults_are_those_of_embed_and_one_subject_is_asked_for(small_slide):
    config = small_config(**CONFIG)
    result = estimate_for(config, small_slide, None, EmbedSettings(), device="cpu")
    assert result.forwards == 1 and result.tokens > 400
    assert dict(result.lines())["forward passes"] == "1"
    for slide, size in ((None, None), (small_slide, 100)):
        with pytest.raises(ValueError, match="either a slide or --size"):
            estimate_for(config, slide, size, EmbedSettings())


def test_sparse_tissue_is_probed_where_it_is(slide):
    mask = np.zeros((512, 640), bool)
    mask[480:, 600:] = True
    tissue = TissueMask.of_mask(mask, slide)
    result = estimate_slide(small_config(**CONFIG), slide, tissue, EmbedSettings(whole_slide=True), 0.5)
    assert result.tokens == 6
    assert torch.isfinite(torch.tensor(result.seconds))
